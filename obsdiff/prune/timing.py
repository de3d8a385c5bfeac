"""How long a block takes at each width, on the device at hand: what `--target-speedup` trades error against."""

import contextlib
import copy
import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from obsdiff.errors import InputError
from obsdiff.files import cache_folder, read_json, write_json
from obsdiff.models import ModelSpec, walk
from obsdiff.models.shrink import shrink_block
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

    Blocks of one shape are measured once. `block_inputs` are recorded keyword arguments by block. What a width gains
    is kept in `cache_file()` for later prunes on this device: then only the full width is measured again, since a
    machine's speed drifts and a block's ratios do not.
    """
    tables: dict[str, dict[int, float]] = {}
    kept = _read_cache()
    found = {}
    for stage in stages:
        assert stage.group
        block = walk.blocks_of(denoiser, spec)[stage.block].module
        units = walk.unit_count(block, stage.group)
        inputs = block_inputs[stage.block]
        key = _key(block, stage, inputs)
        if key not in tables:
            widths = sorted({max(1, round(units * share)) for share in SHARES}, reverse=True)
            ratios = kept[key] if key in kept and kept[key].keys() == set(widths) else {}
            measured = [width for width in widths if not ratios or width == units]
            blocks = [_narrowed(block, stage, width) for width in measured]
            times = dict(zip(measured, timer([_caller(block, inputs) for block in blocks]), strict=True))
            tables[key] = {width: times[units] * ratios[width] for width in ratios} or times
            kept[key] = {width: time / times[units] for width, time in tables[key].items()}
        found[stage.name] = tables[key]
    _write_cache(kept)
    return found


def cache_file() -> Path:
    """Where block timings are kept."""
    return cache_folder("latency.json")


def _key(block: nn.Module, stage: Stage, inputs: Mapping[str, Any]) -> str:
    """What a block's timings hang on: the device, torch, and every shape and dtype."""
    assert stage.group
    first = next(block.parameters())
    device = torch.cuda.get_device_name(first.device) if first.is_cuda else f"{platform.machine()} cpu"
    parts = [stage.group.name, type(block).__name__, device, torch.__version__, str(torch.get_num_threads())]
    parts += [f"{name} {p.dtype} {tuple(p.shape)}" for name, p in block.named_parameters()]
    parts += [f"{name} {tuple(v.shape)}" for name, v in sorted(inputs.items()) if isinstance(v, torch.Tensor)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_cache() -> dict[str, dict[int, float]]:
    """Ratios to the full width, by key and width; nothing from a file that is missing or damaged."""
    try:
        return TypeAdapter(dict[str, dict[int, float]]).validate_python(read_json(cache_file()))
    except (InputError, ValidationError):
        return {}


def _write_cache(kept: Mapping[str, Mapping[int, float]]) -> None:
    with contextlib.suppress(OSError):  # a home that cannot be written to costs a measurement the next time
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), kept)


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


def _narrowed(block: nn.Module, stage: Stage, width: int) -> nn.Module:
    """A copy of the stage's block with the first `width` units of its group."""
    assert stage.group
    narrow = copy.deepcopy(block)
    shrink_block(narrow, stage.group, list(range(width)))
    return narrow
