"""Heads and neurons: what goes is what the paper's greedy choice says, and the rest makes up for it."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obsdiff.prune.solvers import relative_error
from obsdiff.prune.structured import (
    REMOVERS,
    Removal,
    default_multiple,
    keep_count,
    remove_auto,
    remove_magnitude,
    remove_obs,
)

from .layers import make_layer, second_moment

CASES = [  # readers' rows, units, columns a unit, units to keep
    ((5,), 6, 1, 3),
    ((5,), 4, 3, 2),
    ((4, 7), 4, 4, 1),
    ((6, 3), 8, 2, 5),
    ((16, 2, 5), 5, 2, 2),
]


def make_readers(rows: Sequence[int], width: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and Hessians; every reader is ten times as loud as the one before, in weights and in inputs."""
    layers = [make_layer(count, width, seed + 17 * k) for k, count in enumerate(rows)]
    return [layer.weight * 10**k for k, layer in enumerate(layers)], [
        layer.hessian * 100**k for k, layer in enumerate(layers)
    ]


def with_damping(hessian: Tensor, damping: float) -> Tensor:
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def textbook(
    weights: Sequence[Tensor], hessians: Sequence[Tensor], units: int, keep: int, damping: float
) -> tuple[list[int], list[Tensor]]:
    """The greedy removal in float64, inverting the Hessian of what is left anew for every removal."""
    work = [weight.double().clone() for weight in weights]
    full = [with_damping(hessian, damping) for hessian in hessians]
    energies = [torch.trace(w @ h @ w.T) for w, h in zip(work, full, strict=True)]
    size = work[0].shape[1] // units
    left = list(range(units))
    while len(left) > keep:
        columns = torch.tensor([unit * size + i for unit in left for i in range(size)])
        inverses = [torch.linalg.inv(h[columns][:, columns]) for h in full]
        losses = []
        for position in range(len(left)):
            s = slice(position * size, (position + 1) * size)
            losses.append(
                sum(
                    torch.trace(w[:, columns[s]] @ torch.linalg.inv(inverse[s, s]) @ w[:, columns[s]].T) / energy
                    for w, inverse, energy in zip(work, inverses, energies, strict=True)
                )
            )
        worst = min(range(len(left)), key=lambda position: float(losses[position]))
        s = slice(worst * size, (worst + 1) * size)
        for w, inverse in zip(work, inverses, strict=True):
            w[:, columns] -= w[:, columns[s]] @ torch.linalg.inv(inverse[s, s]) @ inverse[s]
            w[:, columns[s]] = 0
        left.pop(worst)
    return left, work


