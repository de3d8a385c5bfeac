"""The survey: errors that rise with what goes, and more left where the denoiser's output depends on it."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from obsdiff.models import walk
from obsdiff.prune.calibration import Calibration
from obsdiff.prune.stage import prune
from obsdiff.prune.survey import Survey, survey

from .folders import changed_model
from .runs import Noting, make_run

UNSTRUCTURED: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5, "allocation": "error"}
STRUCTURED: dict[str, Any] = {"pattern": "structured", "blocks": ":"}
FAST: dict[str, Any] = {"num_prompts": 2, "steps": 2, "batch_size": 2, "packages": 1, "device": "cpu"}
LAYER = "transformer_blocks.1.ff.net.2"


def surveyed(run: Calibration) -> Survey:
    stages = (walk.group_stages if run.recipe.structured else walk.linear_stages)(run.denoiser, run.spec)
    stored = dict(run.denoiser.state_dict())
    return survey(run, stages, stored)


def louder(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight"].mul_(6)


@pytest.fixture(scope="module")
def loud(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one layer that puts out six times as much."""
    return changed_model(tiny_sd3, tmp_path_factory.mktemp("loud") / "model", louder)


@pytest.mark.parametrize("options", [UNSTRUCTURED, STRUCTURED], ids=["unstructured", "structured"])
def test_errors_rise_with_what_goes(tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    run = make_run(tiny_sd3, tmp_path, **options)
    found = surveyed(run)
    if run.recipe.structured:
        assert found.curves.keys() == {stage.name for stage in walk.group_stages(run.denoiser, run.spec)}
    else:
        stages = walk.linear_stages(run.denoiser, run.spec)
        assert found.curves.keys() == {name for s in stages for shared in s.linears for name in shared}
    for name, curve in found.curves.items():
        amounts, errors = zip(*curve, strict=True)
        assert list(amounts) == sorted(set(amounts), reverse=run.recipe.structured), name
        assert len(curve) >= 4, name
        assert all(low <= high for low, high in pairwise(errors)), name
        assert 0 <= errors[0] <= errors[-1] < 100, name
        lost = name.endswith("2.attn.add_q_proj")  # what the last block's text stream asks for comes out nowhere
        assert (errors[-1] == 0) == lost, name


def test_groups_start_whole_and_without_an_error(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, **STRUCTURED)
    curves = surveyed(run).curves
    for stage in walk.group_stages(run.denoiser, run.spec):
        assert stage.group
        units = walk.unit_count(run.denoiser.get_submodule(stage.parent), stage.group)
        curve = curves[stage.name]
        assert curve[0] == (units, 0)
        assert [amount for amount, _ in curve] == list(range(units, max(1, units // 4) - 1, -1))


def test_it_changes_no_weight(tiny_sd3: Path, tmp_path: Path) -> None:
    for options in (UNSTRUCTURED, STRUCTURED):
        run = make_run(tiny_sd3, tmp_path, **options)
        before = {name: tensor.clone() for name, tensor in run.denoiser.state_dict().items()}
        surveyed(run)
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.denoiser.state_dict().items())


def test_a_family_whose_blocks_form_no_chain_is_measured_alike(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, **UNSTRUCTURED)
    unchained = dataclasses.replace(run, spec=dataclasses.replace(run.spec, carried=()))
    curves = [surveyed(chosen).curves for chosen in (unchained, run)]
    assert curves[0].keys() == curves[1].keys()
    for name, curve in curves[0].items():
        wanted = [error for _, error in curve]
        assert [error for _, error in curves[1][name]] == pytest.approx(wanted, rel=0.02), name


def test_the_height_of_a_curve_is_what_the_output_loses(tiny_sd3: Path, loud: Path, tmp_path: Path) -> None:
    folders = tmp_path / "quiet", tmp_path / "loud"
    runs = [make_run(model, folder, **UNSTRUCTURED) for model, folder in zip((tiny_sd3, loud), folders, strict=True)]
    for folder in folders:
        folder.mkdir()
    quiet, loudly = (surveyed(run).curves[LAYER] for run in runs)
    assert all(b > 2 * a for (_, a), (_, b) in zip(quiet, loudly, strict=True))


def test_a_layer_that_matters_more_keeps_more(tiny_sd3: Path, loud: Path, tmp_path: Path) -> None:
    amounts = []
    for model in (tiny_sd3, loud):
        info = prune(model, tmp_path / model.name, **FAST, **UNSTRUCTURED, solver="obs")
        assert info.allocation
        amounts.append(info.allocation.amounts[LAYER])
        mean = sum(info.allocation.amounts.values()) / len(info.allocation.amounts)
    assert amounts[1] < amounts[0] - 0.05
    assert amounts[1] < mean


def test_outliers_are_counted_for_owl(tiny_sd3: Path, tmp_path: Path) -> None:
    def spiky(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"][:, ::16] *= 60

    model = changed_model(tiny_sd3, tmp_path / "spiky", spiky)
    found = surveyed(make_run(model, tmp_path, **{**UNSTRUCTURED, "allocation": "owl"}))
    assert not found.curves
    assert all(0 <= share < 0.2 for share in found.outliers.values())
    assert found.outliers[LAYER] == max(found.outliers.values()) > 0.02


@pytest.mark.parametrize("options", [UNSTRUCTURED, STRUCTURED], ids=["unstructured", "structured"])
def test_the_display_is_told_of_all_the_work_it_was_promised(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    progress = Noting()
    prune(tiny_sd3, tmp_path / "out", progress=progress, **FAST, **options)
    assert progress.done == progress.total > 0


def test_an_interrupted_survey_goes_on_behind_the_last_block_it_measured(tiny_sd3: Path, tmp_path: Path) -> None:
    options = {"pattern": "unstructured", "sparsity": 0.6, "calibration": "stream", "solver": "auto"}

    def surveyed(folder: Path, stop: str = "") -> tuple[Survey, list[str]]:
        folder.mkdir(exist_ok=True)
        run, notes = make_run(tiny_sd3, folder, **options), []

        def advance(_count: int, note: str) -> None:
            notes.append(note)
            if stop and stop in note:
                raise KeyboardInterrupt

        stages = walk.linear_stages(run.denoiser, run.spec)
        stored = dict(run.denoiser.state_dict().items())
        return survey(dataclasses.replace(run, advance=advance), stages, stored), notes

    with pytest.raises(KeyboardInterrupt):
        surveyed(tmp_path / "stopped", "block 2/3: calibrating")
    again, notes = surveyed(tmp_path / "stopped")
    assert not [note for note in notes if "block 1/3: calibrating" in note]
    assert [note for note in notes if "block 2/3: calibrating" in note]
    whole, _ = surveyed(tmp_path / "whole")
    assert again.curves == whole.curves
