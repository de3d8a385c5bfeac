"""Runs the sampler over calibration prompts and hands each linear's input to a collector."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models import ModelSpec
from obsdiff.prune.hessian import Hessian
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.timesteps import WEIGHTINGS

Embeds = dict[str, Tensor]


@torch.no_grad()
def encode_prompts(
    pipe: Any, spec: ModelSpec, prompts: Sequence[str], call: Mapping[str, Any], batch_size: int, device: str
) -> list[Embeds]:
    """The prompts' embeddings in batches, as the pipeline's __call__ takes them: computed once for a whole prune."""
    known = inspect.signature(pipe.encode_prompt).parameters
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
    for start in range(0, len(prompts), batch_size):
        values = pipe.encode_prompt(prompt=list(prompts[start : start + batch_size]), **options)
        batches.append({name: v for name, v in zip(spec.embeds, values, strict=True) if v is not None})
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
    batches: Iterable[Embeds],
    call: Mapping[str, Any],
    seed: int,
    on_step: Callable[[int], None],
) -> Iterator[Tensor]:
    """The final latents of each batch; on_step(i) is called before step i of the sampler.

    The noise of prompt k comes from its own generator, seeded with seed + k, so it does not depend on the batch size.
    """

    def step_ended(_pipe: Any, step: int, _time: Any, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(step + 1)
        return {}

    known = inspect.signature(sampler.__call__).parameters
    options = {name: value for name, value in call.items() if name in known}
    for embeds in batches:
        size = len(next(iter(embeds.values())))
        generators = [torch.Generator().manual_seed(seed + k) for k in range(size)]
        seed += size
        on_step(0)
        result = sampler(
            **embeds,
            **options,
            generator=generators,
            output_type="latent",
            callback_on_step_end=step_ended,
        )
        yield result.images


def collect(
    sampler: Any,
    denoiser: nn.Module,
    inputs: Sequence[tuple[str, ...]],
    batches: Sequence[Embeds],
    recipe: Recipe,
    on_step: Callable[[int], None],
) -> dict[tuple[str, ...], Hessian]:
    """One Hessian for each tuple of linears that share an input, over one run of the sampler on all batches."""
    call, weighting = recipe.call_options, WEIGHTINGS[recipe.timestep_weighting]
    modules = {names: denoiser.get_submodule(names[0]) for names in inputs}
    device = next(denoiser.parameters()).device
    hessians = {names: Hessian(int(module.in_features), device) for names, module in modules.items()}  # type: ignore[arg-type]
    alpha = [1.0]

    def step_starts(step: int) -> None:
        steps = _scheduler_steps(sampler, call)
        alpha[0] = float(weighting(steps)[min(step, steps - 1)])
        on_step(step)

    def hook(hessian: Hessian) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: hessian.add(args[0], alpha[0])

    with contextlib.ExitStack() as hooks:
        for names, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(hook(hessians[names])).remove)
        for _latents in sample_latents(sampler, batches, call, recipe.seed, step_starts):
            pass
    return hessians


def _scheduler_steps(sampler: Any, call: Mapping[str, Any]) -> int:
    """Denoiser steps of one run: a second-order scheduler takes nearly two for each that was asked for."""
    order = int(getattr(sampler.scheduler, "order", 1))
    steps = int(call["num_inference_steps"])
    return steps if order == 1 else order * steps - 1
