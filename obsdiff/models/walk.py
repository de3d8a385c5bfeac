"""A spec applied to a denoiser: which linears it has, in which order, and which units they share."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.models.spec import AXES, Group, GroupRecord, Input, ModelSpec


@dataclass(frozen=True)
class Stage:
    """Linears of one block that run in parallel: tuples of full names, each tuple sharing one input.

    With a `group`, the linears are those that read the group's units: solving means removing units.
    """

    block: int
    linears: tuple[tuple[str, ...], ...]
    group: Group | None = None

    @property
    def name(self) -> str:
        prefix = self.linears[0][0]
        return f"{prefix.split('.')[0]}.{self.block}.{self.group.name}" if self.group else prefix


def parse_blocks(text: str, count: int) -> range:
    """`A:B` as Python slices read it, negative numbers and missing ends included, over `count` blocks."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    if not match:
        raise InputError(f"--blocks {text}: write A:B, for example 1:-1 for all but the first and the last")
    chosen = range(count)[slice(*(int(end) if end else None for end in match.groups()))]
    if not chosen:
        raise InputError(f"--blocks {text} selects none of the {count} blocks")
    return chosen


def linear(denoiser: nn.Module, name: str) -> nn.Linear:
    """The linear of that full name. Raises InputError when nothing or something else is there."""
    if not has(denoiser, name):
        raise InputError(f"{name} is not there: the denoiser has no such linear")
    module = denoiser.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise InputError(
            f"{name} is a {type(module).__name__} where a Linear is expected: "
            "quantised or adapted checkpoints cannot be pruned; start from the full-precision weights"
        )
    return module


def has(denoiser: nn.Module, name: str) -> bool:
    try:
        return attrgetter(name)(denoiser) is not None
    except AttributeError:
        return False


def blocks_of(denoiser: nn.Module, spec: ModelSpec) -> nn.ModuleList:
    blocks = denoiser.get_submodule(spec.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def linear_stages(
    denoiser: nn.Module, spec: ModelSpec, blocks: str = ":", include: str = "", exclude: str = ""
) -> list[Stage]:
    """The prunable linears in forward order, by blocks and by regular expressions on their full names."""
    stages = []
    for block in parse_blocks(blocks, len(blocks_of(denoiser, spec))):
        for stage in spec.layers:
            sets = [
                [f"{spec.blocks}.{block}.{name}" for name in shared if _wanted(name, spec, block, include, exclude)]
                for shared in stage
            ]
            present = [tuple(name for name in shared if has(denoiser, name)) for shared in sets]
            if any(present):
                stages.append(Stage(block, tuple(shared for shared in present if shared)))
    if not stages:
        raise InputError(f"no linear matches --include {include!r} and --exclude {exclude!r}")
    return stages


def group_stages(
    denoiser: nn.Module, spec: ModelSpec, blocks: str = ":", include: str = "", exclude: str = ""
) -> list[Stage]:
    """The groups of heads and neurons in forward order; include and exclude match the group's full name."""
    stages = []
    for block in parse_blocks(blocks, len(blocks_of(denoiser, spec))):
        for group in spec.groups:
            columns = [f"{spec.blocks}.{block}.{span.linear}" for span in group.columns]
            present = tuple((name,) for name in columns if has(denoiser, name))
            if present and _wanted(group.name, spec, block, include, exclude):
                stages.append(Stage(block, present, group))
    if not stages:
        raise InputError(f"no group of heads or neurons matches --include {include!r} and --exclude {exclude!r}")
    return stages


def _wanted(name: str, spec: ModelSpec, block: int, include: str, exclude: str) -> bool:
    full = f"{spec.blocks}.{block}.{name}"
    try:
        return bool(re.search(include, full)) and not (exclude and re.search(exclude, full))
    except re.error as error:
        raise InputError(f"--include/--exclude: not a regular expression: {error}") from None


def unit_count(denoiser: nn.Module, spec: ModelSpec, block: int, group: Group) -> int:
    """How many units (heads or neurons) the group has in that block."""
    prefix = f"{spec.blocks}.{block}."
    if group.count:
        return int(attrgetter(prefix + group.count)(denoiser))
    return linear(denoiser, prefix + group.columns[0].linear).in_features


def unit_entries(units: Tensor, of: int, length: int, copies: int = 1) -> Tensor:
    """The entries of an axis of `length` that belong to those units, in order.

    units int64 [k]; an axis has `copies` equal parts, each of `of` units. Returns int64 [k * length / of].
    """
    size = length // (of * copies)
    starts = units[None, :, None] * size + torch.arange(copies)[:, None, None] * (length // copies)
    return (starts + torch.arange(size)).flatten()


def kept_entries(
    denoiser: nn.Module, spec: ModelSpec, groups: Iterable[GroupRecord]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows and columns (int64) that are left of every linear that lost some when these units went, by full name."""
    by_name = {group.name: group for group in spec.groups}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for record in groups:
        group, units = by_name[record.name], torch.tensor(record.kept)
        for spans, axis in ((group.rows, 0), (group.columns, 1)):
            for span in spans:
                name = f"{spec.blocks}.{record.block}.{span.linear}"
                if has(denoiser, name):
                    shape = linear(denoiser, name).weight.shape
                    left = list(kept.get(name, (torch.arange(shape[0]), torch.arange(shape[1]))))
                    left[axis] = unit_entries(units, record.of, shape[axis], span.copies)
                    kept[name] = (left[0], left[1])
    return kept


def shape_of(entry: Input, config: Mapping[str, Any], axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a graph input or output for values of the dynamic axes (batch, height, width, tokens)."""
    return tuple(
        axis if isinstance(axis, int) else axes[axis] if axis in AXES else int(config[axis]) for axis in entry.axes
    )


def random_inputs(
    spec: ModelSpec,
    config: Mapping[str, Any],
    axes: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of one denoiser call: standard normal, timesteps uniform between 0 and 1000."""
    generator = None if device == "meta" else torch.Generator().manual_seed(seed)
    where = "meta" if device == "meta" else "cpu"
    inputs = {}
    for entry in spec.inputs:
        shape = shape_of(entry, config, axes)
        if entry.name == "timestep":
            value = torch.rand(shape, generator=generator, device=where) * 1000
        else:
            value = torch.randn(shape, generator=generator, device=where)
        inputs[entry.name] = value.to(device, getattr(torch, entry.dtype) if entry.dtype else dtype)
    return inputs


class TensorDenoiser(nn.Module):
    """A diffusers denoiser as a function of tensors, in the spec's order, that returns one tensor."""

    def __init__(self, denoiser: nn.Module, spec: ModelSpec):
        super().__init__()
        self.denoiser = denoiser
        self.names = [entry.name for entry in spec.inputs]

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        return self.denoiser(**named, return_dict=False)[0]


def count_macs(denoiser: nn.Module, spec: ModelSpec, config: Mapping[str, Any], axes: Mapping[str, int]) -> int:
    """Multiply-accumulates of one denoiser call (products and attention), by torch's flop counter.

    The denoiser must live on the meta device: nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    inputs = random_inputs(spec, config, axes, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        TensorDenoiser(denoiser, spec)(*inputs.values())
    return counter.get_total_flops() // 2
