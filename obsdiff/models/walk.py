"""A spec applied to a denoiser: which linears it has, in which order, and which units they share."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.models import layers
from obsdiff.models.layers import Layer
from obsdiff.models.spec import Blocks, Group, GroupRecord, ModelSpec, Span


@dataclass(frozen=True)
class Block:
    """A block of the denoiser: its number in forward order, its full name, and what the spec says of its kind."""

    number: int
    name: str
    module: nn.Module
    kind: Blocks

    def full(self, linear: str) -> str:
        return f"{self.name}.{linear}"


@dataclass(frozen=True)
class Stage:
    """Linears of one block that run in parallel: tuples of full names, each tuple sharing one input.

    With a `group`, the linears are those that read the group's units: solving means removing units.
    """

    block: int
    linears: tuple[tuple[str, ...], ...]
    group: Group | None = None
    parent: str = ""  # the full name of the block

    @property
    def name(self) -> str:
        return f"{self.parent}.{self.group.name}" if self.group else self.linears[0][0]

    @property
    def touched(self) -> list[str]:
        """Full names of all linears that solving the stage may change."""
        if self.group:
            return [f"{self.parent}.{name}" for name in self.group.linears]
        return [name for shared in self.linears for name in shared]


def parse_blocks(text: str, count: int) -> range:
    """`A:B` as Python slices read it, negative numbers and missing ends included, over `count` blocks."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    if not match:
        raise InputError(f"--blocks {text}: write A:B, for example 1:-1 for all but the first and the last")
    chosen = range(count)[slice(*(int(end) if end else None for end in match.groups()))]
    if not chosen:
        hint = "; structured pruning leaves out the first and the last unless told otherwise" if text == "1:-1" else ""
        raise InputError(f"--blocks {text} selects none of the {count} blocks{hint}: --blocks : takes all")
    return chosen


def linear(denoiser: nn.Module, name: str) -> Layer:
    """The linear or convolution of that full name. Raises InputError when nothing or something else is there."""
    if not has(denoiser, name):
        raise InputError(f"{name} is not there: the denoiser has no such linear")
    module = denoiser.get_submodule(name)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
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


def blocks_of(denoiser: nn.Module, spec: ModelSpec) -> list[Block]:
    """The denoiser's blocks in forward order. Raises InputError when it has none of those that the spec names."""
    found: list[tuple[str, nn.Module, Blocks]] = []
    for kind in spec.blocks:
        there = denoiser.get_submodule(kind.path) if has(denoiser, kind.path) else nn.ModuleList()
        if isinstance(there, nn.ModuleList):
            found += [(f"{kind.path}.{number}", module, kind) for number, module in enumerate(there)]
        else:
            found.append((kind.path, there, kind))
    if not found:
        raise InputError(f"the denoiser has no {spec.blocks[0].path}: it is not built as {spec.title} is")
    return [Block(number, *entry) for number, entry in enumerate(found)]


def linear_stages(
    denoiser: nn.Module, spec: ModelSpec, blocks: str = ":", include: str = "", exclude: str = ""
) -> list[Stage]:
    """The prunable linears in forward order, by blocks and by regular expressions on their full names."""
    stages, every = [], blocks_of(denoiser, spec)
    for block in (every[k] for k in parse_blocks(blocks, len(every))):
        for stage in block.kind.layers:
            sets = [[name for name in map(block.full, shared) if _wanted(name, include, exclude)] for shared in stage]
            present = [tuple(name for name in shared if has(denoiser, name)) for shared in sets]
            if any(present):
                stages.append(Stage(block.number, tuple(shared for shared in present if shared), parent=block.name))
    if not stages:
        raise InputError(f"no linear matches --include {include!r} and --exclude {exclude!r}")
    return stages


def group_stages(
    denoiser: nn.Module, spec: ModelSpec, blocks: str = ":", include: str = "", exclude: str = ""
) -> list[Stage]:
    """The groups of heads and neurons in forward order; include and exclude match the group's full name."""
    stages, every = [], blocks_of(denoiser, spec)
    for block in (every[k] for k in parse_blocks(blocks, len(every))):
        for group in block.kind.groups:
            columns = [block.full(span.linear) for span in group.columns]
            present = tuple((name,) for name in columns if has(denoiser, name) and not is_tied(block.module, group))
            if present and _wanted(block.full(group.name), include, exclude):
                _check_group(block, group)
                stages.append(Stage(block.number, present, group, block.name))
    if not stages:
        raise InputError(f"no group of heads or neurons matches --include {include!r} and --exclude {exclude!r}")
    return stages


def _check_group(block: Block, group: Group) -> None:
    """Raises InputError that names the linear whose rows or columns are no whole number of the group's units."""
    if group.count and not has(block.module, group.count):
        raise InputError(f"{block.full(group.count)} is not there, so the {group.kind} cannot be counted")
    for span, axis in spans_of(block.module, group):
        try:
            span_entries(block.module, group, span, axis, torch.arange(0))
        except InputError as error:  # it names what it is about within the block
            raise InputError(f"{block.name}.{error}") from None


