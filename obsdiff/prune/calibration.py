"""Runs the sampler over calibration prompts and hands each linear's input to a collector."""

import contextlib
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.hooks import after_steps, defaults
from obsdiff.models import ModelSpec, layers, walk
from obsdiff.models.walk import Stage
from obsdiff.prune import ranks
from obsdiff.prune.hessian import Hessian, Hessians
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.timesteps import WEIGHTINGS


@dataclass(frozen=True)
class Batch:
    """The prompts with these numbers, as the pipeline's __call__ takes their embeddings or labels."""

    prompts: range
    embeds: dict[str, Any]  # tensors, or lists of tensors where captions have lengths of their own, class numbers


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
    starts = range(0, len(recipe.prompts), recipe.batch_size)[ranks.rank() :: ranks.count()]
    chosen = [range(len(recipe.prompts))[start : start + recipe.batch_size] for start in starts]
    if spec.arguments:
        return [Batch(numbers, spec.arguments(pipe, [recipe.prompts[k] for k in numbers])) for numbers in chosen]
    known, call = inspect.signature(pipe.encode_prompt).parameters, recipe.call_options
    guided, negative = call["guidance_scale"] > spec.guided_above, spec.negative_prompt or ""
    options = {
        **defaults(pipe.__call__),  # what __call__ hands on is not always encode_prompt's own default
        **spec.encode,
        **call,
        "device": torch.device(device),
        "do_classifier_free_guidance": guided,
    }
    options = {name: value for name, value in options.items() if name in known and name != "prompt"}
    encoders = [module for name, module in pipe.components.items() if name.startswith("text_encoder") and module]
    for encoder in encoders:
        encoder.to(device)
    takes = inspect.signature(pipe.__call__).parameters
    second = tuple(name if name in takes else None for name in spec.negative_embeds) if guided else ()
    batches = []
    for numbers in chosen:
        prompts = [recipe.prompts[k] for k in numbers]
        embeds: dict[str, Any] = {}
        for texts, names in ((prompts, spec.embeds), ([negative] * len(prompts), second)):
            values = pipe.encode_prompt(prompt=texts, **options) if any(names) else ()
            pairs = zip(names[: len(values)], values, strict=True)
            embeds |= {name: value for name, value in pairs if name and value is not None}
        batches.append(Batch(numbers, embeds))
    for encoder in encoders:
        encoder.to("cpu")
    return batches


def sampler_of(pipe: Any, device: str, encodes: bool = False) -> Any:
    """The same pipeline on the device, without its encoders unless it `encodes` itself; it ends at latents."""
    left_out = ("feature_extractor", "safety_checker")
    components = {
        name: None if ("encoder" in name and not encodes) or name in left_out else component
        for name, component in pipe.components.items()
    }
    known = inspect.signature(type(pipe).__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in known and name not in components}
    sampler = type(pipe)(**components, **settings)
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
    known, done = inspect.signature(sampler.__call__).parameters, count(1)
    texts = dict.fromkeys(("negative_prompt", "negative_prompt_2", "negative_prompt_3"))  # they are embedded already
    options = {name: value for name, value in {**call, **texts}.items() if name in known}

    on_step(0)
    try:
        with after_steps(sampler.scheduler, lambda: on_step(next(done))):
            return sampler(
                **batch.embeds,
                **options,
                generator=[torch.Generator().manual_seed(seed + k) for k in batch.prompts],
                output_type="latent",
            )[0]
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
                Hessian(layers.width(module), run.device, run.recipe.target == "asymmetric")
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
            layer, dense = self._modules[names], self.dense.get(names)
            for samples, inputs in layers.pieces(layer, args[0]):
                twins = None if dense is None else layers.inputs_of(layer, dense[samples]).flatten(0, -2)
                for part, hessian in enumerate(self.hessians[names]):
                    chosen = self._choose(samples, inputs, part, len(self.hessians[names]))
                    tokens = inputs.flatten(0, -2)[chosen]
                    hessian.add(tokens, self.alpha, None if twins is None else twins[chosen])

        return add

    def _choose(self, samples: slice, inputs: Tensor, part: int, parts: int) -> Tensor | slice:
        """Which tokens of these samples [n, ..., width] go into that part: its prompts', and of those the recipe's
        share."""
        if parts == 1 and self._share == 1:
            return slice(None)
        # With guidance every prompt is there twice, the whole batch after the whole batch.
        prompts = torch.arange(samples.start, samples.stop) % len(self.prompts) + self.prompts.start
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

        def step_starts(step: int, note: str = note) -> None:
            run.advance(int(0 < step <= run.recipe.steps), note)  # some schedulers take more steps than were asked for

        with collector.listening():
            run_batches(run, collector, step_starts)
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
        sample_latents(run.sampler, batch, {**run.spec.options(call), **run.spec.call}, run.recipe.seed, step_starts)


def _scheduler_steps(sampler: Any, call: Mapping[str, Any]) -> int:
    """Denoiser steps of one run: a second-order scheduler takes nearly two for each that was asked for."""
    order = int(getattr(sampler.scheduler, "order", 1))
    steps = int(call["num_inference_steps"])
    return steps if order == 1 else order * steps - 1
