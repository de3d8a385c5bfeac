"""How long a block takes at each width, on the device at hand: what `--target-speedup` trades error against."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from obsdiff.models import GroupRecord, ModelSpec, walk
from obsdiff.models.shrink import shrink
from obsdiff.models.walk import Stage

RUNS = 15
SHARES = (1.0, 0.75, 0.5, 0.25)  # widths that are measured; those between them are interpolated

Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]
"""Takes functions, gives the milliseconds that each takes."""


def interleaved(functions: Sequence[Callable[[], Any]], runs: int = RUNS) -> list[float]:
    """The median milliseconds of each function over runs in turn, so that a machine's drift meets all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(-2, runs):
        for function, taken in zip(functions, times, strict=True):
            start = _now()
            function()
            if run >= 0:
                taken.append((_now() - start) * 1e3)
    return [sorted(taken)[len(taken) // 2] for taken in times]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_groups(
    denoiser: nn.Module,
    spec: ModelSpec,
    stages: Sequence[Stage],
    block_inputs: Mapping[int, Mapping[str, Any]],
    timer: Timer,
) -> dict[str, dict[int, float]]:
    """Milliseconds of the whole block by stage name and units left in that one group, all others at full width.

    Blocks of one shape are measured once. `block_inputs` are recorded keyword arguments by block.
    """
    tables: dict[Any, dict[int, float]] = {}
    found = {}
    for stage in stages:
        assert stage.group
        units = walk.unit_count(denoiser, spec, stage.block, stage.group)
        block = walk.blocks_of(denoiser, spec)[stage.block]
        shape = (stage.group.name, *((name, tuple(p.shape)) for name, p in block.named_parameters()))
        if shape not in tables:
            widths = sorted({max(1, round(units * share)) for share in SHARES}, reverse=True)
            blocks = [_narrowed(denoiser, spec, stage, units, width) for width in widths]
            inputs = block_inputs[stage.block]
            times = timer([_caller(block, inputs) for block in blocks])
            tables[shape] = dict(zip(widths, times, strict=True))
        found[stage.name] = tables[shape]
    return found


def interpolate(table: Mapping[int, float], units: int) -> float:
    """Milliseconds at a width between measured ones; a narrower block never counts as slower than a wider one."""
    widths = sorted(table)
    times = [max(table[width] for width in widths if width <= other) for other in widths]
    for low, high, fast, slow in zip(widths, widths[1:], times, times[1:], strict=False):
        if units <= high:
            return fast + (slow - fast) * max(units - low, 0) / (high - low)
    return times[-1]


def _caller(block: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return block(**inputs)

    return call


def _narrowed(denoiser: nn.Module, spec: ModelSpec, stage: Stage, units: int, width: int) -> nn.Module:
    """A copy of the stage's block with the first `width` units of its group."""
    assert stage.group
    lone = nn.Module()
    setattr(lone, spec.blocks, nn.ModuleList([copy.deepcopy(walk.blocks_of(denoiser, spec)[stage.block])]))
    record = GroupRecord(block=0, name=stage.group.name, kind=stage.group.kind, kept=list(range(width)), of=units)
    shrink(lone, spec, [record])
    return walk.blocks_of(lone, spec)[0]
