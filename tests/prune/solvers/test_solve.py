"""What every solver promises: masks that fit exactly, zeros where they say, and a clear refusal of bad input."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obsdiff.prune.solvers import NEEDS_HESSIAN, NM, SOLVERS, Pattern, Solution, Unstructured, relative_error, solve

from ..layers import ALL_SOLVERS, Layer, make_layer

properties = settings(deadline=None, max_examples=10)
every_solver = pytest.mark.parametrize("solver", ALL_SOLVERS)
seeds = st.integers(0, 10**6)


def run(layer: Layer, pattern: Pattern, solver: str, **changes: Any) -> Solution:
    arguments = {"weight": layer.weight, "hessian": layer.hessian, **layer.options(solver), **changes}
    return solve(pattern=pattern, solver=solver, **arguments)


def assert_sound(solution: Solution, weight: Tensor) -> None:
    assert solution.weight.shape == solution.mask.shape == weight.shape
    assert solution.weight.dtype == weight.dtype
    assert solution.mask.dtype == torch.bool
    assert solution.weight.isfinite().all()
    assert not solution.weight[~solution.mask].any(), "zero outside the mask"


@every_solver
@properties
@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 5), seeds, st.data())
def test_an_nm_mask_keeps_exactly_n_of_every_m(
    solver: str, m: int, groups: int, rows: int, seed: int, data: st.DataObject
) -> None:
    pattern = NM(data.draw(st.integers(1, m - 1)), m)
    layer = make_layer(rows, groups * m, seed)
    solution = run(layer, pattern, solver)
    assert_sound(solution, layer.weight)
    assert solution.mask.reshape(-1, m).sum(1).eq(pattern.n).all()
    assert 0 <= solution.error < math.inf


@every_solver
@properties
@given(st.integers(1, 15), st.integers(1, 6), seeds)
def test_unstructured_sparsity_is_exactly_as_asked(solver: str, gone: int, rows: int, seed: int) -> None:
    layer = make_layer(rows, 16, seed)
    solution = run(layer, Unstructured(gone / 16), solver)
    assert_sound(solution, layer.weight)
    assert (~solution.mask).sum() == rows * gone


@every_solver
@pytest.mark.parametrize("sparsity", [0.5, 0.61])
def test_a_share_that_does_not_come_out_even_is_met_as_far_as_whole_weights_go(solver: str, sparsity: float) -> None:
    layer = make_layer(5, 150)  # two blocks of columns for OBS: 128 and 22
    mask = run(layer, Unstructured(sparsity), solver).mask
    gone = int((~mask).sum())
    assert sparsity * mask.numel() - len(mask) < gone <= sparsity * mask.numel()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("correlated", [True, False])
def test_the_error_never_rises_when_more_is_kept(solver: str, seed: int, correlated: bool) -> None:
    layer = make_layer(16, 32, seed, tokens=1024, correlated=correlated)
    by_nm = [run(layer, NM(n, 8), solver).error for n in (1, 2, 4, 6, 7)]
    by_share = [run(layer, Unstructured(gone / 8), solver).error for gone in (7, 6, 4, 2, 1)]
    for errors in (by_nm, by_share):
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.5 * errors[0], "and falls"


@every_solver
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=repr)
def test_the_order_of_the_outputs_does_not_matter(solver: str, pattern: Pattern) -> None:
    layer = make_layer(12, 32, seed=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    solution = run(layer, pattern, solver)
    permuted = run(layer, pattern, solver, weight=layer.weight[order])
    assert torch.equal(permuted.mask, solution.mask[order])
    torch.testing.assert_close(permuted.weight, solution.weight[order], rtol=1e-4, atol=1e-5)
    assert permuted.error == pytest.approx(solution.error, rel=1e-4)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_is_kept_and_what_is_given_is_not_changed(solver: str, dtype: torch.dtype) -> None:
    layer = make_layer()
    weight = layer.weight.to(dtype)
    hessian, options = layer.hessian, layer.options(solver)
    copies = [tensor.clone() for tensor in (weight, hessian, *options.values())]
    solution = solve(weight, hessian, NM(2, 4), solver, **options)
    assert_sound(solution, weight)
    assert all(torch.equal(a, b) for a, b in zip((weight, hessian, *options.values()), copies, strict=True))


@every_solver
def test_the_same_input_gives_the_same_bits(solver: str) -> None:
    layer = make_layer(16, 64)
    first, second = (run(layer, NM(2, 4), solver) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.error == second.error


@every_solver
def test_the_error_is_that_of_the_outputs(solver: str) -> None:
    layer = make_layer()
    solution = run(layer, NM(2, 4), solver)
    seen = layer.inputs if solver == "auto" else layer.inputs[: len(layer.inputs) // 2]
    outputs, pruned = seen @ layer.weight.T, seen @ solution.weight.T
    assert solution.error == pytest.approx(float((outputs - pruned).norm() / outputs.norm()), rel=1e-4)


def test_the_relative_error_of_nothing_lost_and_of_nothing_put_out() -> None:
    layer = make_layer()
    assert relative_error(layer.weight, layer.weight, layer.hessian) == 0
    assert relative_error(layer.weight, torch.zeros_like(layer.weight), layer.hessian) == pytest.approx(1)
    assert relative_error(layer.weight, torch.zeros_like(layer.weight), torch.zeros(16, 16)) == 0


@every_solver
@pytest.mark.parametrize("dead", [[3], [0, 1, 2, 3], [0, 5, 10, 15], list(range(16))], ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=repr)
def test_inputs_that_never_fire_do_no_harm(solver: str, dead: list[int], pattern: Pattern) -> None:
    layer = make_layer()
    inputs = layer.inputs.clone()
    inputs[:, dead] = 0
    solution = run(Layer(layer.weight, inputs), pattern, solver)
    assert_sound(solution, layer.weight)
    assert solution.mask.sum() == layer.weight.numel() // 2
    assert solution.error < 1


@every_solver
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=repr)
@pytest.mark.parametrize("tokens", [2, 8])
def test_fewer_inputs_than_columns_make_a_singular_hessian_that_still_works(
    solver: str, pattern: Pattern, tokens: int
) -> None:
    layer = make_layer(8, 32, tokens=tokens)
    solution = run(layer, pattern, solver)
    assert_sound(solution, layer.weight)
    assert solution.error < 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_hessian_that_round_off_made_indefinite_still_works(solver: str) -> None:
    layer = make_layer(8, 32, tokens=16)
    hessian = layer.hessian - 1e-3 * layer.hessian.diagonal().mean() * torch.eye(32)
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    assert_sound(run(layer, NM(2, 4), solver, hessian=hessian), layer.weight)


@every_solver
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_inputs_does_not_change_the_mask(solver: str, scale: float) -> None:
    layer = make_layer()
    solution = run(layer, NM(2, 4), solver)
    scaled = run(Layer(layer.weight, layer.inputs * scale), NM(2, 4), solver)
    assert torch.equal(scaled.mask, solution.mask)
    assert scaled.error == pytest.approx(solution.error, rel=1e-3)


def test_only_magnitude_works_without_a_hessian() -> None:
    weight = make_layer().weight
    solution = solve(weight, None, NM(2, 4), "magnitude")
    assert_sound(solution, weight)
    assert math.isnan(solution.error)
    assert frozenset(SOLVERS) - {"magnitude"} == NEEDS_HESSIAN
    for solver in NEEDS_HESSIAN:
        with pytest.raises(ValueError, match=f"{solver} needs a hessian"):
            solve(weight, None, NM(2, 4), solver)


@every_solver
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(solver: str, value: float) -> None:
    layer = make_layer()
    weight, hessian = layer.weight.clone(), layer.hessian
    weight[2, 3] = value
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        run(layer, NM(2, 4), solver, weight=weight)
    hessian[3, 2] = value
    with pytest.raises(ValueError, match="the hessian holds NaN or infinity"):
        run(layer, NM(2, 4), solver, hessian=hessian)


@every_solver
def test_shapes_that_do_not_fit_are_refused(solver: str) -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match=r"the weight must be a matrix \[out, in\], not \[8, 4, 4\]"):
        run(layer, NM(2, 4), solver, weight=layer.weight.reshape(8, 4, 4))
    with pytest.raises(ValueError, match="the input dimension 16 is not a multiple of 3, so 1:3 does not fit"):
        run(layer, NM(1, 3), solver)
    for hessian in (torch.eye(15), torch.ones(16), torch.ones(8, 16)):
        with pytest.raises(ValueError, match=r"a weight \[8, 16\] needs a hessian \[in, in\]"):
            run(layer, NM(2, 4), solver, hessian=hessian)


def test_an_unknown_solver_is_refused_and_the_known_ones_are_named() -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match="unknown solver 'best'") as caught:
        solve(layer.weight, layer.hessian, NM(2, 4), "best")
    assert all(solver in str(caught.value) for solver in ALL_SOLVERS)


@pytest.mark.parametrize("solver", ["auto", "obs", "alps"])
def test_weights_that_outgrow_their_dtype_are_refused(solver: str) -> None:
    inputs = torch.randn(128, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    layer = Layer(torch.full((4, 2), 60_000.0), inputs)  # one of two equal inputs goes, the other has to carry 120,000
    with pytest.raises(ValueError, match=r"overflow torch.float16: use a wider dtype or more damping"):
        run(layer, NM(1, 2), solver, weight=layer.weight.half())
    assert_sound(run(layer, NM(1, 2), solver), layer.weight)
