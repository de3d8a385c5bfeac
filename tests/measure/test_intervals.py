"""Bootstrap intervals: they hold the value, narrow with more pictures, and cover what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.measure.fashion import frechet_distance
from obsdiff.measure.intervals import distance_interval, mean_interval


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50), st.booleans())
def test_the_interval_holds_the_mean_and_stays_within_the_values(values: list[float], share: bool) -> None:
    mean, low, high = mean_interval(np.array(values), share=share and set(values) <= {0.0, 1.0})
    assert mean == pytest.approx(np.mean(values))
    assert low <= mean <= high
    if not share:
        slack = 1e-9 * max(map(abs, values)) + 1e-300
        assert min(values) - slack <= low <= high <= max(values) + slack


def test_the_interval_is_as_wide_as_theory_says_and_the_same_every_time() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    mean, low, high = mean_interval(values)
    error = values.std(ddof=1) / 20
    assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert mean_interval(values) == (mean, low, high)
    assert mean_interval(values, seed=1) != (mean, low, high)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    inside = [low <= 0 <= high for _, low, high in (mean_interval(draw.normal(size=60)) for _ in range(200))]
    assert 0.89 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize(("hit", "expected"), [(1.0, (1.0, 0.6915, 1.0)), (0.0, (0.0, 0.0, 0.3085))])
def test_all_hits_are_no_certainty(hit: float, expected: tuple[float, float, float]) -> None:
    assert mean_interval(np.full(10, hit), share=True) == pytest.approx(expected, abs=1e-4)


def test_one_value_alone_says_nothing_of_others() -> None:
    mean, low, high = mean_interval(np.array([3.0]))
    assert mean == 3
    assert np.isnan([low, high]).all()


def test_a_value_that_is_none_makes_none_and_no_value_is_refused() -> None:
    assert all(np.isnan(mean_interval(np.array([1.0, np.nan]))))
    with pytest.raises(ValueError, match="no value"):
        mean_interval(np.array([]))


def test_a_distance_has_an_interval_around_it_that_narrows() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (torch.randn(count, 8, generator=generator) for count in (40, 400))

    def span(reference: torch.Tensor) -> float:
        value, low, high = distance_interval(frechet_distance, reference + 1, reference)
        assert value == pytest.approx(8, rel=1e-3)  # of two clouds that are apart by 1 in each of 8 directions
        assert low <= value <= high
        other = reference + torch.randn(len(reference), 8, generator=generator)
        _, low, high = distance_interval(frechet_distance, other, reference)
        return high - low

    assert span(narrow) < span(wide)
