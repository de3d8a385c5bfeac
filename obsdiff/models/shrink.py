"""Removes pruned heads and neurons for good: narrower linears instead of zeros."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.models import GroupRecord, ModelSpec, Span, walk


def shrink(denoiser: nn.Module, spec: ModelSpec, groups: Iterable[GroupRecord]) -> None:
    """Narrows the denoiser in place to the units that each record keeps; works on the meta device too.

    Outputs stay the same to round-off when the units that go are zero in every projection that reads them.
    Raises InputError for a record that does not fit the denoiser.
    """
    by_name = {group.name: group for group in spec.groups}
    for record in groups:
        group = by_name.get(record.name)
        prefix = f"{spec.blocks}.{record.block}."
        if group is None or not 0 <= record.block < len(walk.blocks_of(denoiser, spec)):
            raise InputError(f"{prefix}{record.name}: the {spec.title} family has no such group")
        units = walk.unit_count(denoiser, spec, record.block, group)
        distinct = set(record.kept)
        if units != record.of or len(distinct) != len(record.kept) or not distinct or not distinct <= set(range(units)):
            raise InputError(f"{prefix}{record.name}: keeps {record.kept} of {record.of}, but the denoiser has {units}")
        kept = torch.tensor(sorted(distinct))
        for spans, axis in ((group.rows, 0), (group.columns, 1)):
            for span in spans:
                if walk.has(denoiser, prefix + span.linear):
                    _narrow(walk.linear(denoiser, prefix + span.linear), span, axis, kept, units)
        if group.count:
            path, _, attribute = (prefix + group.count).rpartition(".")
            setattr(denoiser.get_submodule(path), attribute, len(kept))


def _narrow(module: nn.Linear, span: Span, axis: int, kept: Tensor, units: int) -> None:
    entries = walk.unit_entries(kept, units, module.weight.shape[axis], span.copies).to(module.weight.device)
    module.weight = nn.Parameter(module.weight.detach().index_select(axis, entries), requires_grad=False)
    if axis == 0:
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[entries], requires_grad=False)
        module.out_features = len(entries)
    else:
        module.in_features = len(entries)
