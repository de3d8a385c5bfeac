"""The five weightings: their formulas, their ends, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.prune.recipe import Recipe
from obsdiff.prune.timesteps import (
    WEIGHTINGS,
    linear_decrease,
    linear_increase,
    log_decrease,
    log_increase,
    uniform,
)

FUNCTIONS = (log_decrease, log_increase, linear_decrease, linear_increase, uniform)


def test_the_recipe_knows_the_same_names() -> None:
    assert set(WEIGHTINGS) == set(Recipe.model_fields["timestep_weighting"].annotation.__args__)
    assert set(WEIGHTINGS.values()) == set(FUNCTIONS)


@given(st.integers(2, 200))
def test_log_decrease_is_the_formula_of_the_paper(steps: int) -> None:
    wanted = [0.8 + (1.2 - 0.8) / math.log(steps) * math.log(1 + (steps - 1 - i)) for i in range(steps)]
    assert log_decrease(steps).tolist() == pytest.approx(wanted)


@given(st.integers(2, 200), st.floats(0.1, 1), st.floats(1, 5))
def test_the_ends_are_high_and_low_and_all_between_goes_one_way(steps: int, low: float, high: float) -> None:
    for falling in (log_decrease(steps, low, high), linear_decrease(steps, low, high)):
        assert falling[0].item() == pytest.approx(high)
        assert falling[-1].item() == pytest.approx(low)
        assert (falling.diff() <= 1e-6).all()
        assert falling.sum() > 0.999 * steps * low
    for rising, falling in ((log_increase, log_decrease), (linear_increase, linear_decrease)):
        assert torch.equal(rising(steps, low, high), falling(steps, low, high).flip(0))


def test_the_defaults_lie_between_1_2_and_0_8() -> None:
    for falling in (log_decrease(25), linear_decrease(25)):
        assert falling[[0, -1]].tolist() == pytest.approx([1.2, 0.8])
    assert uniform(25).tolist() == pytest.approx([1.0] * 25)


def test_a_linear_weighting_has_even_steps_and_a_logarithm_falls_steeply_at_the_end() -> None:
    assert linear_decrease(5).tolist() == pytest.approx([1.2, 1.1, 1.0, 0.9, 0.8])
    steps = -log_decrease(25).diff()
    assert (steps.diff() > 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_weighting_gives_float32_and_one_weight_a_step(function: type) -> None:
    for steps in (1, 2, 3, 50):
        weights = function(steps)
        assert weights.shape == (steps,)
        assert weights.dtype == torch.float32
        assert (weights >= 0.8 - 1e-6).all()
        assert (weights <= 1.2 + 1e-6).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("arguments", [(0,), (-1,), (5, 0.0, 1.0), (5, -0.5, 1.0), (5, 1.2, 0.8), (5, math.nan, 1.0)])
def test_bad_input_is_refused(function: type, arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="needs num_steps >= 1 and 0 < low <= high"):
        function(*arguments)
