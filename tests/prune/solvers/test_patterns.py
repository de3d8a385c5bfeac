"""Patterns: what they allow, and that a mask keeps the best entries and exactly as many as it may."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obsdiff.prune.solvers.patterns import (
    NM,
    Unstructured,
    best_mask,
    check_width,
    is_nm,
    kept_count,
    nm_mask,
    parse_nm,
    pattern_mask,
)

properties = settings(deadline=None, max_examples=50)


@st.composite
def nm_patterns(draw: st.DrawFn) -> NM:
    m = draw(st.integers(2, 16))
    return NM(draw(st.integers(1, m - 1)), m)


@st.composite
def scores(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    """Few different values, so that there are many ties, zeros among them."""
    values = draw(st.lists(st.integers(0, 5), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns)


@properties
@given(nm_patterns(), st.data())
def test_an_nm_mask_keeps_exactly_the_n_best_of_every_m(pattern: NM, data: st.DataObject) -> None:
    score = data.draw(scores(data.draw(st.integers(1, 3)), pattern.m * data.draw(st.integers(1, 4))))
    mask = nm_mask(score, pattern)
    assert mask.shape == score.shape
    assert mask.dtype == torch.bool
    for group, kept in zip(score.reshape(-1, pattern.m), mask.reshape(-1, pattern.m), strict=True):
        assert kept.sum() == pattern.n
        assert group[kept].min() >= group[~kept].max()
    assert is_nm(mask, pattern)


@properties
@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_a_best_mask_keeps_exactly_the_best_of_every_row_despite_ties(
    rows: int, columns: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, columns))
    score = data.draw(scores(rows, columns))
    mask = best_mask(score, count)
    assert mask.sum(1).tolist() == [count] * rows
    if 0 < count < columns:
        for row, kept in zip(score, mask, strict=True):
            assert row[kept].min() >= row[~kept].max()


@properties
@given(st.floats(0.001, 0.999), st.integers(1, 6), st.integers(1, 30), st.data())
def test_an_unstructured_mask_looks_at_the_whole_layer(
    sparsity: float, rows: int, columns: int, data: st.DataObject
) -> None:
    score = data.draw(scores(rows, columns))
    mask = pattern_mask(score, Unstructured(sparsity))
    assert mask.shape == score.shape
    kept = int(mask.sum())
    assert kept == kept_count(sparsity, score.numel())
    if 0 < kept < score.numel():
        assert score[mask].min() >= score[~mask].max()


@properties
@given(st.floats(0.001, 0.999), st.integers(1, 10_000))
def test_what_goes_is_the_share_asked_for_and_never_more(sparsity: float, entries: int) -> None:
    gone = entries - kept_count(sparsity, entries)
    assert gone <= sparsity * entries + 1e-6
    assert gone > sparsity * entries - 1


@pytest.mark.parametrize(("sparsity", "entries", "kept"), [(0.3, 10, 7), (0.7, 10, 3), (0.1, 30, 27), (0.29, 100, 71)])
def test_round_off_does_not_cost_an_entry(sparsity: float, entries: int, kept: int) -> None:
    assert kept_count(sparsity, entries) == kept


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_a_share_outside_0_and_1_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1 \(both excluded\)"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (1, 0), (2, -4)])
def test_n_must_be_at_least_one_and_smaller_than_m(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="N of N:M must be at least 1 and smaller than M"):
        NM(n, m)


@properties
@given(nm_patterns())
def test_a_pattern_written_and_read_is_the_same(pattern: NM) -> None:
    assert parse_nm(str(pattern)) == pattern
    assert pattern.sparsity == pytest.approx((pattern.m - pattern.n) / pattern.m)


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2:4:8", "a:b", "2.0:4", " 2:4", "2:4\n", "-2:4", "4:2", "4:4"])
def test_other_text_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match="N:M"):
        parse_nm(text)


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    check_width(NM(2, 4), 8)
    check_width(Unstructured(0.5), 7)
    with pytest.raises(ValueError, match="the input dimension 10 is not a multiple of 4, so 2:4 does not fit"):
        check_width(NM(2, 4), 10)


@pytest.mark.parametrize(
    ("row", "valid"),
    [
        ([1, 1, 0, 0, 0, 0, 1, 1], True),
        ([1, 0, 0, 0, 0, 0, 0, 0], True),
        ([0, 1, 1, 1, 0, 0, 0, 0], False),
        ([0, 0, 1, 1, 1, 1, 0, 0], True),
        ([1, 1, 0, 0, 0, 0], False),
    ],
)
def test_whether_a_mask_is_2_4_is_counted_in_aligned_groups(row: list[int], valid: bool) -> None:
    mask = torch.tensor([row, row]) > 0
    assert is_nm(mask, NM(2, 4)) == valid
