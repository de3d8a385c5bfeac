"""What the graph of a denoiser without a spec takes, found by what its pipeline calls it with.

The pipeline is started several times, each time with one thing changed: the number of prompts, the height, the width,
the length of the prompt. What it calls the denoiser with is kept, and the call broken off. An axis that moves with one
of them is that axis.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.export.totals import default_axes
from obsdiff.hooks import named_arguments
from obsdiff.models import Input, size_of
from obsdiff.models.source import Source, load_pipeline, meta_denoiser, quiet_libraries

LONG = "a studio photo of a red leather bag with a long strap, on a wooden table in front of a white wall"
LONGEST = 512  # tokens, where the pipeline takes prompts of any length
MOVED = {(): "", ("batch",): "batch", ("height",): "height", ("width",): "width", ("tokens",): "tokens"} | {
    ("height", "width"): "image"
}
Call = dict[str, Tensor]


class _Called(Exception):
    """Breaks the pipeline's call off when the denoiser is reached."""


def probe(source: Source) -> Source:
    """The source with the inputs of its graph in its spec. Raises InputError that says why it can have no graph."""
    with quiet_libraries():
        return _probe(source)


def _probe(source: Source) -> Source:
    pipe: Any = load_pipeline(source, torch.float32)
    usual = default_axes(source)
    side, patch = usual["height"], size_of(source.spec.patch, source.config)
    base = {"batch": 2, "height": side, "width": side, "tokens": 0}
    moves = {"batch": 1, "height": 4 * patch, "width": 4 * patch, "tokens": 1}
    sizes = {"base": base} | {name: base | {name: base[name] + by} for name, by in moves.items()}
    calls = {name: _record(pipe, source, size) for name, size in sizes.items()}
    first = calls["base"]
    if odd := [name for name in first if any(name not in call for call in calls.values())]:
        raise _refusal(source, f"it is not always called with {odd[0]}")
    axes = {name: _axes(source, name, {k: call[name] for k, call in calls.items()}) for name in first}
    with torch.no_grad():
        module = meta_denoiser(source)
        outputs = {name: _output(source, module, call) for name, call in calls.items()}
    output = Input("sample", _axes(source, "its output", outputs))
    found = _sizes(source, axes, calls)
    for axis in ("height", "width"):
        if any(found.get(axis, {}).get(name, size[axis]) != size[axis] for name, size in sizes.items()):
            raise _refusal(source, f"{found[axis]['base']} is not its {axis} in latents, {base[axis]}")
    if "image" in found:
        patch = round((side * side / found["image"]["base"]) ** 0.5)
        if any(found["image"][k] * patch**2 != size["height"] * size["width"] for k, size in sizes.items()):
            raise _refusal(source, f"{found['image']['base']} image tokens are no square patches of its latents")
    tokens = found.get("tokens", {}).get("base", source.spec.tokens[1])
    # Those whose batch is not seen (one timestep for all) come last: their size is the others'.
    names = sorted(axes, key=lambda name: first[name].ndim == 0)
    spec = dataclasses.replace(
        source.spec,
        inputs=tuple(_input(source, name, axes[name], first[name]) for name in names),
        output=output,
        tokens=(1, tokens, max(tokens, _longest(pipe) or LONGEST)),
        patch=patch,
        passes=max(1, found["batch"]["base"] // base["batch"]) if "batch" in found else 1,
    )
    return dataclasses.replace(source, spec=spec)


def _refusal(source: Source, why: str) -> InputError:
    return InputError(
        f"{source.spec.denoiser} has no spec in obsdiff, and its pipeline does not show what a graph of it takes: "
        f"{why}; it can be pruned, not exported"
    )


def _record(pipe: Any, source: Source, size: Mapping[str, int]) -> Call:
    """The tensors that the pipeline first calls its denoiser with; `tokens` other than 0 is a short prompt."""
    denoiser: nn.Module = pipe.components[source.spec.component]
    kept: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.update(named_arguments(denoiser.forward, args, kwargs))
        raise _Called

    known = inspect.signature(pipe.__call__).parameters
    options = dict(source.defaults) | {
        "height": size["height"] * source.vae_scale,
        "width": size["width"] * source.vae_scale,
        "num_inference_steps": 2,
    }
    if size["tokens"]:
        length = options.get("max_sequence_length") or _longest(pipe)
        options["max_sequence_length"] = max(1, int(length) // 2)
    options = {name: value for name, value in options.items() if name in known}
    prompts = ["a bag" if size["tokens"] else LONG] * size["batch"]
    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(prompt=prompts, **options, output_type="latent")
    except _Called:
        pass
    except Exception as error:  # whatever a foreign pipeline raises
        raise _refusal(source, f"it fails at {dict(size)}: {' '.join(str(error).split())[:200]}") from error
    finally:
        handle.remove()
    kept.pop("return_dict", None)
    call = {name: value for name, value in kept.items() if value is not None and value != {}} if kept else {}
    for name, value in call.items():
        if not isinstance(value, Tensor):
            raise _refusal(source, f"{name} is a {type(value).__name__} where a graph takes tensors alone")
        if value.dtype == torch.bool or value.is_complex():
            raise _refusal(source, f"{name} is {str(value.dtype).removeprefix('torch.')}")
    return call


def _longest(pipe: Any) -> int:
    entry = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    return entry.default if entry and isinstance(entry.default, int) else 0


def _axes(source: Source, name: str, values: Mapping[str, Tensor]) -> tuple[str | int, ...]:
    """The axes of one tensor by what they move with. Raises InputError for one that moves with several things."""
    shapes = {probe: tuple(value.shape) for probe, value in values.items()}
    own = shapes["base"]
    if not own and len(set(shapes.values())) == 1:
        return ("batch",)  # one number for all
    axes: list[str | int] = []
    for k, size in enumerate(own):
        if any(len(shape) != len(own) for shape in shapes.values()):
            raise _refusal(source, f"{name} does not always have {len(own)} axes")
        moved = tuple(probe for probe, shape in shapes.items() if shape[k] != size)
        if moved not in MOVED:
            raise _refusal(source, f"axis {k} of {name} {list(own)} moves with {' and '.join(moved)}")
        axes.append(MOVED[moved] or size)
    return tuple(axes)


def _sizes(
    source: Source, axes: Mapping[str, tuple[str | int, ...]], calls: Mapping[str, Call]
) -> dict[str, dict[str, int]]:
    """The size of every dynamic axis in every call. Raises InputError where two inputs disagree."""
    found: dict[str, dict[str, int]] = {}
    for name, of in axes.items():
        for probe, call in calls.items():
            for axis, size in zip(of, call[name].shape, strict=False):
                if isinstance(axis, str) and found.setdefault(axis, {}).setdefault(probe, size) != size:
                    raise _refusal(source, f"{name} has {size} {axis} where another input has {found[axis][probe]}")
    return found


def _output(source: Source, module: nn.Module, call: Call) -> Tensor:
    batch = max((len(value) for value in call.values() if value.ndim), default=1)
    named = {name: value.expand(batch) if value.ndim == 0 else value for name, value in call.items()}
    try:
        return module(**{name: value.to("meta") for name, value in named.items()}, return_dict=False)[0]
    except Exception as error:  # whatever a foreign class raises without values
        raise _refusal(source, f"its output depends on values: {' '.join(str(error).split())[:200]}") from error


def _input(source: Source, name: str, axes: tuple[str | int, ...], value: Tensor) -> Input:
    """One number an image stays float32, as timesteps must; integers are drawn as large as they were."""
    if not value.is_floating_point():
        return Input(name, axes, "int64", draw=float(value.max()) + 1)
    if axes == ("batch",):
        return Input(name, axes, "float32", draw=1000 if float(value.max()) > 1 else 1)
    return Input(name, axes)
