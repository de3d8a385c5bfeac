"""Ratios of times that were taken in turn, and of those that were not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.measure.ratios import median_ratio, paired_ratio

TIMES = st.lists(st.floats(0.1, 10), min_size=1, max_size=30)


@given(TIMES, st.floats(0.1, 10))
def test_what_slows_both_down_cancels(first: list[float], ratio: float) -> None:
    found, interval = paired_ratio(first, [one / ratio for one in first])
    assert found == pytest.approx(ratio)
    assert interval is None or interval == pytest.approx((ratio, ratio))
    assert (interval is None) == (len(first) < 6)


@given(TIMES, TIMES)
def test_the_interval_holds_the_ratio(first: list[float], other: list[float]) -> None:
    for found, interval in (paired_ratio(first, other), median_ratio(first, other)):
        assert found > 0
        if interval:
            assert interval[0] <= interval[1]
            assert min(first) / max(other) <= interval[0]
            assert interval[1] <= max(first) / min(other)
    found, interval = paired_ratio(first, other)
    assert interval is None or interval[0] <= found <= interval[1]


@pytest.mark.parametrize(("count", "place"), [(6, 0), (8, 0), (9, 1), (10, 1), (20, 5), (50, 17), (100, 39)])
def test_the_interval_is_the_tables(count: int, place: int) -> None:
    """The places are those of the sign test's tables, counted from 0."""
    ratios = np.arange(1, count + 1)
    assert paired_ratio(ratios, [1.0] * count)[1] == (ratios[place], ratios[-place - 1])


def test_a_run_that_has_none_beside_it_does_not_count() -> None:
    assert paired_ratio([2.0, 2.0, 50.0], [1.0, 1.0])[0] == 2


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(200):
        drift = np.exp(draw.normal(0, 0.5, 15))
        first, other = (side * drift * np.exp(draw.normal(0, 0.1, 15)) for side in (1.5, 1.0))
        pair = (
            paired_ratio(first, other)[1],
            median_ratio(draw.lognormal(0, 0.2, 15) * 1.5, draw.lognormal(0, 0.2, 15))[1],
        )
        hits += [found is not None and found[0] <= 1.5 <= found[1] for found in pair]
    assert hits[0] >= 0.93 * 200
    assert hits[1] >= 0.90 * 200