def brute_force_loss(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) of the best Ŵ on those columns, float64."""
    pruned = torch.zeros_like(weight)
    pruned[:, columns] = torch.linalg.solve(hessian[columns][:, columns], (weight @ hessian)[:, columns].T).T
    return torch.trace((weight - pruned) @ hessian @ (weight - pruned).T)


@pytest.mark.parametrize(("rows", "units", "size", "keep"), CASES)
@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_it_equals_the_textbook(
    rows: tuple[int, ...], units: int, size: int, keep: int, damping: float, seed: int
) -> None:
    weights, hessians = make_readers(rows, units * size, seed)
    removal = remove_obs(weights, hessians, units, keep, damping)
    kept, wanted = textbook(weights, hessians, units, keep, damping)
    assert removal.kept == kept
    for found, exact in zip(removal.weights, wanted, strict=True):
        torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize(("rows", "units", "size", "keep"), CASES)
def test_each_removal_is_the_one_that_costs_least_as_shares_of_what_readers_put_out(
    rows: tuple[int, ...], units: int, size: int, keep: int
) -> None:
    weights, hessians = make_readers(rows, units * size)
    pairs = [(w.double(), with_damping(h, 0.01)) for w, h in zip(weights, hessians, strict=True)]
    entries = torch.arange(units * size).view(units, size)

    def cost(kept: list[int]) -> float:
        columns = entries[kept].flatten()
        return sum(float(brute_force_loss(w, h, columns) / torch.trace(w @ h @ w.T)) for w, h in pairs)

    left = list(range(units))
    while len(left) > keep:
        left = min(([unit for unit in left if unit != gone] for gone in left), key=cost)
        assert remove_obs(weights, hessians, units, len(left)).kept == left


@pytest.mark.parametrize(("rows", "units", "size", "keep"), CASES)
@pytest.mark.parametrize("remove", [remove_obs, remove_magnitude])
def test_removed_columns_are_zero_and_errors_are_those_of_the_outputs(
    remove: type, rows: tuple[int, ...], units: int, size: int, keep: int
) -> None:
    weights, hessians = make_readers(rows, units * size)
    copies = [tensor.clone() for tensor in (*weights, *hessians)]
    removal: Removal = remove(weights, hessians, units, keep)
    assert len(removal.kept) == keep
    assert removal.kept == sorted(set(removal.kept))
    gone = [unit for unit in range(units) if unit not in removal.kept]
    for weight, pruned, hessian, error in zip(weights, removal.weights, hessians, removal.errors, strict=True):
        assert pruned.shape == weight.shape
        assert not pruned.view(-1, units, size)[:, gone].any()
        assert pruned.view(-1, units, size)[:, removal.kept].abs().sum((0, 2)).gt(0).all()
        assert error == pytest.approx(relative_error(weight, pruned, hessian))
    assert all(torch.equal(a, b) for a, b in zip((*weights, *hessians), copies, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_it_errs_less_than_magnitude(seed: int) -> None:
    layer = make_layer(16, 48, seed, tokens=1024)
    for keep in (4, 8, 10):
        obs = remove_obs([layer.weight], [layer.hessian], 12, keep)
        magnitude = remove_magnitude([layer.weight], [layer.hessian], 12, keep)
        assert obs.errors[0] < 0.95 * magnitude.errors[0]


def test_a_loud_reader_does_not_drown_a_faint_one() -> None:
    """Unit 0 is all that the faint reader hears of, and next to nothing to the loud one."""
    loud, faint = torch.full((2, 4), 100.0), torch.tensor([[1e-3, 1e-6, 1e-6, 1e-6]])
    loud[:, 0] = 50
    assert 0 not in remove_obs([loud], [torch.eye(4)], 4, 3).kept
    assert 0 in remove_obs([loud, faint], [torch.eye(4)] * 2, 4, 3).kept


def test_many_removals_do_not_pile_up_round_off() -> None:
    layer = make_layer(24, 256, tokens=600)
    removal = remove_obs([layer.weight], [layer.hessian], 256, 16)
    hessian = with_damping(layer.hessian, 0.01)
    best = brute_force_loss(layer.weight.double(), hessian, torch.tensor(removal.kept))
    lost = layer.weight.double() - removal.weights[0].double()
    assert float(torch.trace(lost @ hessian @ lost.T)) == pytest.approx(float(best), rel=1e-4)


def test_keeping_all_changes_nothing_but_round_off() -> None:
    weights, hessians = make_readers((5,), 12)
    for remove in (remove_obs, remove_magnitude):
        removal = remove(weights, hessians, 4, 4)
        assert removal.kept == [0, 1, 2, 3]
        torch.testing.assert_close(removal.weights[0], weights[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    layer = make_layer(4, 8)
    for remove in (remove_obs, remove_magnitude):
        assert remove([layer.weight.to(dtype)], [layer.hessian], 4, 2).weights[0].dtype == dtype


def test_inputs_that_never_fire_go_first() -> None:
    layer = make_layer(4, 8)
    inputs = layer.inputs.clone()
    inputs[:, 2:6] = 0
    removal = remove_obs([layer.weight], [second_moment(inputs)], 4, 2)
    assert removal.kept == [0, 3]
    assert removal.errors[0] < 0.05


def test_magnitude_needs_no_hessian_and_keeps_what_stays() -> None:
    weight = torch.tensor([[1.0, -1.0, 5.0, 5.0, 0.1, 0.1], [1.0, -1.0, 5.0, 5.0, 0.1, 0.1]])
    removal = remove_magnitude([weight], [None], 3, 2)
    assert removal.kept == [0, 1]
    assert torch.equal(removal.weights[0][:, :4], weight[:, :4])
    assert math.isnan(removal.errors[0])


def test_auto_takes_the_damping_that_errs_least_on_other_inputs() -> None:
    layer = make_layer(8, 32, tokens=48)
    hessian, held_out = layer.hessian, layer.options("auto")["held_out"]
    tried = {d: remove_obs([layer.weight], [hessian], 8, 4, d).weights[0] for d in (0.01, 0.1, 1.0)}
    best = min(tried, key=lambda damping: relative_error(layer.weight, tried[damping], held_out))
    assert best != 0.01, "so few inputs overfit"
    found = remove_auto([layer.weight], [hessian], [held_out], 8, 4)
    wanted = remove_obs([layer.weight], [(hessian + held_out) / 2], 8, 4, best)
    assert found.kept == wanted.kept
    assert torch.equal(found.weights[0], wanted.weights[0])


@settings(deadline=None)
@given(st.integers(1, 8192), st.floats(0, 0.999), st.integers(1, 128))
def test_a_count_is_snapped_up_and_never_below_the_share_asked_for(units: int, share: float, multiple: int) -> None:
    kept = keep_count(units, share, multiple)
    assert 1 <= kept <= units
    assert kept % multiple == 0 or kept == units
    assert units - kept <= units * share + 1e-6
    smaller = (kept - 1) // multiple * multiple  # the next multiple below would take more than the share
    assert smaller < 1 or units - smaller > units * share - 1e-6


@pytest.mark.parametrize(
    ("units", "share", "multiple", "kept"),
    [
        (6144, 0.2, 64, 4928),
        (6144, 0.2, 1, 4916),
        (512, 0.3, 8, 360),
        (24, 0.3, 1, 17),
        (8, 0.99, 1, 1),
        (10, 0.3, 1, 7),
    ],
)
def test_counts_of_real_models(units: int, share: float, multiple: int, kept: int) -> None:
    assert keep_count(units, share, multiple) == kept


def test_the_multiple_is_64_at_real_sizes() -> None:
    assert [default_multiple(width) for width in (512, 1024, 6144)] == [8, 64, 64]


@pytest.mark.parametrize("remove", [remove_obs, remove_magnitude])
def test_what_does_not_fit_is_refused(remove: type) -> None:
    weights, hessians = make_readers((4, 4), 12)
    with pytest.raises(ValueError, match="cannot keep 0 of 4 units in 12 columns"):
        remove(weights, hessians, 4, 0)
    with pytest.raises(ValueError, match="cannot keep 5 of 4 units in 12 columns"):
        remove(weights, hessians, 4, 5)
    with pytest.raises(ValueError, match="cannot keep 2 of 5 units in 12 columns"):
        remove(weights, hessians, 5, 2)
    with pytest.raises(ValueError, match="the same input width and one hessian each"):
        remove(weights, hessians[:1], 4, 2)
    with pytest.raises(ValueError, match="the same input width and one hessian each"):
        remove([weights[0], weights[1][:, :8]], hessians, 4, 2)


@pytest.mark.parametrize("remove", [remove_obs, remove_magnitude])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(remove: type, value: float) -> None:
    weights, hessians = make_readers((4,), 12)
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        remove([weights[0].clone().index_fill_(1, torch.tensor([3]), value)], hessians, 4, 2)
    with pytest.raises(ValueError, match="the hessian holds NaN or infinity"):
        remove(weights, [hessians[0].clone().index_fill_(1, torch.tensor([3]), value)], 4, 2)


def test_a_hessian_that_cannot_be_factored_is_refused() -> None:
    hessian = torch.full((8, 8), 10.0)
    hessian.diagonal().fill_(1)
    with pytest.raises(ValueError, match="not positive definite: more calibration prompts or more damping"):
        remove_obs([torch.ones(2, 8)], [hessian], 4, 2)


def test_there_is_a_remover_for_auto_obs_and_magnitude() -> None:
    assert {"auto", "obs", "magnitude"} <= set(REMOVERS)
