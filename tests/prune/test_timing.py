"""Timing: what is measured, how often and in which order; the numbers themselves are the machine's."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from obsdiff.models import walk
from obsdiff.models.source import find_source, load_denoiser
from obsdiff.prune.calibration import Collector, run_batches
from obsdiff.prune.survey import Probe
from obsdiff.prune.timing import SHARES, cache_file, interleaved, interpolate, time_groups

from .runs import make_run


class Counted:
    """A timer that is no clock: every function is called once, and takes as long as its place in the call, reversed."""

    def __init__(self) -> None:
        self.measured: list[int] = []

    def __call__(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        for function in functions:
            function()
        self.measured.append(len(functions))
        return [float(len(functions) - k) for k in range(len(functions))]


def test_functions_are_called_in_turn_after_two_warm_ups() -> None:
    called: list[str] = []
    times = interleaved([lambda: called.append("a"), lambda: called.append("b")], runs=3)
    assert called == ["a", "b"] * 5
    assert len(times) == 2
    assert all(0 <= taken < 1000 for taken in times)


def test_what_takes_longer_is_told_apart_though_single_runs_are_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("obsdiff.prune.timing._now", lambda: clock[0])
    runs = iter(range(100))

    def slow() -> None:
        clock[0] += 0.002 if next(runs) != 4 else 3.0  # once something else takes the machine

    def fast() -> None:
        clock[0] += 0.001

    assert interleaved([slow, fast], runs=5) == pytest.approx([2, 1])


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 64), st.floats(0.01, 100), min_size=2, max_size=6))
def test_a_narrower_block_never_counts_as_slower(table: dict[int, float]) -> None:
    times = [interpolate(table, units) for units in range(max(table) + 1)]
    assert all(slow >= fast * (1 - 1e-9) for fast, slow in pairwise(times))
    for units in sorted(table):
        assert times[units] == pytest.approx(max(time for width, time in table.items() if width <= units))


@pytest.mark.parametrize(("units", "time"), [(0, 1), (8, 1), (10, 1.5), (12, 2), (14, 3), (16, 4), (20, 4)])
def test_widths_between_measured_ones_lie_on_a_line(units: int, time: float) -> None:
    assert interpolate({16: 4.0, 12: 2.0, 8: 1.0}, units) == time


def test_blocks_of_one_shape_are_measured_once(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, pattern="structured", blocks=":")
    stages = walk.group_stages(run.denoiser, run.spec)
    timer, sizes = Counted(), [p.shape for p in run.denoiser.parameters()]
    tables = time_groups(run.denoiser, run.spec, stages, Probe(run).block_inputs, timer)
    assert tables.keys() == {stage.name for stage in stages}
    assert timer.measured == [4] * len(stages), "three blocks of three shapes: each has its own"
    assert [p.shape for p in run.denoiser.parameters()] == sizes, "the denoiser itself stays as it is"
    for stage in stages:
        assert stage.group
        units = walk.unit_count(run.denoiser.get_submodule(stage.parent), stage.group)
        assert tables[stage.name] == {round(units * share): 4.0 - k for k, share in enumerate(SHARES)}


def test_the_embedded_models_blocks_have_few_shapes(tmp_path: Path) -> None:
    denoiser = load_denoiser(find_source("fashion"), torch.float32)
    run = make_run("fashion", tmp_path, pattern="structured", blocks=":", num_prompts=2)
    stages = walk.group_stages(denoiser, run.spec)
    timer = Counted()
    time_groups(run.denoiser, run.spec, stages, Probe(run).block_inputs, timer)
    shapes = {
        (s.group.name, *(p.shape for p in walk.blocks_of(denoiser, run.spec)[s.block].module.parameters()))
        for s in stages
        if s.group
    }
    assert len(timer.measured) == len(shapes) < len(stages)


def test_what_a_width_gains_is_measured_once_a_device(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path / "cache"))
    run = make_run(tiny_sd3, tmp_path, pattern="structured", blocks=":")
    stages, inputs = walk.group_stages(run.denoiser, run.spec), Probe(run).block_inputs
    first = time_groups(run.denoiser, run.spec, stages, inputs, Counted())
    again = Counted()
    second = time_groups(run.denoiser, run.spec, stages, inputs, lambda functions: [8 * t for t in again(functions)])
    assert again.measured == [1] * len(stages), "the full width alone"
    for name, table in second.items():
        assert table == pytest.approx(
            {width: time * 8 / max(first[name].values()) for width, time in first[name].items()}
        )
    with_other_inputs = {k: {**v, "hidden_states": v["hidden_states"][:, :2]} for k, v in inputs.items()}
    other = Counted()
    time_groups(run.denoiser, run.spec, stages, with_other_inputs, other)
    assert other.measured == [4] * len(stages), "fewer tokens are another question"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": {"x": 1}}'])
def test_a_damaged_latency_cache_is_measured_anew(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path))
    cache_file().write_text(content)
    run = make_run(tiny_sd3, tmp_path, pattern="structured", blocks="0:1")
    timer = Counted()
    stages = walk.group_stages(run.denoiser, run.spec, "0:1")
    time_groups(run.denoiser, run.spec, stages, Probe(run).block_inputs, timer)
    assert timer.measured == [4] * len(stages)
    assert len(json.loads(cache_file().read_text())) == len(stages)


def test_a_probe_feels_a_change_and_puts_it_back(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, solver="obs")
    before = {name: tensor.clone() for name, tensor in run.denoiser.state_dict().items()}
    probe = Probe(run)
    name = "transformer_blocks.1.ff.net.2.weight"
    assert probe.error({name: before[name]}) == 0
    half, none = (probe.error({name: before[name] * share}) for share in (0.5, 0.0))
    assert 0 < half < none < 1.5
    assert all(torch.equal(tensor, before[key]) for key, tensor in run.denoiser.state_dict().items())
    linears = {key for key, module in run.denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert probe.tokens.keys() <= linears
    assert probe.tokens["transformer_blocks.1.attn.to_q"] > probe.tokens["transformer_blocks.1.attn.add_q_proj"] > 0
    assert probe.block_inputs.keys() == {0, 1, 2}


def test_a_probe_leaves_no_hook_behind(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, solver="obs")
    Probe(run)
    calls: list[int] = []
    run.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    run_batches(run, Collector(run, []))
    assert calls
    assert not any(module._forward_pre_hooks for name, module in run.denoiser.named_modules() if name)
