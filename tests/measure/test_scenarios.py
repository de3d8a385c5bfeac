"""Scenarios on a clock that stands still but for drawing and sleeping."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obsdiff.errors import InputError
from obsdiff.measure import scenarios
from obsdiff.measure.pairs import Pair
from obsdiff.measure.scenarios import drain, largest_batch, run_scenario
from obsdiff.models.source import MANIFEST


class Clock:
    """Drawing takes a second a batch, and a tenth more a picture."""

    def __init__(self) -> None:
        self.time = 100.0
        self.batches: list[tuple[float, int, int]] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds

    def draw(self, first: int, count: int) -> None:
        self.batches.append((round(self.time - 100, 6), first, count))
        self.time += 1 + 0.1 * count

    def drain(self, due: list[float], batch: int) -> list[float]:
        return drain(due, batch, self.draw, self.now, self.sleep)


class Clockwork:
    """Pipelines without weights: a slow one takes 2 seconds a batch and 0.2 a picture, a fast one half of that.

    `last` is the batch after which Ctrl-C is pressed.
    """

    def __init__(self) -> None:
        self.time, self.count = 100.0, 0
        self.last: int | None = None
        self.drawn: list[tuple[str, int]] = []

    def generate(self, pipe: str, prompts: list[str], *_rest: Any) -> None:
        if self.count == self.last:
            raise KeyboardInterrupt
        self.count += 1
        self.drawn.append((pipe, len(prompts)))
        self.time += (2 + 0.2 * len(prompts)) / (1 if pipe == "slow" else 2)

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    made = Clockwork()

    def pairs(paths: Any, backends: Any, *_rest: Any) -> list[Pair]:
        return [Pair(path, "auto", "torch", path, {}) for path in paths]

    monkeypatch.setattr(scenarios, "load_pairs", pairs)
    monkeypatch.setattr(scenarios, "check_paths", lambda *_: None)
    monkeypatch.setattr(scenarios, "known_prompt", lambda pipe, prompt: prompt)
    monkeypatch.setattr(scenarios, "generate", made.generate)
    monkeypatch.setattr(scenarios, "time", SimpleNamespace(perf_counter=lambda: made.time, sleep=made.sleep))
    return made


def test_a_single_stream_asks_when_it_is_answered() -> None:
    clock = Clock()
    assert clock.drain([0.0] * 3, 1) == pytest.approx([1.1, 2.2, 3.3])
    assert clock.batches == [(0, 0, 1), (1.1, 1, 1), (2.2, 2, 1)]


def test_offline_fills_its_batches() -> None:
    clock = Clock()
    clock.drain([0.0] * 10, 4)
    assert [count for *_, count in clock.batches] == [4, 4, 2]


def test_a_server_draws_together_what_waits_and_sleeps_when_nothing_does() -> None:
    clock = Clock()
    ends = clock.drain([0.5, 0.6, 0.7, 0.8, 1.7, 9.0], 3)
    assert clock.batches == [(0.5, 0, 1), (1.6, 1, 3), (2.9, 4, 1), (9.0, 5, 1)]
    assert ends == pytest.approx([1.6, 2.9, 2.9, 2.9, 4.0, 10.1])


def test_the_largest_batch_is_what_the_bundle_takes(tmp_path: Path, one_block_bundle: Path) -> None:
    assert largest_batch("fashion") == 8
    bundle = shutil.copytree(one_block_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text())
    for most, pictures in ((6, 3), (1, 1), (64, 8)):
        manifest["axes"]["batch"] |= {"min": 1, "opt": 1, "max": most}  # inputs, two a picture
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        assert largest_batch(bundle) == pictures


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"bound": 1.0}])
def test_options_of_another_scenario_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="go with --scenario server"):
        run_scenario(["fashion"], "offline", **options)


def test_the_first_changes_and_all_draw_as_many(clockwork: Clockwork) -> None:
    found = run_scenario(["slow", "fast"], "offline", requests=19, warmup=1)
    slow, fast = found["results"]
    drawn = [(name, count) for name, count in clockwork.drawn if count]
    assert drawn[:2] == [("slow", 8), ("fast", 8)]  # warm-ups
    assert drawn[2:] == [("slow", 8), ("fast", 8), ("fast", 8), ("slow", 8), ("slow", 3), ("fast", 3)]
    assert slow["images_per_second"] == pytest.approx(19 / (3 * 2 + 19 * 0.2))
    assert fast["ratio"] == pytest.approx(2)
    assert slow["p90_ms"] is None


def test_a_single_stream_is_judged_by_its_p90(clockwork: Clockwork) -> None:
    found = run_scenario(["slow", "fast"], "single-stream", requests=5, warmup=0)
    assert [row["p90_ms"] for row in found["results"]] == pytest.approx([2200, 1100])
    assert [row["ratio"] for row in found["results"]] == pytest.approx([1, 2])
    assert [row["requests"] for row in found["results"]] == [5, 5]
    assert (found["kind"], found["interrupted"]) == ("scenario", False)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("bound", [5.0, 8.0])
def test_a_search_finds_the_highest_rate_that_keeps_the_bound(clockwork: Clockwork, bound: float) -> None:
    found = run_scenario(["slow", "fast"], "server", bound=bound, requests=60, warmup=0)
    for row, most in zip(found["results"], (8 / 3.6, 8 / 1.8), strict=True):
        assert 0 < row["rate"] < most
        assert row["within_bound"] is True
        assert row["p99_ms"] <= bound * 1000
        kept = [probe["rate"] for probe in row["probes"] if probe["within_bound"]]
        missed = [probe["rate"] for probe in row["probes"] if not probe["within_bound"]]
        assert row["rate"] == max(kept)
        assert min(missed, default=most) - row["rate"] == pytest.approx(most / 64)
        assert row["p99_ms"] == next(probe["p99_ms"] for probe in row["probes"] if probe["rate"] == row["rate"])
        at_rate = run_scenario([row["path"]], "server", bound=bound, rate=row["rate"], requests=60, warmup=0)
        assert at_rate["results"][0]["p99_ms"] == pytest.approx(row["p99_ms"])
    assert found["results"][1]["ratio"] == found["results"][1]["rate"] / found["results"][0]["rate"] > 1


def test_a_bound_that_one_picture_does_not_keep_has_no_rate(clockwork: Clockwork) -> None:
    (row,) = run_scenario(["slow"], "server", bound=1.0, requests=10, warmup=0)["results"]
    assert (row["rate"], row["within_bound"], row["ratio"]) == (None, False, None)
    assert len(row["probes"]) == 6


@pytest.mark.parametrize(
    ("scenario", "options", "counts"),
    [("single-stream", {}, [3, 2]), ("offline", {}, [20, 16]), ("server", {"rate": 0.1}, [5])],
)
def test_ctrl_c_keeps_what_was_drawn(
    clockwork: Clockwork, scenario: str, options: dict[str, float], counts: list[int]
) -> None:
    clockwork.last = 5
    found = run_scenario(["slow", "fast"], scenario, requests=20, warmup=0, **options)
    assert found["interrupted"] is True
    assert [row["requests"] for row in found["results"]] == counts
    clockwork.last, clockwork.count = 0, 0
    with pytest.raises(KeyboardInterrupt):
        run_scenario(["slow", "fast"], scenario, requests=20, warmup=0, **options)


def test_ctrl_c_in_a_search_keeps_the_best_so_far(clockwork: Clockwork) -> None:
    clockwork.last = 100
    (row,) = run_scenario(["slow"], "server", bound=20.0, requests=60, warmup=0)["results"]
    assert row["rate"] == max(probe["rate"] for probe in row["probes"] if probe["within_bound"])
    assert row["requests"] == 60
    clockwork.last, clockwork.count = 3, 0
    (row,) = run_scenario(["slow"], "server", bound=20.0, requests=60, warmup=0)["results"]
    assert (row["rate"], row["within_bound"]) == (None, False)