def is_tied(block: nn.Module, group: Group) -> bool:
    """Whether the block has what the group's units cannot go with (Group.unless)."""
    return bool(group.unless) and has(block, group.unless)


def tied_heads(denoiser: nn.Module, spec: ModelSpec) -> str:
    """Why no head can go though the family has groups of heads; empty when some can, or the family has none."""
    pairs = [(b, g) for b in blocks_of(denoiser, spec) for g in b.kind.groups if g.kind == "heads"]
    tied = [block.full(group.unless) for block, group in pairs if is_tied(block.module, group)]
    return f"{tied[0]} works on all heads together" if tied and len(tied) == len(pairs) else ""


def _wanted(name: str, include: str, exclude: str) -> bool:
    try:
        return bool(re.search(include, name)) and not (exclude and re.search(exclude, name))
    except re.error as error:
        raise InputError(f"--include/--exclude: not a regular expression: {error}") from None


def unit_count(block: nn.Module, group: Group) -> int:
    """How many units (heads or neurons) the group has in that block."""
    return int(attrgetter(group.count)(block)) if group.count else _extent(block, group.columns[0], 1)[1]


def _extent(block: nn.Module, span: Span, axis: int) -> tuple[int, int]:
    """Where the span starts on its linear's axis (rows 0, columns 1), and how long it is."""
    layer = linear(block, span.linear)
    start, end = (sum(int(attrgetter(name)(block)) for name in names) for names in (span.after, span.before))
    return start, (layer.weight.shape[0] if axis == 0 else layers.width(layer)) - start - end


def span_entries(block: nn.Module, group: Group, span: Span, axis: int, units: Tensor) -> Tensor:
    """The entries of the linear's axis (rows 0, columns 1) that belong to those units, in order.

    units int64 [k]; returns int64. Raises InputError when the group's units do not divide the span.
    """
    start, length = _extent(block, span, axis)
    of = unit_count(block, group)
    if length <= 0 or of < 1 or length % (of * span.copies):
        side = ("rows", "columns")[axis]
        raise InputError(f"{span.linear}: {length} {side} cannot hold {of} {group.kind}: an unusual model")
    return start + unit_entries(units, of, length, span.copies)


def unit_entries(units: Tensor, of: int, length: int, copies: int = 1) -> Tensor:
    """The entries of an axis of `length` that belong to those units, in order.

    units int64 [k]; an axis has `copies` equal parts, each of `of` units. Returns int64 [k * length / of].
    """
    size = length // (of * copies)
    starts = units[None, :, None] * size + torch.arange(copies)[:, None, None] * (length // copies)
    return (starts + torch.arange(size)).flatten()


def spans_of(block: nn.Module, group: Group) -> list[tuple[Span, int]]:
    """The group's spans that the block has, each with its axis (rows 0, columns 1)."""
    pairs = [(span, 0) for span in group.rows] + [(span, 1) for span in group.columns]
    return [(span, axis) for span, axis in pairs if has(block, span.linear)]


def reader_spans(block: nn.Module, group: Group) -> list[range]:
    """The columns of the group's units in each linear that reads them and that the block has."""
    extents = [_extent(block, span, axis) for span, axis in spans_of(block, group) if axis == 1]
    return [range(start, start + length) for start, length in extents]


def find_group(denoiser: nn.Module, spec: ModelSpec, record: GroupRecord) -> tuple[Block, Group]:
    """The block and group of a record. Raises InputError when it does not fit the denoiser."""
    blocks = blocks_of(denoiser, spec)
    block = blocks[record.block] if 0 <= record.block < len(blocks) else None
    group = next((group for group in block.kind.groups if group.name == record.name), None) if block else None
    there = block and group and all(has(block.module, span.linear) for span in group.columns[:1])
    if not block or not group or not there or is_tied(block.module, group):
        where = block.full(record.name) if block else f"{spec.blocks[0].path}.{record.block}.{record.name}"
        raise InputError(f"{where}: the {spec.title} family has no such group there")
    units, distinct = unit_count(block.module, group), set(record.kept)
    if units != record.of or len(distinct) != len(record.kept) or not distinct or not distinct <= set(range(units)):
        raise InputError(f"{block.full(record.name)}: keeps {record.kept} of {record.of}, but the denoiser has {units}")
    return block, group


def kept_entries(
    denoiser: nn.Module, spec: ModelSpec, groups: Iterable[GroupRecord]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows and columns (int64) that are left of every linear that lost some when these units went, by full name."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for record in groups:
        block, group = find_group(denoiser, spec, record)
        gone = gone_units(record)
        for span, axis in spans_of(block.module, group):
            name = block.full(span.linear)
            if name not in kept:
                kept[name] = tuple(torch.arange(size) for size in layers.matrix_shape(linear(denoiser, name)))  # type: ignore[assignment]
            left = list(kept[name])
            entries = span_entries(block.module, group, span, axis, gone)
            left[axis] = left[axis][~torch.isin(left[axis], entries)]
            kept[name] = (left[0], left[1])
    return kept


def gone_units(record: GroupRecord) -> Tensor:
    """int64 indexes of the units that a record removes."""
    return torch.tensor(sorted(set(range(record.of)) - set(record.kept)), dtype=torch.int64)
