"""Calibration that samples once: the dense trajectories are recorded, then go through the pruned blocks one by one.

A sampler run for every package costs as many full models as there are packages. Here a block's inputs are those of the
dense trajectories carried through the pruned blocks before it, so that every block is a package of its own for the cost
of one sampler run and two passes.
"""

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.hooks import named_arguments
from obsdiff.models import ModelSpec, walk
from obsdiff.models.walk import Stage
from obsdiff.prune import ranks
from obsdiff.prune.cache import ActivationCache
from obsdiff.prune.calibration import Calibration, Collector, inputs_of, run_batches, sampler_cost, whole_denoiser
from obsdiff.prune.hessian import Hessians
from obsdiff.prune.recipe import Recipe


@dataclass(frozen=True)
class Call:
    """One call of the denoiser in a trajectory: its prompts, its step's weight, what all blocks get alike, and whether
    it is the step's first, which is what work is counted in (0 or 1)."""

    prompts: range
    alpha: float
    shared: Mapping[str, Any]
    units: int = 1


def stream_hessians(
    run: Calibration, packages: Sequence[Sequence[Stage]], done: Container[int]
) -> Iterator[tuple[int, Hessians | None]]:
    """Yields each package with its Hessians, None for one that is done; the caller prunes it before going on.

    A package lies within one block. Raises InputError when the family's blocks cannot be chained.
    """
    asymmetric = run.recipe.target == "asymmetric"
    limit = int(run.recipe.cache_gb * 1e9) // (1 + asymmetric)
    cache = ActivationCache(run.folder / f"stream-{ranks.rank()}", limit)
    dense = ActivationCache(run.folder / f"dense-{ranks.rank()}", limit) if asymmetric else None
    try:
        yield from _walk_blocks(run, packages, done, cache, dense)
    finally:
        for used in (cache, dense):
            if used:
                used.close()


def _walk_blocks(
    run: Calibration,
    packages: Sequence[Sequence[Stage]],
    done: Container[int],
    cache: ActivationCache,
    dense: ActivationCache | None,
) -> Iterator[tuple[int, Hessians | None]]:
    blocks = [block.module for block in walk.blocks_of(run.denoiser, run.spec)]
    calls = _record(run, blocks[0], cache, len(blocks))
    if dense:
        for number in range(len(calls)):
            dense.put(number, cache.get(number))
    last = packages[-1][0].block
    for index, block in enumerate(blocks[: last + 1]):
        note = f"block {index + 1}/{last + 1}"  # those after the last that is pruned are never run
        block.to(run.device)
        twin = copy.deepcopy(block) if dense else None
        for k, package in enumerate(packages):
            if package[0].block == index:
                hessians = None if k in done else _collect(run, block, package, calls, cache, twin, dense, note)
                yield k, hessians
        for number, call in enumerate(calls) if index < last else ():
            _carry(run, block, call, cache, number)
            if twin and dense:
                _carry(run, twin, call, dense, number)
            run.advance(call.units, f"{note}: carrying on")
        if run.recipe.offload:
            block.to("cpu")


def stream_cost(
    denoiser: nn.Module, spec: ModelSpec, packages: Sequence[Sequence[Stage]], done: Container[int], recipe: Recipe
) -> int:
    """Units of work that stream_hessians will tell of: calls of a block."""
    calls = sampler_cost(denoiser, spec, packages[:1], (), recipe)
    collected, carried = sum(k not in done for k in range(len(packages))), packages[-1][0].block
    return calls * len(walk.blocks_of(denoiser, spec)) + int(calls * recipe.call_share) * (collected + carried)


def _record(run: Calibration, first: nn.Module, cache: ActivationCache, cost: int) -> list[Call]:
    """Runs the sampler once and keeps what the first block gets in every call: the carried tensors in the cache."""
    calls: list[Call] = []
    state, share = Collector(run, []), run.recipe.call_share
    fresh, number = False, 0  # whether no call of this step was seen yet; how many steps were

    def step_starts(_step: int) -> None:
        nonlocal fresh
        fresh = True

    def keep(_block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal fresh, number
        units, fresh = int(fresh), False  # of work: a step may call twice, with and without the prompt
        number += units
        run.advance(cost * units, "recording the dense trajectories")
        if int(number * share) == int((number - 1) * share):  # every 1 / share-th step, whatever the share
            return
        named = named_arguments(first.forward, args, kwargs)
        cache.put(len(calls), {name: named.pop(name) for name in run.spec.carried})
        calls.append(Call(state.prompts, state.alpha, named, units))

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with whole_denoiser(run):
            run_batches(run, state, step_starts)
    finally:
        handle.remove()
    return calls


def _collect(
    run: Calibration,
    block: nn.Module,
    package: Sequence[Stage],
    calls: Sequence[Call],
    cache: ActivationCache,
    twin: nn.Module | None,
    dense: ActivationCache | None,
    note: str,
) -> Hessians:
    """Runs the block on every call; its dense twin, where there is one, first and on the dense model's inputs."""
    collector = Collector(run, inputs_of(package))
    prefix = f"{package[0].parent}."

    def keep(names: tuple[str, ...]) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _module, args: collector.dense.__setitem__(names, args[0])

    for names in collector.hessians if twin else ():
        assert twin
        twin.get_submodule(names[0].removeprefix(prefix)).register_forward_pre_hook(keep(names))
    with collector.listening():
        for number, call in enumerate(calls):
            collector.prompts, collector.alpha = call.prompts, call.alpha
            if twin and dense:
                _call(twin, call, dense.get(number))
            _call(block, call, cache.get(number))
            run.advance(call.units, f"{note}: calibrating")
    return collector.hessians


def _carry(run: Calibration, block: nn.Module, call: Call, cache: ActivationCache, number: int) -> None:
    outputs = _call(block, call, cache.get(number))
    cache.put(number, dict(zip(run.spec.carried, outputs, strict=True)))


@torch.no_grad()
def _call(block: nn.Module, call: Call, carried: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    device = next(block.parameters()).device
    outputs = block(**{name: tensor.to(device) for name, tensor in carried.items()}, **call.shared)
    return outputs if isinstance(outputs, tuple) else (outputs,)
