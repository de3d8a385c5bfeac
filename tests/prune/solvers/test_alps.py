"""ALPS: better than OBS on the inputs it solved for, and conjugate gradients that only ever lower the loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obsdiff.prune.solvers import NM, Pattern, Unstructured, relative_error
from obsdiff.prune.solvers.alps import alps, conjugate_gradients, refit
from obsdiff.prune.solvers.obs import obs

from ..layers import Layer, make_layer

PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7)]
properties = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 10**6)


def mask_of(rows: int, width: int, seed: int, share: float = 0.5) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < share


def unit_diagonal(layer: Layer, damping: float) -> Tensor:
    """The Hessian of inputs with a second moment of one, damped; float32."""
    scale = layer.hessian.diagonal().sqrt()
    return layer.hessian / scale / scale[:, None] + damping * torch.eye(len(scale))


def losses(weight: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """tr(½ W H Wᵀ − W Tᵀ) of each row, float64."""
    weight, target, hessian = weight.double(), target.double(), hessian.double()
    return (0.5 * (weight @ hessian) * weight - weight * target).sum(1)


def exact(target: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The minimum on the mask, row by row in float64."""
    found = torch.zeros_like(target, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if kept.any():
            found[row, kept] = torch.linalg.solve(hessian.double()[kept][:, kept], target.double()[row, kept])
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_it_errs_less_than_obs_on_correlated_inputs(pattern: Pattern, seed: int) -> None:
    layer = make_layer(32, 64, seed, tokens=4096)
    found = [
        relative_error(layer.weight, solver(layer.weight, layer.hessian, pattern)[0], layer.hessian)
        for solver in (alps, obs)
    ]
    assert found[0] < 0.97 * found[1]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_independent_inputs_need_no_compensation(pattern: Pattern) -> None:
    layer = make_layer(8, 32)
    hessian = torch.diag(torch.linspace(0.5, 2, 32))
    weight, mask = alps(layer.weight, hessian, pattern)
    torch.testing.assert_close(weight, layer.weight * mask, rtol=1e-4, atol=1e-5)
    score = layer.weight.abs() * hessian.diagonal().sqrt()
    assert (score * mask).square().sum() >= 0.999 * (score * obs(layer.weight, hessian, pattern)[1]).square().sum()


@properties
@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 12), st.floats(0.001, 1), seeds)
def test_conjugate_gradients_never_raise_the_loss_of_any_row(
    rows: int, width: int, steps: int, damping: float, seed: int
) -> None:
    layer, mask = make_layer(rows, width, seed), mask_of(rows, width, seed)
    hessian = unit_diagonal(layer, damping)
    target, start = layer.weight @ hessian, layer.weight * mask
    before = losses(start, target, hessian)
    scale = losses(layer.weight, target, hessian).abs() + 1
    for done in range(steps + 1):
        weight = conjugate_gradients(layer.weight, target, hessian, mask, done)
        assert not weight[~mask].any(), "stays on the mask"
        after = losses(weight, target, hessian)
        assert (after <= before + 1e-5 * scale).all()
        before = after


@properties
@given(st.integers(1, 6), st.integers(1, 24), seeds)
def test_conjugate_gradients_end_at_the_least_squares_solution_on_the_mask(rows: int, width: int, seed: int) -> None:
    layer, mask = make_layer(rows, width, seed), mask_of(rows, width, seed)
    hessian = unit_diagonal(layer, 0.1)
    target = layer.weight @ hessian
    found = conjugate_gradients(torch.zeros_like(layer.weight), target, hessian, mask, 3 * width)
    torch.testing.assert_close(found.double(), exact(target, hessian, mask), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_conjugate_gradients_on_an_empty_and_on_a_full_mask(share: float) -> None:
    layer = make_layer(4, 16)
    hessian, mask = unit_diagonal(layer, 0.1), mask_of(4, 16, 0, share)
    found = conjugate_gradients(torch.zeros(4, 16), layer.weight @ hessian, hessian, mask, 60)
    torch.testing.assert_close(found, layer.weight * share, rtol=1e-3, atol=1e-3)


@properties
@given(st.sampled_from(PATTERNS), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 20), seeds)
def test_a_refit_never_increases_the_error_it_is_solved_for(
    pattern: Pattern, damping: float, steps: int, seed: int
) -> None:
    layer = make_layer(6, 16, seed)
    _, mask = obs(layer.weight, layer.hessian, pattern)
    start = layer.weight * mask
    damped = layer.hessian + damping * torch.diag(layer.hessian.diagonal())
    before, after = (
        relative_error(layer.weight, weight, damped)
        for weight in (start, refit(layer.weight, layer.hessian, start, mask, damping, steps))
    )
    assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=repr)
