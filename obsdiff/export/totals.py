"""Sizes and costs of a denoiser, before and after shrinking, without computing anything."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from obsdiff.export.schema import Totals
from obsdiff.models import GroupRecord, graph, size_of
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, meta_denoiser


def count_nonzero(weights: Mapping[str, Tensor]) -> int:
    """Entries that are not zero, reading one tensor at a time."""
    return sum(int(tensor.count_nonzero()) for tensor in weights.values())


def count_totals(
    source: Source,
    groups: Iterable[GroupRecord],
    axes: Mapping[str, int],
    itemsize: int,
    nonzero: int | None = None,
) -> Totals:
    """The denoiser narrowed to `groups`: parameters, nonzero (all unless counted), bytes at `itemsize`, MACs (0:
    unknown, as long as the spec has no inputs)."""
    denoiser = meta_denoiser(source)
    shrink(denoiser, source.spec, groups)
    parameters = sum(p.numel() for p in denoiser.state_dict().values())
    return Totals(
        parameters=parameters,
        nonzero=parameters if nonzero is None else min(nonzero, parameters),
        bytes=parameters * itemsize,
        macs=graph.count_macs(denoiser, source.spec, source.config, axes) if source.spec.inputs else 0,
    )


def default_axes(source: Source) -> dict[str, int]:
    """One image at the model's own size with its usual prompt length: what MACs are quoted at."""
    side = int(source.defaults.get("height", 0)) // source.vae_scale or size_of(source.spec.sample_size, source.config)
    return {"batch": 1, "height": side, "width": side, "tokens": source.prompt_tokens}
