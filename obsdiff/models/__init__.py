"""Denoiser families: one file each, registered here by the denoiser's class name."""

from obsdiff.errors import InputError
from obsdiff.models import generic
from obsdiff.models.dit import DIT
from obsdiff.models.flux import FLUX
from obsdiff.models.flux2 import FLUX2
from obsdiff.models.pixart import PIXART
from obsdiff.models.qwenimage import QWENIMAGE
from obsdiff.models.sana import SANA
from obsdiff.models.sd3 import SD3
from obsdiff.models.spec import Blocks, Config, Group, GroupRecord, Input, ModelSpec, Span, size_of
from obsdiff.models.unet import UNET
from obsdiff.models.wan import WAN
from obsdiff.models.zimage import ZIMAGE

FAMILIES: dict[str, ModelSpec] = {
    spec.denoiser: spec for spec in (SD3, FLUX, FLUX2, UNET, PIXART, DIT, SANA, QWENIMAGE, ZIMAGE, WAN)
}

__all__ = [
    "FAMILIES",
    "Blocks",
    "Config",
    "Group",
    "GroupRecord",
    "Input",
    "ModelSpec",
    "Span",
    "find_spec",
    "known_families",
    "pipeline_spec",
    "size_of",
]


def find_spec(denoiser: str, config: Config | None = None, component: str = "transformer") -> ModelSpec:
    """The family of a denoiser class name, by its config too where the name is older than the class.

    With a config, a class of diffusers without a spec gets a generic one. Raises InputError that lists the known ones.
    """
    for spec in FAMILIES.values():
        if (told := spec.aliases.get(denoiser)) and told.items() <= dict(config or {}).items():
            return spec
    if denoiser not in FAMILIES and config and (made := generic.make_spec(denoiser, component, config)):
        return made
    if denoiser not in FAMILIES:
        raise InputError(
            f"the denoiser {denoiser} is of a family that obsdiff does not know. It knows: {known_families()}"
        )
    return FAMILIES[denoiser]


def known_families() -> str:
    """The denoisers that have a spec, in words."""
    return ", ".join(f"{name} ({spec.title})" for name, spec in FAMILIES.items())


def pipeline_spec(pipeline: object) -> ModelSpec | None:
    """The family of a diffusers pipeline by the name of its class; None: one that no family names."""
    return next((spec for spec in FAMILIES.values() if type(pipeline).__name__ in spec.pipelines), None)
