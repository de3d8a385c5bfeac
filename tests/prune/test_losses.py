"""What each removal of a unit is said to cost, and how much damping it pays to solve with."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from obsdiff.prune.solvers import relative_error
from obsdiff.prune.solvers.obs import damped
from obsdiff.prune.structured import remove_auto, remove_magnitude, remove_obs

from .layers import make_layer, second_moment


def make_readers(rows: Sequence[int], width: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    layers = [make_layer(count, width, seed + 17 * k) for k, count in enumerate(rows)]
    return [layer.weight for layer in layers], [layer.hessian for layer in layers]


@pytest.mark.parametrize(("rows", "units", "size"), [((5,), 8, 1), ((6,), 4, 4), ((4, 7), 6, 2), ((3, 8, 2), 5, 3)])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_losses_are_the_squared_errors_after_each_removal(
    rows: tuple[int, ...], units: int, size: int, damping: float
) -> None:
    weights, hessians = make_readers(rows, units * size)
    losses = remove_obs(weights, hessians, units, 1, damping).losses
    assert len(losses) == units - 1
    assert list(losses) == sorted(losses)
    for gone, loss in enumerate(losses, 1):
        removal = remove_obs(weights, hessians, units, units - gone, damping)
        assert len(removal.losses) == gone
        found = [
            relative_error(weight, pruned, damped(hessian, damping)) ** 2
            for weight, pruned, hessian in zip(weights, removal.weights, hessians, strict=True)
        ]
        assert loss == pytest.approx(sum(found), rel=1e-3, abs=1e-5)


def test_nothing_removed_has_lost_nothing() -> None:
    weights, hessians = make_readers((5,), 12)
    assert not remove_obs(weights, hessians, 4, 4).losses
    assert not remove_magnitude(weights, hessians, 4, 2).losses


@pytest.mark.parametrize("tokens", [24, 48, 96, 768])
@pytest.mark.parametrize("keep", [3, 5, 7])
@pytest.mark.parametrize("seed", range(3))
def test_auto_errs_no_more_than_obs_on_the_inputs_held_out(tokens: int, keep: int, seed: int) -> None:
    layer = make_layer(16, 32, seed, tokens=2 * tokens)
    first, second = layer.hessian, layer.options("auto")["held_out"]
    auto = remove_auto([layer.weight], [first], [second], 8, keep)
    plain = remove_obs([layer.weight], [first], 8, keep)
    found = [relative_error(layer.weight, removal.weights[0], second) for removal in (auto, plain)]
    assert found[0] <= found[1] * (1 + 1e-4)


@pytest.mark.parametrize("keep", [3, 5])
def test_auto_errs_less_than_obs_on_fresh_inputs_where_calibration_is_short(keep: int) -> None:
    lost = torch.zeros(2)
    for seed in range(6):
        layer = make_layer(16, 32, seed, tokens=4096)
        first, second = second_moment(layer.inputs[:24]), second_moment(layer.inputs[24:48])
        fresh = second_moment(layer.inputs[48:])
        auto = remove_auto([layer.weight], [first], [second], 8, keep)
        plain = remove_obs([layer.weight], [(first + second) / 2], 8, keep)
        lost += torch.tensor([relative_error(layer.weight, found.weights[0], fresh) for found in (auto, plain)])
    assert lost[0] < lost[1]
