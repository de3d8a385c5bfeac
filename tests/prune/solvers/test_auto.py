"""auto: what errs least on inputs that were not solved for, never worse than plain OBS, and on record."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.checkpoint import CheckpointInfo, read_info
from obsdiff.errors import InputError
from obsdiff.prune.solvers import NM, Pattern, Unstructured, choose, relative_error, solve
from obsdiff.prune.solvers.alps import alps, refit
from obsdiff.prune.solvers.auto import DAMPINGS, OBS_DAMPING, ROWS, sample_rows
from obsdiff.prune.solvers.obs import obs
from obsdiff.prune.stage import prune

from ..layers import Layer, make_layer, second_moment
from ..options import QUICK

PATTERNS = [NM(2, 4), Unstructured(0.5)]


def halves(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two Hessians from `tokens` inputs each."""
    return second_moment(layer.inputs[:tokens]), second_moment(layer.inputs[tokens : 2 * tokens])


def fresh(layer: Layer) -> torch.Tensor:
    """The Hessian of the second half of the inputs, which nothing was solved for."""
    return second_moment(layer.inputs[len(layer.inputs) // 2 :])


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("tokens", [24, 96, 768])
@pytest.mark.parametrize("seed", range(3))
def test_it_takes_the_candidate_with_the_lowest_held_out_error(pattern: Pattern, tokens: int, seed: int) -> None:
    layer = make_layer(16, 48, seed, tokens=4096)
    hessian, held_out = halves(layer, tokens)
    choice = choose(layer.weight, hessian, held_out, pattern)
    start, mask = alps(layer.weight, hessian, pattern)
    errors = {
        ("alps", d): relative_error(layer.weight, refit(layer.weight, hessian, start, mask, d), held_out)
        for d in DAMPINGS
    }
    plain = relative_error(layer.weight, obs(layer.weight, hessian, pattern)[0], held_out)
    errors["obs", OBS_DAMPING] = plain
    assert (choice.solver, choice.damping) == min(errors, key=errors.__getitem__)
    assert choice.error == min(errors.values())
    assert choice.obs_error == plain


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(PATTERNS), st.integers(1, 200), st.integers(0, 10**6))
def test_it_is_never_worse_than_obs_on_held_out_inputs(pattern: Pattern, tokens: int, seed: int) -> None:
    layer = make_layer(6, 16, seed, tokens=400)
    choice = choose(layer.weight, *halves(layer, tokens), pattern)
    assert choice.error <= choice.obs_error
    assert (choice.solver == "obs") == (choice.error == choice.obs_error)


def test_obs_wins_where_alps_gains_nothing() -> None:
    hessian = torch.eye(16)
    choice = choose(make_layer().weight, hessian, hessian, NM(2, 4), dampings=(1e3,))
    assert (choice.solver, choice.damping) == ("obs", OBS_DAMPING)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("per_column", [1, 2, 4, 16])
def test_on_few_inputs_too_it_errs_less_than_obs_on_fresh_ones(pattern: Pattern, per_column: int) -> None:
    width, lost = 48, {"auto": 0.0, "obs": 0.0}
    for seed in range(4):
        layer = make_layer(32, width, seed, tokens=8192)
        first, second = halves(layer, per_column * width // 2)
        both = (first + second) / 2
        auto = solve(layer.weight, first, pattern, "auto", held_out=second)
        plain = solve(layer.weight, both, pattern, "obs")
        lost["auto"] += relative_error(layer.weight, auto.weight, fresh(layer))
        lost["obs"] += relative_error(layer.weight, plain.weight, fresh(layer))
    assert lost["auto"] < lost["obs"]


def test_the_winner_is_solved_for_all_inputs_together() -> None:
    layer = make_layer(16, 32, tokens=2048)
    first, second = halves(layer, 500)
    solution = solve(layer.weight, first, NM(2, 4), "auto", held_out=second)
    assert solution.choice
    again = solve(layer.weight, (first + second) / 2, NM(2, 4), solution.choice.solver, damping=solution.choice.damping)
    assert torch.equal(again.weight, solution.weight)
    assert again.error == solution.error
    assert again.choice is None


@pytest.mark.parametrize("rows", [1, 255, 256, 300, 511, 512, 1000, 6144])
def test_the_rows_that_are_tried_are_spread_over_all(rows: int) -> None:
    part = sample_rows(torch.arange(rows)[:, None]).flatten()
    steps = part.diff().unique().tolist()
    assert min(rows, ROWS // 2) <= len(part) <= ROWS
    assert part[0] == 0
    assert len(steps) <= 1
    assert rows - part[-1] <= max([1, *steps])


def test_without_held_out_inputs_it_is_refused() -> None:
    layer = make_layer()
    for arguments in ((layer.hessian, None), (None, layer.hessian)):
        with pytest.raises(ValueError, match="auto needs a hessian and a held_out one, from other inputs"):
            solve(layer.weight, arguments[0], NM(2, 4), "auto", held_out=arguments[1])


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "structured+2:4"])
def test_the_checkpoint_records_what_won_where(tiny_sd3: Path, tmp_path: Path, pattern: str) -> None:
    options: dict[str, Any] = {**QUICK, "solver": "auto", "pattern": pattern, "blocks": ":", "packages": 1}
    info = prune(tiny_sd3, tmp_path / "out", **options)
    for layer in info.layers:
        assert layer.choice, layer.name
        assert layer.choice.solver in ("obs", "alps")
        assert layer.choice.damping in (*DAMPINGS, OBS_DAMPING)
        assert 0 < layer.choice.error <= layer.choice.obs_error < 1
    assert {layer.choice.solver for layer in info.layers if layer.choice} != {"obs"}
    assert read_info(tmp_path / "out") == info
    assert CheckpointInfo.model_validate_json(info.model_dump_json()) == info


def test_other_solvers_record_no_choice(tiny_sd3: Path, tmp_path: Path) -> None:
    info = prune(tiny_sd3, tmp_path / "out", **{**QUICK, "packages": 1})
    assert {layer.choice for layer in info.layers} == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 1}, "--solver auto holds half of the prompts out: give two or more, or choose --solver obs"),
        ({"prompts": ["a boot"]}, "--solver auto holds half of the prompts out"),
        ({"damping": 0.1}, "--damping is an option of --solver obs and alps, not of auto"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(tiny_sd3: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, tmp_path / "out", **{**QUICK, "solver": "auto", **options})
    assert not list(tmp_path.iterdir())
