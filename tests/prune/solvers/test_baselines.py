"""Magnitude and Wanda, against the sentence that defines each."""

import pytest
import torch

from obsdiff.prune.solvers import NM, Pattern, Unstructured, relative_error
from obsdiff.prune.solvers.baselines import magnitude, wanda

from ..layers import make_layer

PATTERNS = [NM(2, 4), NM(1, 8), Unstructured(0.5), Unstructured(0.25)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_what_stays_is_not_changed(pattern: Pattern) -> None:
    layer = make_layer()
    for solver in (magnitude, wanda):
        weight, mask = solver(layer.weight, layer.hessian, pattern)
        assert torch.equal(weight, torch.where(mask, layer.weight, 0))


def test_magnitude_removes_the_smallest_of_the_layer() -> None:
    weight = torch.tensor([[1.0, -5.0, 0.5, 4.0], [9.0, -8.0, 7.0, 6.0]])
    _, mask = magnitude(weight, None, Unstructured(0.5))
    assert mask.int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    _, mask = magnitude(weight, None, NM(2, 4))
    assert mask.int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]


def test_wanda_scales_by_the_norm_of_the_input_and_compares_within_an_output() -> None:
    weight = torch.tensor([[1.0, -5.0, 0.5, 4.0], [9.0, -8.0, 7.0, 6.0]])
    hessian = torch.diag(torch.tensor([100.0, 0.01, 400.0, 1.0]))  # norms 10, 0.1, 20, 1
    for pattern in (Unstructured(0.5), NM(2, 4)):
        _, mask = wanda(weight, hessian, pattern)
        assert mask.int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    _, mask = wanda(weight, hessian, NM(3, 4))
    assert mask.int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 1]]


def test_wanda_takes_the_norm_and_not_its_square() -> None:
    weight = torch.tensor([[3.0, 2.0, 2.0, 3.0]])  # times norms 1, 1.41, 1.41, 1; times squares the others would stay
    _, mask = wanda(weight, torch.diag(torch.tensor([1.0, 2.0, 2.0, 1.0])), NM(2, 4))
    assert mask.int().tolist() == [[1, 0, 0, 1]]


def test_wanda_only_looks_at_the_diagonal() -> None:
    layer = make_layer()
    _, mask = wanda(layer.weight, layer.hessian, NM(2, 4))
    _, same = wanda(layer.weight, torch.diag(layer.hessian.diagonal()), NM(2, 4))
    assert torch.equal(mask, same)


def test_with_equal_norms_wanda_is_magnitude_within_an_output() -> None:
    layer = make_layer()
    _, mask = wanda(layer.weight, torch.eye(16), NM(2, 4))
    _, same = magnitude(layer.weight, None, NM(2, 4))
    assert torch.equal(mask, same)


def test_wanda_is_the_best_mask_for_independent_inputs() -> None:
    layer = make_layer(rows=1, width=8)
    hessian = torch.diag(torch.linspace(0.1, 4, 8))
    pruned, _ = wanda(layer.weight, hessian, Unstructured(0.5))
    best = min(
        relative_error(layer.weight, layer.weight * torch.tensor([(bits >> i) & 1 for i in range(8)]), hessian)
        for bits in range(256)
        if bits.bit_count() == 4
    )
    assert relative_error(layer.weight, pruned, hessian) == pytest.approx(best)


def test_a_diagonal_that_round_off_made_negative_counts_as_zero() -> None:
    hessian = torch.diag(torch.tensor([-1e-9, 1.0, 1.0, -1e-9]))
    pruned, mask = wanda(torch.full((2, 4), 3.0), hessian, NM(2, 4))
    assert mask.int().tolist() == [[0, 1, 1, 0]] * 2
    assert pruned.isfinite().all()
