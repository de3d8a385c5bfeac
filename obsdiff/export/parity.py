"""Whether a compiled denoiser computes what PyTorch does, on random inputs at shapes that it was not traced at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export.schema import Axis, Check, Precision
from obsdiff.models import ModelSpec, graph

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class NotFiniteError(ObsdiffError):
    """An output is NaN or infinite for the random inputs of `seed`."""

    def __init__(self, message: str, seed: int):
        super().__init__(message)
        self.seed = seed


def check_shapes(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """Shapes to check at: inside the ranges, other than the traced one, not square, different batches."""

    def near(name: str, size: int) -> int:
        axis = axes[name]
        size = min(max(size, axis.min), axis.max)
        return max(axis.min, size - size % axis.multiple)

    def moved(name: str, by: int) -> int:
        return near(name, by if name == "batch" else axes[name].opt + by * axes[name].multiple)

    names = [name for name in ("batch", "height", "width", "tokens") if name in axes]
    steps = ({"batch": 1, "height": -1, "width": 1, "tokens": -5}, {"batch": 3, "height": 1, "width": -2, "tokens": 9})
    return [{name: moved(name, step[name]) for name in names} for step in steps]


def reference_outputs(
    denoiser: nn.Module,
    spec: ModelSpec,
    config: Mapping[str, Any],
    shapes: Sequence[Mapping[str, int]],
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """What the float32 denoiser gives in PyTorch for the random inputs that `compare` uses, or for some of them."""
    outputs = []
    for seed in range(len(shapes)) if seeds is None else seeds:
        axes = shapes[seed]
        inputs = graph.random_inputs(spec, config, axes, seed=seed)
        with torch.no_grad():
            try:
                outputs.append(graph.TensorDenoiser(denoiser, spec)(*inputs.values()))
            except (RuntimeError, ValueError) as error:
                raise InputError(f"the denoiser does not run at {say_axes(axes)} (latents): {error}") from None
    return outputs


def compare(
    denoise: Callable[..., Tensor],
    expected: Sequence[Tensor],
    spec: ModelSpec,
    config: Mapping[str, Any],
    shapes: Sequence[Mapping[str, int]],
    precision: Precision,
    *,
    name: str,
    device: str = "cpu",
) -> Check:
    """Calls `denoise(**inputs)` with the inputs that gave `expected` in PyTorch, float32. `name` says what it is.

    Raises ObsdiffError when it gives NaN or is further off than the precision explains.
    """
    worst, relative, tolerance = 0.0, 0.0, TOLERANCE[precision]
    for seed, (axes, wanted) in enumerate(zip(shapes, expected, strict=True)):
        inputs = graph.random_inputs(spec, config, axes, DTYPES[precision], seed=seed)
        got = denoise(**{key: value.to(device) for key, value in inputs.items()}).float().cpu()
        if not got.isfinite().all():
            wider = {"fp16": "--precision bf16, which has float32's range", "bf16": "--precision fp32"}.get(precision)
            advice = f"use {wider}" if wider else "the model itself overflows"
            raise NotFiniteError(f"the {precision} {name} gives NaN or infinity at {say_axes(axes)}: {advice}", seed)
        difference = got - wanted
        worst = max(worst, difference.abs().max().item())
        relative = max(relative, (difference.norm() / wanted.norm()).item())
    if relative > tolerance:
        raise ObsdiffError(
            f"the {precision} {name} disagrees with PyTorch: relative error {relative:.1e} is more than {tolerance:.0e}"
        )
    return Check(
        shapes=[dict(axes) for axes in shapes],
        max_difference=worst,
        relative_error=relative,
        tolerance=tolerance,
    )


def find_overflow(
    denoiser: nn.Module, spec: ModelSpec, config: Mapping[str, Any], shapes: Sequence[Mapping[str, int]], seed: int
) -> str:
    """The first module, in forward order, whose output is beyond fp16's largest number; "" where none is.

    Runs the denoiser in float32 on the random inputs of `seed`, and leaves it in float32.
    """
    largest = torch.finfo(torch.float16).max
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            tensors = [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]
            if not found and any(not bool((value.abs() <= largest).all()) for value in tensors):
                found.append(name)

        return hook

    modules = [(name, module) for name, module in denoiser.float().named_modules() if name]
    hooks = [module.register_forward_hook(look(name)) for name, module in modules]
    try:
        reference_outputs(denoiser, spec, config, shapes, [seed])
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def say_axes(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in axes.items())
