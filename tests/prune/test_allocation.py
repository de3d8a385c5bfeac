"""Allocation: the least error for a budget, and OWL's spread around a mean."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.prune.allocation import Level, allocate, owl

properties = settings(deadline=None, max_examples=150)


@st.composite
def convex_curves(draw: Any) -> dict[str, list[Level]]:
    """Up to 3 layers of up to 5 levels: costs fall, errors rise, each step dearer than the one before."""
    curves = {}
    for layer in range(draw(st.integers(1, 3))):
        costs = sorted(draw(st.sets(st.integers(0, 40), min_size=2, max_size=5)), reverse=True)
        slope, error, levels = 0.0, 0.0, []
        for k, cost in enumerate(costs):
            if k:
                slope += draw(st.integers(1, 9))
                error += slope * (costs[k - 1] - cost)
            levels.append(Level(k, cost, error))
        curves[str(layer)] = draw(st.permutations(levels))
    return curves


def totals(levels: Sequence[Level]) -> tuple[float, float]:
    return sum(level.cost for level in levels), sum(level.error for level in levels)


def best_error(curves: Mapping[str, Sequence[Level]], budget: float) -> float:
    """By trying every combination."""
    return min(error for cost, error in map(totals, product(*curves.values())) if cost <= budget)


def all_costs(curves: Mapping[str, Sequence[Level]]) -> list[float]:
    return sorted({totals(levels)[0] for levels in product(*curves.values())})


@properties
@given(convex_curves(), st.data())
def test_it_stays_within_the_budget_and_no_choice_that_saves_as_much_errs_less(
    curves: dict[str, list[Level]], data: st.DataObject
) -> None:
    budget = data.draw(st.sampled_from(all_costs(curves)))
    chosen = allocate(curves, budget)
    assert chosen.keys() == curves.keys()
    assert all(level in curves[name] for name, level in chosen.items())
    cost, error = totals(list(chosen.values()))
    assert cost <= budget
    assert error == pytest.approx(best_error(curves, cost)), "the best there is at the cost that was reached"


@properties
@given(convex_curves(), st.data())
def test_it_misses_the_optimum_by_its_last_step_at_most(curves: dict[str, list[Level]], data: st.DataObject) -> None:
    budget = data.draw(st.sampled_from(all_costs(curves)))
    chosen = allocate(curves, budget)
    last = max(
        (b.error - a.error for levels in curves.values() for a in levels for b in levels if b.amount == a.amount + 1),
        default=0.0,
    )
    assert best_error(curves, budget) <= totals(list(chosen.values()))[1] + 1e-9
    assert totals(list(chosen.values()))[1] <= best_error(curves, budget) + last + 1e-9


@properties
@given(convex_curves())
def test_a_smaller_budget_never_errs_less(curves: dict[str, list[Level]]) -> None:
    errors = [totals(list(allocate(curves, budget).values()))[1] for budget in all_costs(curves)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0, "with the whole budget nothing is pruned"


def test_a_layer_that_matters_more_is_pruned_less() -> None:
    def curve(weight: float) -> list[Level]:
        return [Level(k / 10, 10 - k, weight * k**2) for k in range(10)]

    chosen = allocate({"dull": curve(1), "vital": curve(5)}, 10)
    assert chosen["dull"].cost + chosen["vital"].cost == 10
    assert chosen["vital"].amount < chosen["dull"].amount


def test_levels_above_the_hull_are_never_taken() -> None:
    levels = [Level(0, 10, 0), Level(1, 9, 50), Level(2, 5, 4), Level(3, 4, 3.9), Level(4, 0, 60), Level(5, 5, 9)]
    taken = {allocate({"layer": levels}, budget)["layer"].amount for budget in range(11)}
    assert taken == {0, 3, 4}


def test_a_budget_that_cannot_be_reached_says_what_can() -> None:
    curves = {name: [Level(1, 10, 0), Level(0.5, 4, 1)] for name in "abc"}
    with pytest.raises(ValueError, match="even the most that may go leaves a cost of 12, more than 11"):
        allocate(curves, 11)
    assert totals(list(allocate(curves, 12).values())) == (12, 3)


def test_a_budget_that_is_the_floor_but_for_round_off_is_met() -> None:
    curves = {name: [Level(0, 1, 0), Level(0.7, 0.3, 1)] for name in "abc"}
    assert sum(0.3 for _ in "abc") > 0.3 * 3 - 1e-16
    assert {level.cost for level in allocate(curves, 0.9 - 1e-15).values()} == {0.3}


@properties
@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(0, 0.3), min_size=1, max_size=8),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.data(),
)
def test_owl_keeps_the_mean_and_gives_outliers_less_sparsity(
    outliers: dict[str, float], sparsity: float, data: st.DataObject
) -> None:
    sizes = {name: data.draw(st.integers(1, 10_000)) for name in outliers}
    found = owl(outliers, sizes, sparsity)
    mean = sum(found[name] * sizes[name] for name in found) / sum(sizes.values())
    assert mean == pytest.approx(sparsity)
    order = sorted(found, key=outliers.__getitem__)
    assert all(found[a] >= found[b] - 1e-12 for a, b in pairwise(order))
    spread = max(found.values()) - min(found.values())
    assert spread <= 0.16 + 1e-9
    low, high = min(outliers.values()), max(outliers.values())
    if high - low > 1e-6:
        assert spread == pytest.approx(0.16)
        slope = 0.16 / (high - low)
        assert all(
            math.isclose(found[a] - found[b], slope * (outliers[b] - outliers[a]), abs_tol=1e-6)
            for a in found
            for b in found
        )


def test_owl_with_equal_layers_is_uniform() -> None:
    assert owl({"a": 0.1, "b": 0.1}, {"a": 3, "b": 1}, 0.6) == {"a": 0.6, "b": 0.6}
