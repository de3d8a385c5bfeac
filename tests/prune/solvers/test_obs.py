"""OBS: what it computes is the paper's recursion, and it is worth it."""

import pytest
import torch
from torch import Tensor

from obsdiff.prune.solvers import NM, Pattern, Unstructured, relative_error
from obsdiff.prune.solvers.baselines import magnitude, wanda
from obsdiff.prune.solvers.obs import damped, inverse_factor, obs

from ..layers import Layer, make_layer

PATTERNS = [NM(2, 4), NM(1, 4), NM(7, 8), Unstructured(0.5), Unstructured(0.8)]


def textbook(weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float, block: int) -> tuple[Tensor, Tensor]:
    """SparseGPT (arXiv 2301.00774) in float64, a column at a time, inverting what is left of the Hessian each time."""
    w, h = weight.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    width = w.shape[1]
    mask = torch.ones_like(w, dtype=torch.bool)
    inverses = [torch.linalg.inv(h[q:, q:]) for q in range(width)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    size = pattern.m if isinstance(pattern, NM) else block
    for q in range(width):
        if q % size == 0:
            chosen = slice(q, min(q + size, width))
            score = w[:, chosen] ** 2 / pivots[chosen]
            if isinstance(pattern, NM):
                order = score.argsort(1)[:, : pattern.m - pattern.n]
                mask[:, chosen] = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
            else:
                lowest = score.flatten().argsort()[: int(pattern.sparsity * score.numel() + 1e-9)]
                flat = torch.ones(score.numel(), dtype=torch.bool)
                flat[lowest] = False
                mask[:, chosen] = flat.view_as(score)
        for row in (~mask[:, q]).nonzero().flatten():
            w[row, q:] -= w[row, q] / pivots[q] * inverses[q][0]
    return w * mask, mask


def errors(layer: Layer, pattern: Pattern) -> dict[str, float]:
    solvers = {"obs": obs, "magnitude": magnitude, "wanda": wanda}
    return {
        name: relative_error(layer.weight, solver(layer.weight, layer.hessian, pattern)[0], layer.hessian)
        for name, solver in solvers.items()
    }


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("block", [8, 24, 128])
def test_it_equals_the_textbook(pattern: Pattern, damping: float, block: int) -> None:
    layer = make_layer(rows=6, width=40, seed=3)
    weight, mask = obs(layer.weight, layer.hessian, pattern, damping, block)
    wanted, wanted_mask = textbook(layer.weight, layer.hessian, pattern, damping, block)
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(weight, wanted.float(), rtol=1e-4, atol=1e-5)


def test_groups_that_a_block_would_cut_stay_whole() -> None:
    layer = make_layer(rows=4, width=36)
    weight, mask = obs(layer.weight, layer.hessian, NM(2, 6), block=8)
    wanted, wanted_mask = textbook(layer.weight, layer.hessian, NM(2, 6), 0.01, 8)
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(weight, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_block_size_does_not_change_an_nm_result(pattern: Pattern) -> None:
    layer = make_layer(rows=6, width=48)
    small, _ = obs(layer.weight, layer.hessian, pattern, block=16)
    large, _ = obs(layer.weight, layer.hessian, pattern, block=128)
    same = torch.allclose(small, large, rtol=1e-4, atol=1e-5)
    assert same == isinstance(pattern, NM), "unstructured masks are chosen per block"


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_it_errs_less_than_the_baselines_on_correlated_inputs(pattern: Pattern, seed: int) -> None:
    found = errors(make_layer(rows=16, width=64, tokens=1024, seed=seed), pattern)
    assert found["obs"] < 0.98 * min(found["magnitude"], found["wanda"])


def test_it_changes_nothing_that_stays_when_inputs_are_independent() -> None:
    layer = make_layer(rows=8, width=16)
    hessian = torch.diag(torch.linspace(0.5, 2, 16))
    weight, mask = obs(layer.weight, hessian, NM(2, 4))
    torch.testing.assert_close(weight, layer.weight * mask)


def test_an_input_that_another_repeats_is_made_up_for_in_full() -> None:
    inputs = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    inputs = inputs[:, [0, 1, 2, 3, 0, 1, 2, 3]]
    hessian = inputs.T @ inputs / len(inputs)
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    pruned, _ = obs(weight, hessian, Unstructured(0.5), damping=1e-5)
    alone, _ = magnitude(weight, None, Unstructured(0.5))
    assert relative_error(weight, pruned, hessian) < 0.2 * relative_error(weight, alone, hessian)


def test_the_weight_that_was_given_is_not_changed() -> None:
    layer = make_layer()
    weight, hessian = layer.weight.clone(), layer.hessian
    before = hessian.clone()
    obs(weight, hessian, NM(2, 4))
    assert torch.equal(weight, layer.weight)
    assert torch.equal(hessian, before)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    hessian = make_layer(width=20).hessian
    upper = inverse_factor(hessian, 0.05)
    wanted = hessian.double() + 0.05 * hessian.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(upper.double().T @ upper.double(), torch.linalg.inv(wanted), rtol=1e-3, atol=1e-5)
    assert torch.equal(upper, upper.triu())


def test_damping_is_a_share_of_the_mean_over_live_inputs() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    assert torch.equal(damped(hessian, 0.1), torch.diag(torch.tensor([1.2, 3.2, 1.0])))


@pytest.mark.parametrize("lowest", [0.0, -1e-7, -1e-3, -0.05, -5.0])
def test_a_hessian_that_is_not_positive_definite_is_damped_until_it_is(lowest: float) -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.linspace(1, 3, 16)
    values[0] = lowest
    hessian = basis @ torch.diag(values) @ basis.T
    hessian.diagonal().clamp_(min=0.01)
    pruned, mask = obs(make_layer().weight, hessian, NM(2, 4), damping=1e-9)
    assert pruned.isfinite().all()
    assert mask.reshape(-1, 4).sum(1).eq(2).all()


def test_a_hessian_beyond_damping_is_refused() -> None:
    hessian = torch.full((8, 8), 1e4)
    hessian.diagonal().fill_(1)
    with pytest.raises(ValueError, match="too far from positive definite"):
        obs(torch.ones(2, 8), hessian, NM(2, 4))
