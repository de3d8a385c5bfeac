"""Hessians: the weighted mean of x xᵀ, however the tokens come in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.prune.hessian import Hessian, mean


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.floats(0.1, 2)), min_size=1, max_size=5), st.integers(0)
)
def test_it_is_the_weighted_mean_written_out(calls: list[tuple[int, int, float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    hessian = Hessian(4)
    total, inputs, weight = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0.0
    for batch, tokens, alpha in calls:
        x = torch.randn(batch, tokens, 4, generator=generator)
        hessian.add(x, alpha)
        for token in x.reshape(-1, 4).double():
            total += alpha * torch.outer(token, token)
            inputs += alpha * token
            weight += alpha
    found = mean([hessian])
    torch.testing.assert_close(found.hessian, (total / weight).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean, (inputs / weight).float(), rtol=1e-4, atol=1e-5)


def test_a_step_counts_by_its_weight() -> None:
    hessian = Hessian(2)
    hessian.add(torch.tensor([[1.0, 0.0]]), alpha=3)
    hessian.add(torch.tensor([[0.0, 2.0]]), alpha=1)
    assert torch.equal(mean([hessian]).hessian, torch.tensor([[0.75, 0.0], [0.0, 1.0]]))
    assert torch.equal(mean([hessian]).mean, torch.tensor([0.75, 0.5]))


def test_several_together_are_what_one_would_have_seen() -> None:
    x = torch.randn(6, 3)
    one, first, second = Hessian(3), Hessian(3), Hessian(3)
    one.add(x[:2], 1.2)
    one.add(x[2:], 0.8)
    first.add(x[:2], 1.2)
    second.add(x[2:], 0.8)
    apart = first.total.clone()
    torch.testing.assert_close(mean([first, second]).hessian, mean([one]).hessian)
    torch.testing.assert_close(mean([first, second]).mean, mean([one]).mean)
    assert torch.equal(first.total, apart), "the parts are left alone"


def test_tokens_are_counted_whatever_the_shape() -> None:
    x = torch.randn(2, 3, 5, 4)
    nested, flat = Hessian(4), Hessian(4)
    nested.add(x)
    flat.add(x.reshape(-1, 4))
    assert torch.equal(mean([nested]).hessian, mean([flat]).hessian)
    assert nested.weight == 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    hessian = Hessian(3)
    for part in x.split(10):
        hessian.add(part)
    found = mean([hessian])
    assert found.hessian.dtype == found.mean.dtype == torch.float32
    exact = x.double()
    torch.testing.assert_close(found.hessian.double(), exact.T @ exact / len(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean.double(), exact.mean(0), rtol=1e-4, atol=1e-4)


def test_float16_inputs_whose_squares_overflow_it_do_not_overflow() -> None:
    hessian = Hessian(2)
    hessian.add(torch.full((4, 2), 1000.0, dtype=torch.float16))
    assert torch.equal(mean([hessian]).hessian, torch.full((2, 2), 1e6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_raise(value: float) -> None:
    hessian = Hessian(2)
    hessian.add(torch.ones(3, 2))
    hessian.add(torch.tensor([[1.0, value]]))
    with pytest.raises(ValueError, match="got NaN or infinity as input during calibration"):
        mean([hessian])


def test_never_called_raises() -> None:
    with pytest.raises(ValueError, match="was never called during calibration"):
        mean([Hessian(2)])
    empty = Hessian(2)
    empty.add(torch.ones(0, 2))
    with pytest.raises(ValueError, match="was never called during calibration"):
        mean([empty, Hessian(2)])
