"""Streamed calibration: the sampler's Hessians for a fraction of its calls, and the same bytes however it ran."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.models import walk
from obsdiff.models.source import find_source
from obsdiff.prune.calibration import Calibration, sampler_hessians
from obsdiff.prune.hessian import mean
from obsdiff.prune.plan import plan
from obsdiff.prune.recipe import make_recipe
from obsdiff.prune.stage import prune
from obsdiff.prune.stream import stream_cost, stream_hessians

from .folders import hashes
from .runs import Interrupting, Noting, joined, linear_packages, make_run

STREAM: dict[str, Any] = {
    "num_prompts": 4,
    "steps": 2,
    "batch_size": 2,
    "device": "cpu",
    "solver": "obs",
    "calibration": "stream",
}
KINDS: dict[str, dict[str, Any]] = {
    "2:4": {},
    "auto": {"solver": "auto"},
    "asymmetric": {"target": "asymmetric"},
    "structured": {"pattern": "structured", "blocks": ":", "heads": 0.5, "neurons": 0.3},
    "structured+2:4": {"pattern": "structured+2:4", "blocks": ":", "heads": 0.25, "neurons": 0.3},
}


@pytest.fixture(scope="module")
def references(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The hashes of checkpoints by the names of KINDS."""
    folder = tmp_path_factory.mktemp("streamed")
    for name, options in KINDS.items():
        prune(tiny_sd3, folder / name, **{**STREAM, **options})
    return {name: hashes(folder / name) for name in KINDS}


def streamed(run: Calibration) -> dict[tuple[str, ...], list[Tensor]]:
    found = joined([hessians for _, hessians in stream_hessians(run, linear_packages(run), ()) if hessians])
    return {names: [mean([part]).hessian for part in parts] for names, parts in found.items()}


def sampled(run: Calibration) -> dict[tuple[str, ...], list[Tensor]]:
    packages = [[stage for package in linear_packages(run) for stage in package]]
    found = joined([hessians for _, hessians in sampler_hessians(run, packages, ()) if hessians])
    return {names: [mean([part]).hessian for part in parts] for names, parts in found.items()}


