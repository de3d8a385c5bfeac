"""Scenarios on a clock that stands still but for drawing and sleeping."""

import json
import shutil
from pathlib import Path

import pytest

from obsdiff.errors import InputError
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
        run_scenario("fashion", "offline", **options)
