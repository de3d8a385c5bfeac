"""Runs the sampler over calibration prompts and hands each linear's input to a collector."""

import contextlib
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.models import ModelSpec, walk
from obsdiff.models.walk import Stage
from obsdiff.prune import ranks
from obsdiff.prune.hessian import Hessian, Hessians
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.timesteps import WEIGHTINGS


@dataclass(frozen=True)
class Batch:
    """The prompts with these numbers, as the pipeline's __call__ takes their embeddings."""

    prompts: range
    embeds: dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What runs: the sampler and its denoiser, this rank's batches, and a folder for what does not fit into memory.

    `advance(n, note)` is told of every n units of work, as many as the cost functions say.
    """

    sampler: Any
    denoiser: nn.Module
    spec: ModelSpec
    batches: Sequence[Batch]
    recipe: Recipe
    device: str
    folder: Path
    advance: Callable[[int, str], None]


@torch.no_grad()
def encode_prompts(pipe: Any, spec: ModelSpec, recipe: Recipe, device: str) -> list[Batch]:
    """The embeddings of this rank's batches of the recipe's prompts: computed once for a whole prune."""
    known, call = inspect.signature(pipe.encode_prompt).parameters, recipe.call_options
    options = {
        **spec.encode,
        "device": torch.device(device),
        "do_classifier_free_guidance": call["guidance_scale"] > 1,
        **{name: value for name, value in call.items() if name == "max_sequence_length"},
    }
    options = {name: value for name, value in options.items() if name in known}
    encoders = [module for name, module in pipe.components.items() if name.startswith("text_encoder") and module]
    for encoder in encoders:
        encoder.to(device)
    batches = []
    for start in range(0, len(recipe.prompts), recipe.batch_size)[ranks.rank() :: ranks.count()]:
        prompts = recipe.prompts[start : start + recipe.batch_size]
        values = pipe.encode_prompt(prompt=list(prompts), **options)
        embeds = {name: value for name, value in zip(spec.embeds, values, strict=True) if value is not None}
        batches.append(Batch(range(start, start + len(prompts)), embeds))
    for encoder in encoders:
        encoder.to("cpu")
    return batches


def sampler_of(pipe: Any, device: str) -> Any:
    """The same pipeline without its encoders, on the device: it starts from embeddings and ends at latents."""
    components = {
        name: None if "encoder" in name or name == "feature_extractor" else component
        for name, component in pipe.components.items()
    }
    sampler = type(pipe)(**components)
    sampler.set_progress_bar_config(disable=True)
    return sampler.to(device)


@torch.no_grad()
def sample_latents(
    sampler: Any,
    batch: Batch,
    call: Mapping[str, Any],
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """The final latents of a batch; on_step(i) is called before step i of the sampler.

    The noise of prompt k comes from its own generator, seeded with seed + k, whatever the batch.
    Raises InputError when the pipeline refuses an option of the call, a height that its patches do not divide.
    """

    def step_ended(_pipe: Any, step: int, _time: Any, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(step + 1)
        return {}

    known = inspect.signature(sampler.__call__).parameters
    options = {name: value for name, value in call.items() if name in known}
    on_step(0)
    try:
        return sampler(
            **batch.embeds,
            **options,
            generator=[torch.Generator().manual_seed(seed + k) for k in batch.prompts],
            output_type="latent",
            callback_on_step_end=step_ended,
        ).images
    except ValueError as error:  # a height or width that the model cannot draw
        raise InputError(f"the sampler refuses this call: {error}") from error


class Collector:
    """The Hessians of linears, each from the one input that its linears share.

    For the solver auto there are two for each: of the even and of the odd prompts. `prompts` and `alpha` say what runs:
    the numbers of the batch's prompts, and the weight of the sampler's step. For the asymmetric target `dense` holds
    what the dense model has in the place of each input of this call.
    """

    def __init__(self, run: Calibration, inputs: Sequence[tuple[str, ...]]):
        self.prompts, self.alpha = range(0), 1.0
        self.dense: dict[tuple[str, ...], Tensor] = {}
        self._share, self._random = run.recipe.token_share, torch.Generator().manual_seed(run.recipe.seed)
        self._modules = {names: walk.linear(run.denoiser, names[0]) for names in inputs}
        self.hessians: Hessians = {
            names: [
                Hessian(module.in_features, run.device, run.recipe.target == "asymmetric")
                for _ in range(2 if run.recipe.solver == "auto" else 1)
            ]
            for names, module in self._modules.items()
        }

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Adds the inputs of every call of the linears while the body runs."""
        with contextlib.ExitStack() as hooks:
            for names, module in self._modules.items():
                hooks.callback(module.register_forward_pre_hook(self._hook(names)).remove)
            yield

    def _hook(self, names: tuple[str, ...]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            dense = self.dense.get(names)
            for part, hessian in enumerate(self.hessians[names]):
                chosen = self._choose(args[0], part, len(self.hessians[names]))
                twins = None if dense is None else dense.flatten(0, -2)[chosen]
                hessian.add(args[0].flatten(0, -2)[chosen], self.alpha, twins)

        return add

    def _choose(self, inputs: Tensor, part: int, parts: int) -> Tensor | slice:
        """Which tokens of [batch, ..., width] go into that part: its prompts', and of those the recipe's share."""
        if parts == 1 and self._share == 1:
            return slice(None)
        # With guidance every prompt is there twice, the whole batch after the whole batch.
        prompts = torch.arange(len(inputs)) % len(self.prompts) + self.prompts.start
        tokens = prompts.repeat_interleave(inputs.shape[:-1].numel() // len(inputs))
        chosen = (tokens % parts == part).nonzero().flatten()
        if self._share < 1:
            order = torch.randperm(len(chosen), generator=self._random)
            chosen = chosen[order[: round(self._share * len(chosen))]]
        return chosen.to(inputs.device)


@contextlib.contextmanager
def whole_denoiser(run: Calibration) -> Iterator[None]:
    """Lets the whole denoiser run on the device while the body does, offloaded from the CPU module by module or not."""
    if not run.recipe.offload:
        yield
        return
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules

    modules = [part for part in run.sampler.components.values() if isinstance(part, nn.Module)]
    cpu_offload(run.denoiser, torch.device(run.device))
    for module in modules:
        if module is not run.denoiser:  # a pipeline looks for its device in the first component that has no hook
            add_hook_to_module(module, ModelHook())
    try:
        yield
    finally:
        for module in modules:
            remove_hook_from_submodules(module)


def sampler_hessians(
    run: Calibration, packages: Sequence[Sequence[Stage]], done: Container[int]
) -> Iterator[tuple[int, Hessians | None]]:
    """Yields each package with its Hessians, None for one that is done; the caller prunes it before going on.

    Each costs a run of the sampler over all batches.
    """
    for k, package in enumerate(packages):
        if k in done:
            yield k, None
            continue
        collector = Collector(run, inputs_of(package))
        note = f"package {k + 1}/{len(packages)}: calibrating"
        with collector.listening():
            run_batches(run, collector, lambda step, note=note: run.advance(min(step, 1), note))  # type: ignore[misc]
        yield k, collector.hessians


def sampler_cost(
    _denoiser: nn.Module, _spec: ModelSpec, packages: Sequence[Sequence[Stage]], done: Container[int], recipe: Recipe
) -> int:
    """Units of work that sampler_hessians will tell of: steps of the sampler."""
    batches = len(range(0, len(recipe.prompts), recipe.batch_size)[ranks.rank() :: ranks.count()])
    return sum(k not in done for k in range(len(packages))) * batches * recipe.steps


def inputs_of(package: Sequence[Stage]) -> list[tuple[str, ...]]:
    """The package's linears, those that share an input together."""
    return [shared for stage in package for shared in stage.linears]


def run_batches(run: Calibration, collector: Collector, on_step: Callable[[int], None] = lambda step: None) -> None:
    """Runs the sampler over all batches, and tells the collector of every batch and step."""
    call, weighting = run.recipe.call_options, WEIGHTINGS[run.recipe.timestep_weighting]

    def step_starts(step: int) -> None:
        steps = _scheduler_steps(run.sampler, call)
        collector.alpha = float(weighting(steps)[min(step, steps - 1)])
        on_step(step)

    for batch in run.batches:
        collector.prompts = batch.prompts
        sample_latents(run.sampler, batch, call, run.recipe.seed, step_starts)


def _scheduler_steps(sampler: Any, call: Mapping[str, Any]) -> int:
    """Denoiser steps of one run: a second-order scheduler takes nearly two for each that was asked for."""
    order = int(getattr(sampler.scheduler, "order", 1))
    steps = int(call["num_inference_steps"])
    return steps if order == 1 else order * steps - 1
