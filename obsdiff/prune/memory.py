"""How much memory a prune will need, before it starts."""

from collections.abc import Sequence

import psutil
import torch
from torch import nn

from obsdiff.errors import InputError
from obsdiff.models import ModelSpec, walk
from obsdiff.models.walk import Stage
from obsdiff.prune.recipe import Recipe

RESERVE = 0.5e9  # libraries, the decoder, fragments
WORKSPACE = 6  # matrices of a linear's size, and as many of its Hessian's, that a solver holds at once


def predict(
    denoiser: nn.Module, spec: ModelSpec, packages: Sequence[Sequence[Stage]], recipe: Recipe, tokens: int
) -> dict[str, float]:
    """Bytes on the device by what they are for: weights, hessians, solver, activations, reserve.

    Hessians are those of the largest package, float32, two for each input with the solver auto; `tokens` are those of
    one calibration call (image and prompt, both guidance passes).
    """
    split = (2 if recipe.solver == "auto" else 1) * (2 if recipe.target == "asymmetric" else 1)
    itemsize = getattr(torch, recipe.dtype).itemsize
    sizes = {x: walk.linear(denoiser, x[0]).weight.shape for p in packages for stage in p for x in stage.linears}
    hessians = [sum(4.0 * split * sizes[x][1] ** 2 for stage in p for x in stage.linears) for p in packages]
    parts = list(walk.blocks_of(denoiser, spec)) if recipe.offload else [denoiser]
    return {
        "weights": max(sum(p.numel() for p in part.parameters()) for part in parts) * itemsize,
        "hessians": max(hessians),
        "solver": max(WORKSPACE * 4.0 * (rows * columns + columns**2) for rows, columns in sizes.values()),
        "activations": 8.0 * tokens * max(columns for _, columns in sizes.values()) * itemsize,
        "reserve": RESERVE,
    }


def check(need: dict[str, float], device: str, recipe: Recipe) -> None:
    """Raises InputError with the sum, its parts and what would lower them when the device has less free than needed."""
    if device.startswith("cuda"):
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = float(psutil.virtual_memory().available)
    total = sum(need.values())
    if total <= free:
        return
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need.items())
    advice = [
        "a smaller --batch-size",
        *([] if recipe.calibration == "stream" else ["--calibration stream", "more --packages"]),
        *([] if recipe.offload or recipe.calibration != "stream" else ["--offload"]),
        *(["--solver alps, which holds half the hessians"] if recipe.solver == "auto" else []),
    ]
    raise InputError(
        f"this prune needs about {total / 1e9:.1f} GB on {device} ({parts}) and {free / 1e9:.1f} GB are free: "
        f"try {', '.join(advice)}"
    )
