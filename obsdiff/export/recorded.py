"""What a pipeline calls its text encoders and its decoder with, and what it reads of their answers.

Both differ from family to family and are written down nowhere, so the pipeline is run, twice, and looked at: with two
prompts and with three, long ones and short ones. An axis that moves is dynamic, all others are not.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError, first_line
from obsdiff.export.schema import Axis
from obsdiff.hooks import named_arguments
from obsdiff.models.source import Source, quiet_libraries

SHORT, LONG = "a bag", "a studio photo of a red leather bag with a long strap, on a wooden table by a white wall"
LONGEST = 512  # tokens, where the pipeline takes prompts of any length
LATENTS = "z"  # what a decoder's one input is called


@dataclass
class Call:
    """The arguments of one call of a component by name, None left out, and the tensors read of what it returned."""

    arguments: dict[str, Any]
    reads: dict[str, Tensor] = field(default_factory=dict)


class Reads:
    """A component's answer that records which of its tensors are read: `output.0`, `output.hidden_states.-2`."""

    def __init__(self, value: Any, path: str, seen: dict[str, Tensor]):
        self._value, self._path, self._seen = value, path, seen

    def __getitem__(self, key: Any) -> Any:
        return self._take(key, self._value[key])

    def __getattr__(self, name: str) -> Any:
        return self._take(name, getattr(self._value, name))

    def __len__(self) -> int:
        return len(self._value)

    def _take(self, key: Any, value: Any) -> Any:
        path = f"{self._path}.{key}"
        if isinstance(value, Tensor):
            self._seen[path] = value
        return Reads(value, path, self._seen) if isinstance(value, (tuple, list)) else value


class _Enough(Exception):
    """Breaks the pipeline's call off when all was seen."""


def record(pipe: Any, source: Source, names: Sequence[str], axes: Mapping[str, Axis]) -> dict[str, list[list[Call]]]:
    """The calls of each component in both runs. `axes` are the denoiser's: the picture is the smallest of them.

    Raises InputError when the pipeline does not run, or does not call a component.
    """
    size = {}
    if "height" in axes:
        low, step = axes["height"].min, axes["height"].multiple
        size = {"height": low, "width": min(low + step, axes["width"].max)}  # not square: sides must not look alike
    runs = [_run(pipe, source, names, size, prompts=2), _run(pipe, source, names, size, prompts=3)]
    for name in names:
        if not runs[0][name] or (name != "vae" and len(runs[0][name]) != len(runs[1][name])):
            kind = source.index["_class_name"]
            raise InputError(f"--components: {kind} does not call its {name} as a whole, so it can have no graph")
    return {name: [run[name] for run in runs] for name in names}


def _run(
    pipe: Any, source: Source, names: Sequence[str], size: Mapping[str, int], prompts: int
) -> dict[str, list[Call]]:
    """One call of the pipeline, with two long prompts to the decoder, with three short ones to the denoiser."""
    spec, calls = source.spec, {name: list[Call]() for name in names}
    known = inspect.signature(pipe.__call__).parameters
    sides = {side: latents * source.vae_scale for side, latents in size.items()}
    options = spec.options({**source.defaults, **spec.call, **sides, "num_inference_steps": 2})
    if prompts > 2:
        entry = known.get("max_sequence_length")
        default = entry.default if entry and isinstance(entry.default, int) else LONGEST
        options["max_sequence_length"] = max(1, int(options.get("max_sequence_length") or default) // 2)
    if spec.negative_prompt is not None:
        options["negative_prompt"] = spec.negative_prompt
    texts = list(spec.prompts[:1] or [LONG if prompts == 2 else SHORT]) * prompts
    asked = spec.arguments(pipe, texts) if spec.arguments else {"prompt": texts}
    denoiser: nn.Module = pipe.components[spec.component]
    with contextlib.ExitStack() as stack, quiet_libraries(), torch.no_grad():
        for name in names:
            watch = _watched_decoder if name == "vae" else _watched_encoder
            stack.enter_context(watch(pipe.components[name], calls[name]))
        if prompts > 2 or "vae" not in names:
            stack.callback(denoiser.register_forward_pre_hook(_stop).remove)
        try:
            pipe(**asked, **{name: value for name, value in options.items() if name in known}, output_type="pil")
        except _Enough:
            pass
        except Exception as error:  # whatever a foreign pipeline raises
            raise InputError(f"--components: {source.name} does not draw as it is: {first_line(error)}") from error
    return calls


def _stop(*_: Any) -> None:
    raise _Enough


@contextlib.contextmanager
def _watched_encoder(module: nn.Module, calls: list[Call]) -> Iterator[None]:
    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Reads:
        named = named_arguments(module.forward, args, kwargs)
        calls.append(Call({name: value for name, value in named.items() if value is not None}))
        return Reads(output, "output", calls[-1].reads)

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _watched_decoder(vae: Any, calls: list[Call]) -> Iterator[None]:
    def keep(*args: Any, **kwargs: Any) -> None:
        named = named_arguments(decode, args, kwargs)
        latents, *others = inspect.signature(decode).parameters
        extra = {name: named[name] for name in others if name != "return_dict" and named.get(name) is not None}
        calls.append(Call({LATENTS: named[latents], **extra}))
        raise _Enough

    decode = vae.decode

    vae.decode = keep
    try:
        yield
    finally:
        del vae.decode
