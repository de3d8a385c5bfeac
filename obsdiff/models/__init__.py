"""Denoiser families: one file each, registered here by the denoiser's class name."""

from obsdiff.errors import InputError
from obsdiff.models.sd3 import SD3
from obsdiff.models.spec import Group, GroupRecord, Input, ModelSpec, Span

FAMILIES: dict[str, ModelSpec] = {spec.denoiser: spec for spec in (SD3,)}

__all__ = ["FAMILIES", "Group", "GroupRecord", "Input", "ModelSpec", "Span", "find_spec"]


def find_spec(denoiser: str) -> ModelSpec:
    """The family of a denoiser class name. Raises InputError that lists the known ones."""
    if denoiser not in FAMILIES:
        known = ", ".join(f"{name} ({spec.title})" for name, spec in FAMILIES.items())
        raise InputError(f"the denoiser {denoiser} is of a family that obsdiff does not know. It knows: {known}")
    return FAMILIES[denoiser]