def test_a_refit_lowers_the_error_of_the_mask_of_obs(pattern: Pattern) -> None:
    layer = make_layer(16, 64, seed=1, tokens=4096)
    start, mask = obs(layer.weight, layer.hessian, pattern)
    weight = refit(layer.weight, layer.hessian, start, mask, damping=1e-3)
    errors = [relative_error(layer.weight, found, layer.hessian) for found in (weight, start)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("tokens", [2, 10, 40])
def test_fewer_inputs_than_columns_are_solved_without_a_blow_up(pattern: Pattern, tokens: int) -> None:
    layer = make_layer(8, 64, tokens=tokens)
    weight, mask = alps(layer.weight, layer.hessian, pattern)
    assert weight.isfinite().all()
    assert not weight[~mask].any()
    assert relative_error(layer.weight, weight, layer.hessian) < 0.6
    assert weight.norm() < 3 * layer.weight.norm()


@pytest.mark.parametrize("lowest", [0.0, -1e-6, -1e-2, -5.0])
def test_a_hessian_that_is_not_positive_definite_is_damped_until_it_is(lowest: float) -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.linspace(1, 3, 16)
    values[0] = lowest
    hessian = basis @ torch.diag(values) @ basis.T
    hessian.diagonal().clamp_(min=0.01)
    weight, mask = alps(make_layer().weight, hessian, NM(2, 4), damping=1e-9)
    assert weight.isfinite().all()
    assert mask.reshape(-1, 4).sum(1).eq(2).all()


def test_a_hessian_beyond_damping_is_refused() -> None:
    hessian = torch.full((8, 8), 1e6)
    hessian.diagonal().fill_(1)
    with pytest.raises(ValueError, match="too far from positive definite"):
        alps(torch.ones(2, 8), hessian, NM(2, 4))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_an_input_that_never_fires_gives_its_place_to_others(pattern: Pattern) -> None:
    layer = make_layer(8, 16)
    inputs = layer.inputs.clone()
    inputs[:, [1, 2, 7]] = 0
    weight, mask = alps(layer.weight * 100, Layer(layer.weight, inputs).hessian, pattern)
    assert not weight[:, [1, 2, 7]].any()
    assert weight.isfinite().all()
    assert not mask[:, [1, 2]].any(), "what never fires is the first to go"


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_order_of_rows_changes_nothing(pattern: Pattern) -> None:
    layer = make_layer(12, 32, seed=7)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    weight, mask = alps(layer.weight, layer.hessian, pattern)
    permuted, permuted_mask = alps(layer.weight[order], layer.hessian, pattern)
    assert torch.equal(permuted_mask, mask[order])
    torch.testing.assert_close(permuted, weight[order], rtol=1e-4, atol=1e-5)


def test_what_is_given_is_not_changed() -> None:
    layer = make_layer()
    weight, hessian = layer.weight.clone(), layer.hessian
    before = hessian.clone()
    alps(weight, hessian, NM(2, 4))
    refit(weight, hessian, weight, torch.ones_like(weight, dtype=torch.bool), 0.1)
    assert torch.equal(weight, layer.weight)
    assert torch.equal(hessian, before)
