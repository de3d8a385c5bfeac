"""Removes pruned heads and neurons for good: narrower layers instead of zeros."""

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn

from obsdiff.models import Group, GroupRecord, ModelSpec, walk


def shrink(denoiser: nn.Module, spec: ModelSpec, groups: Iterable[GroupRecord]) -> None:
    """Narrows the denoiser in place to the units that each record keeps; works on the meta device too.

    Outputs stay the same to round-off when the units that go are zero in every projection that reads them.
    Raises InputError for a record that does not fit the denoiser.
    """
    for record in groups:
        block, group = walk.find_group(denoiser, spec, record)
        shrink_block(block.module, group, sorted(record.kept))


def shrink_block(block: nn.Module, group: Group, kept: list[int]) -> None:
    """Narrows one block in place to those units of one of its groups."""
    units = walk.unit_count(block, group)
    gone = torch.tensor(sorted(set(range(units)) - set(kept)), dtype=torch.int64)
    cuts = [
        (span, axis, walk.span_entries(block, group, span, axis, gone)) for span, axis in walk.spans_of(block, group)
    ]
    for span, axis, entries in cuts:
        _narrow(block.get_submodule(span.linear), axis, entries)
    for name in (*((group.count,) if group.count else ()), *group.scaled):
        path, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(path), attribute, attrgetter(name)(block) * len(kept) // units)


def _narrow(module: nn.Module, axis: int, gone: Tensor) -> None:
    """Takes those rows or columns out of a linear or a convolution of one tap; rows of a depthwise one too."""
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    left = torch.ones(module.weight.shape[axis], dtype=torch.bool)
    left[gone] = False
    entries = left.nonzero().flatten().to(module.weight.device)
    module.weight = nn.Parameter(module.weight.detach().index_select(axis, entries), requires_grad=False)
    if axis == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[entries], requires_grad=False)
    ends = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
    setattr(module, ends[axis], len(entries))
    if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise: one input channel a row
        module.groups = module.in_channels = len(entries)
