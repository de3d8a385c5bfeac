"""A denoiser without a spec: what can be said of any class of diffusers whose blocks are built of linears.

Its repeated blocks are the members of module lists that hold an attention; prunable are the linears in them, in the
order in which the class registers them, less those of norms, modulations and embedders by their names. Each has a
Hessian of its own. Which rows and columns are heads or neurons is not known, so nothing can be removed whole.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from obsdiff.errors import InputError
from obsdiff.models.spec import Blocks, Config, Input, ModelSpec

FAMILY = "generic"
COMPONENTS = ("transformer", "unet")
DENSE = re.compile(r"norm|modulation|adaln|emb|time", re.IGNORECASE)
"""Parts of a name that leave a linear dense: it steers every token at once, once an image, or embeds what comes in."""
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def make_spec(denoiser: str, component: str, config: Config) -> ModelSpec | None:
    """The spec of a class by its module on the meta device; None for a name that is no model class of diffusers.

    Its `inputs` are empty: they are only known once its pipeline was run (obsdiff.export.probe).
    Raises InputError when the config does not fit the class, or when there are no blocks with linears.
    """
    import torch

    model = model_class(denoiser)
    if model is None:
        return None
    takes = inspect.signature(model.__init__).parameters  # of a pruned model, the config has more
    try:
        with torch.device("meta"):
            module = model.from_config({name: value for name, value in config.items() if name in takes})
    except Exception as error:  # whatever a foreign class raises for a config that is not its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the denoiser's config.json is not of a {denoiser}: {reason}") from None
    blocks = tuple(_blocks(module))
    if not blocks:
        raise InputError(
            f"the denoiser {denoiser} is of a family that obsdiff does not know, "
            "and it has no repeated blocks with an attention built of linears: nothing can be pruned"
        )
    return _spec(denoiser, component, blocks=blocks)


def graph_spec(denoiser: str, component: str, inputs: Sequence[Input], output: Input) -> ModelSpec:
    """What a bundle says of a denoiser without a spec. Raises InputError when it cannot be so."""
    model = model_class(denoiser)
    if model is None:
        raise InputError(f"the denoiser {denoiser} is no model of diffusers")
    if component not in COMPONENTS:
        raise InputError(f"the component {component} is no denoiser: there are {', '.join(COMPONENTS)}")
    takes = inspect.signature(model.forward).parameters
    if odd := [entry.name for entry in inputs if entry.name not in takes]:
        raise InputError(f"{denoiser} has no input {odd[0]}")
    return _spec(denoiser, component, inputs=tuple(inputs), output=output)


def model_class(name: str) -> Any:
    """A model class of diffusers by its name, or None."""
    import diffusers

    model = getattr(diffusers, name, None) if name.isidentifier() else None
    return model if isinstance(model, type) and issubclass(model, diffusers.ModelMixin) else None


def _spec(denoiser: str, component: str, **known: Any) -> ModelSpec:
    return ModelSpec(
        **{
            "family": FAMILY,
            "title": denoiser,
            "pipelines": (),
            "denoiser": denoiser,
            "component": component,
            "blocks": (),
            "inputs": (),
            "output": Input("sample", ()),
            "tokens": (1, 256, 4096),
            "patch": _patch,
            "embeds": (),
            "arguments": _prompts,
            **known,
        }
    )


def _prompts(_pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts)}


def _patch(config: Config) -> int:
    patch = config.get("patch_size", 1)
    return int(patch[-1] if isinstance(patch, (list, tuple)) else patch or 1)


def _blocks(module: nn.Module) -> Iterator[Blocks]:
    """Every member of the outermost module lists, each a kind of its own: they need not be alike."""
    for path in _lists(module):
        for name, block in module.get_submodule(path).named_children():
            linears = tuple(((linear,),) for linear in _linears(block))
            if linears and _attends(block):
                yield Blocks(f"{path}.{name}", linears)


def _lists(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if DENSE.search(name):
            continue
        if isinstance(child, nn.ModuleList):
            yield f"{prefix}{name}"
        else:
            yield from _lists(child, f"{prefix}{name}.")


def _attends(block: nn.Module) -> bool:
    return any(ATTENTION.search(f"{name} {type(part).__name__}") for name, part in block.named_modules())


def _linears(block: nn.Module) -> Iterator[str]:
    for name, part in block.named_modules():
        if isinstance(part, nn.Linear) and name and not any(map(DENSE.search, name.split("."))):
            yield name
