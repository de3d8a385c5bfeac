"""How much memory a prune will need, before it starts."""

from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import nn

from obsdiff.errors import InputError
from obsdiff.models import ModelSpec, graph, layers, walk
from obsdiff.models.source import Source, meta_denoiser
from obsdiff.models.walk import Stage
from obsdiff.prune.recipe import Recipe

RESERVE = 0.5e9  # libraries, the decoder, fragments
PATCHES = 3  # unfolded, with the channels of a tap side by side, and the tokens chosen of them
WORKSPACE = 6  # matrices of a linear's size, and as many of its Hessian's, that a solver holds at once


def predict(
    denoiser: nn.Module,
    spec: ModelSpec,
    packages: Sequence[Sequence[Stage]],
    recipe: Recipe,
    tokens: int,
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, float]:
    """Bytes on the device by what they are for: weights, hessians, solver, activations, patches, caches, reserve.

    Hessians are those of the largest package, float32, two for each input with the solver auto; `tokens` are those of
    one calibration call (image and prompt, both guidance passes), and `shapes` what linears read in one where that is
    not tokens times width (input_shapes). Caches of a stream lie in the CPU's memory, and count where that is the
    device.
    """
    asymmetric = recipe.target == "asymmetric"
    split = (2 if recipe.solver == "auto" else 1) * (1 + asymmetric)
    itemsize = getattr(torch, recipe.dtype).itemsize
    sizes = {
        x: layers.matrix_shape(walk.linear(denoiser, x[0])) for p in packages for stage in p for x in stage.linears
    }
    known = shapes or {}
    inputs = {x: known[x[0]].numel() if x[0] in known else tokens * columns for x, (_, columns) in sizes.items()}
    patches = max((_patches(walk.linear(denoiser, x[0]), known[x[0]]) for x in sizes if x[0] in known), default=0)
    # A set, since groups that share a linear (heads and neurons of a fused projection) share its Hessian.
    read = [{x for stage in package for x in stage.linears} for package in packages]
    hessians = [sum(4.0 * split * sizes[x][1] ** 2 for x in names) for names in read]
    blocks = [_parameters(block.module) for block in walk.blocks_of(denoiser, spec)]
    whole = max(blocks) if recipe.offload else _parameters(denoiser)
    return {
        "weights": (whole + asymmetric * max(blocks)) * itemsize,  # the dense twin of a block
        "hessians": max(hessians),
        "solver": max(WORKSPACE * 4.0 * (rows * columns + columns**2) for rows, columns in sizes.values()),
        "activations": 8.0 * itemsize * max(inputs.values()),
        **({"patches": PATCHES * itemsize * patches} if patches else {}),
        "caches": _caches(recipe, tokens, min(columns for _, columns in sizes.values())),
        "reserve": RESERVE,
    }


def input_shapes(source: Source, packages: Sequence[Sequence[Stage]], recipe: Recipe) -> dict[str, torch.Size]:
    """The shape of what every layer reads in one calibration call; empty when no convolution is to be pruned.

    Layers of a U-Net see from all latents to one in 64 of them, so that no count of tokens holds for all.
    """
    denoiser = meta_denoiser(source)
    names = {shared[0] for package in packages for stage in package for shared in stage.linears}
    if not any(layers.taps(walk.linear(denoiser, name)) > 1 for name in names):
        return {}
    axes = {
        "batch": recipe.batch_size * source.spec.passes_at(recipe.guidance_scale),
        "height": recipe.height // source.vae_scale,
        "width": recipe.width // source.vae_scale,
        "tokens": source.prompt_tokens,
    }
    shapes: dict[str, torch.Size] = {}
    for name in names:
        walk.linear(denoiser, name).register_forward_pre_hook(
            lambda _layer, args, name=name: shapes.__setitem__(name, args[0].shape)
        )
    with torch.no_grad():
        graph.TensorDenoiser(denoiser, source.spec)(
            *graph.random_inputs(source.spec, source.config, axes, device="meta").values()
        )
    return shapes


def _patches(layer: layers.Layer, shape: torch.Size) -> int:
    """Entries of the patches that a convolution's Hessian is made from at a time (layers.pieces)."""
    entries, count = shape[1:].numel(), layers.taps(layer)
    return 0 if count == 1 else min(shape[0], layers.piece(layer, entries)) * entries * count


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _caches(recipe: Recipe, tokens: int, width: int) -> float:
    """What a stream records of every call, at most --cache-gb of it in memory."""
    if recipe.calibration != "stream" or recipe.device != "cpu":
        return 0.0
    calls = -(-len(recipe.prompts) // recipe.batch_size) * recipe.steps * recipe.call_share
    recorded = calls * tokens * width * getattr(torch, recipe.dtype).itemsize
    return min(recipe.cache_gb * 1e9, recorded * (1 + (recipe.target == "asymmetric")))


def check(need: dict[str, float], device: str, recipe: Recipe, chained: bool = True) -> None:
    """Raises InputError with the sum, its parts and what would lower them when the device has less free than needed.

    A stream is advised where the family's blocks are chained.
    """
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
        *(["--calibration stream"] if chained and recipe.calibration != "stream" else []),
        *(["more --packages"] if recipe.calibration != "stream" else []),
        *(["--exclude for the convolutions, whose hessians are the largest"] if need.get("patches") else []),
        *([] if recipe.offload or recipe.calibration != "stream" else ["--offload"]),
        *(["a smaller --cache-gb"] if need.get("caches") else []),
        *(["--solver alps, which holds half the hessians"] if recipe.solver == "auto" else []),
    ]
    raise InputError(
        f"this prune needs about {total / 1e9:.1f} GB on {device} ({parts}) and {free / 1e9:.1f} GB are free: "
        f"try {', '.join(advice)}"
    )