@pytest.mark.parametrize("options", [{"solver": "obs"}, {"solver": "auto"}, {"guidance_scale": 1}], ids=str)
def test_with_nothing_pruned_its_hessians_are_those_of_the_sampler(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    run = make_run(tiny_sd3, tmp_path, calibration="stream", **options)
    wanted, found = sampled(run), streamed(run)
    assert found.keys() == wanted.keys()
    for names, parts in wanted.items():
        assert len(found[names]) == len(parts) == (2 if run.recipe.solver == "auto" else 1)
        for exact, hessian in zip(parts, found[names], strict=True):
            torch.testing.assert_close(hessian, exact, rtol=1e-5, atol=1e-5 * float(exact.diagonal().mean()))


def test_later_blocks_see_what_was_pruned_before_them(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs")
    dense, changed = streamed(run), {}
    for k, hessians in stream_hessians(run, linear_packages(run), ()):
        assert hessians
        changed |= {names: mean(parts).hessian for names, parts in hessians.items()}
        if k == 1:
            with torch.no_grad():
                run.denoiser.get_submodule("transformer_blocks.1.ff.net.2").weight.zero_()
    for names, [before] in dense.items():
        later = names[0].startswith("transformer_blocks.2.")
        same = torch.allclose(changed[names], before, rtol=1e-4, atol=1e-5 * float(before.diagonal().mean()))
        if not later:
            assert same, names
        elif "add" not in names[0]:  # the last block's text stream joins the image stream in its attention alone
            assert not same, names


def test_every_block_is_a_package_and_the_sampler_runs_once(tiny_sd3: Path, tmp_path: Path) -> None:
    calls = []
    run = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs")
    run.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    numbers = [(k, hessians is None) for k, hessians in stream_hessians(run, linear_packages(run), {1})]
    assert numbers == [(0, False), (1, True), (2, False)]
    assert len(calls) == len(run.batches) * run.recipe.steps


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("done", [set(), {0}, {1, 2}], ids=str)
def test_it_tells_of_as_much_work_as_it_promised(tiny_sd3: Path, tmp_path: Path, share: float, done: set[int]) -> None:
    told: list[int] = []
    run = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs", call_share=share)
    run = dataclasses.replace(run, advance=lambda count, _note: told.append(count))
    packages = linear_packages(run)
    list(stream_hessians(run, packages, done))
    assert sum(told) == stream_cost(run.denoiser, run.spec, packages, done, run.recipe)


def test_a_share_of_the_calls_calibrates_on_fewer_tokens(tiny_sd3: Path, tmp_path: Path) -> None:
    weights = []
    for share in (1.0, 0.5):
        run = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs", call_share=share, steps=4)
        _, hessians = next(stream_hessians(run, linear_packages(run), ()))
        assert hessians
        weights.append(next(iter(hessians.values()))[0].weight)
    assert weights[1] == pytest.approx(weights[0] / 2, rel=0.2)


def test_blocks_that_are_called_by_position_work_too(tiny_sd3: Path, tmp_path: Path) -> None:
    def by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rest, moved = dict(kwargs), list(args)
        for name in list(inspect.signature(module.forward).parameters)[len(args) :]:
            if name not in rest:
                break
            moved.append(rest.pop(name))
        positions.append(len(moved))
        return tuple(moved), rest

    run, positions = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs"), []
    wanted = streamed(run)
    for block in walk.blocks_of(run.denoiser, run.spec):
        block.module.register_forward_pre_hook(by_position, with_kwargs=True)
    found = streamed(run)
    assert min(positions) >= 3
    assert all(torch.equal(found[names][0], wanted[names][0]) for names in wanted)


def test_a_family_whose_blocks_form_no_chain_is_refused(tiny_sd3: Path) -> None:
    source = find_source(tiny_sd3)
    unchained = dataclasses.replace(source, spec=dataclasses.replace(source.spec, carried=()))
    recipe = make_recipe(source, STREAM)
    with pytest.raises(InputError, match=r"--calibration stream: the blocks of .* do not form one chain; use sampler"):
        plan(unchained, recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packages": 2}, "^--packages is an option of --calibration sampler: in a stream every block is one"),
        (
            {"calibration": "stream", "call_share": 0.25, "steps": 2, "num_prompts": 4, "batch_size": 4},
            "^--call-share 0.25 of 2 steps is none: take 0.5 or more",
        ),
        ({"calibration": "sampler", "call_share": 0.5}, "^--call-share is an option of --calibration stream"),
        ({"calibration": "sampler", "target": "asymmetric"}, "^--target asymmetric needs --calibration stream"),
        ({"target": "asymmetric", "pattern": "structured"}, "a --pattern other than structured"),
        ({"cache_gb": -1}, "^--cache-gb: Input should be greater than or equal to 0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_a_stream_are_refused(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, tmp_path / "out", **{**STREAM, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["2:4", "asymmetric"])
@pytest.mark.parametrize("cache_gb", [0, 2e-4])
def test_the_cache_changes_no_weight(
    tiny_sd3: Path, tmp_path: Path, references: dict[str, dict[str, str]], name: str, cache_gb: float
) -> None:
    prune(tiny_sd3, tmp_path / "out", **{**STREAM, **KINDS[name], "cache_gb": cache_gb})
    same, found = references[name], hashes(tmp_path / "out")
    assert {file for file in found if found[file] != same[file]} == {"obsdiff.json"}, "which names the cache's size"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *(("2:4", after) for after in (0, 4, 14, 22)),
        *(("auto", 14), ("asymmetric", 12), ("asymmetric", 20)),
        *(("structured", 10), ("structured+2:4", 9), ("structured+2:4", 26)),
    ],
)
def test_an_interrupted_stream_goes_on_to_the_same_bytes(
    tiny_sd3: Path, tmp_path: Path, references: dict[str, dict[str, str]], name: str, after: int
) -> None:
    options = {**STREAM, **KINDS[name]}
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_sd3, tmp_path / "out", progress=Interrupting(after), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    prune(tiny_sd3, tmp_path / "out", **options)
    assert hashes(tmp_path / "out") == references[name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("after", [6, 8, 10, 14])  # while it collects, solves and carries on
def test_an_interrupted_stream_leaves_no_activations_behind(tiny_sd3: Path, tmp_path: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_sd3, tmp_path / "out", progress=Interrupting(after), **{**STREAM, "cache_gb": 0})
    left = {path.name.split(".")[0] for path in (tmp_path / "out.partial").iterdir()}
    assert {"state"} <= left <= {"state", "package-000", "package-001", "package-002"}


@pytest.mark.parametrize("name", ["2:4", "asymmetric", "structured+2:4"])
def test_the_display_is_told_of_all_the_work_and_of_every_block(tiny_sd3: Path, tmp_path: Path, name: str) -> None:
    progress = Noting()
    prune(tiny_sd3, tmp_path / "out", progress=progress, **{**STREAM, **KINDS[name]})
    assert progress.done == progress.total > 0
    for block in (1, 2, 3):
        assert any(note.startswith(f"block {block}/3: calibrating") for note in progress.notes)


def test_blocks_are_counted_up_to_the_last_that_is_pruned(tiny_sd3: Path, tmp_path: Path) -> None:
    progress = Noting()
    options = {"pattern": "structured", "blocks": "1:-1", "solver": "auto", "calibration": "stream"}
    prune(tiny_sd3, tmp_path / "out", progress=progress, **{**STREAM, **options})
    counted = {note.rsplit("block ")[-1] for note in progress.notes if "block " in note and "solving" not in note}
    assert counted == {"1/2: carrying on", "2/2: calibrating"}
    assert "measuring what each layer is worth, block 2/2: calibrating" in progress.notes


def test_its_errors_are_about_those_of_the_sampler_run_once_a_block(tiny_sd3: Path, tmp_path: Path) -> None:
    errors = {}
    for name, options in {"stream": {}, "sampler": {"calibration": "sampler", "packages": 3}}.items():
        info = prune(tiny_sd3, tmp_path / name, **{**STREAM, **options})
        errors[name] = {layer.name: layer.error or 0.0 for layer in info.layers}
    assert errors["stream"] == pytest.approx(errors["sampler"], rel=0.1)
