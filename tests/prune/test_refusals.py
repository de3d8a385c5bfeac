"""What a prune refuses: the message says what is wrong and where, and nothing on disk changes."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obsdiff.errors import InputError
from obsdiff.models import FAMILIES
from obsdiff.prune.stage import prune

from .folders import changed_model, hashes
from .options import QUICK
from .runs import Interrupting

LAYER = "transformer_blocks.1.ff.net.2"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a prune that is refused would have gone: nothing may be there in the end."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    yield folder / "out"
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def finished(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint. To copy."""
    path = tmp_path_factory.mktemp("finished") / "out"
    prune(tiny_sd3, path, **QUICK)
    return path


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tiny_sd3: Path, tmp_path: Path, out: Path, value: float) -> None:
    model = changed_model(tiny_sd3, tmp_path / "bad", lambda tensors: tensors[f"{LAYER}.weight"][3].fill_(value))
    with pytest.raises(InputError, match=re.escape(f"{LAYER}.weight holds NaN or infinity")):
        prune(model, out, **QUICK)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "structured"}], ids=str)
def test_the_layer_whose_inputs_overflow_is_named(
    tiny_sd3: Path, tmp_path: Path, out: Path, options: dict[str, Any]
) -> None:
    bias = LAYER.replace("net.2", "net.0.proj.bias")
    model = changed_model(tiny_sd3, tmp_path / "bad", lambda tensors: tensors[bias].fill_(1e38))
    with pytest.raises(InputError, match=re.escape(f"{LAYER} got NaN or infinity as input during calibration")):
        prune(model, out, **{**QUICK, **options, "steps": 1, "packages": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "unstructured", "sparsity": 1.5}, "sparsity must lie between 0 and 1"),
        ({"pattern": "4:2"}, "N of N:M must be at least 1 and smaller than M"),
        (
            {"pattern": "2:5"},
            r"transformer_blocks\.0\.attn\.to_q: the input dimension 32 is not a multiple of 5, so 2:5 does not fit; "
            "leave such layers out with --exclude",
        ),
        ({"blocks": "7:"}, "--blocks 7: selects none of the 3 blocks"),
        ({"blocks": "first"}, "--blocks first: write A:B"),
        ({"include": "nothing"}, "no linear matches --include 'nothing'"),
        ({"pattern": "structured", "include": "nothing"}, "no group of heads or neurons matches --include 'nothing'"),
        ({"exclude": "("}, "--include/--exclude: not a regular expression"),
        ({"device": "warp"}, "--device warp: torch cannot use it here: Expected one of cpu, cuda"),
        ({"prompts": "no/such/file.txt"}, "the prompts file no/such/file.txt cannot be read"),
        ({"height": 33}, "height"),
        ({"height": 4096}, "[Hh]eight"),
    ],
    ids=str,
)
def test_an_option_that_does_not_fit_is_refused(
    tiny_sd3: Path, out: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, out, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "allocation": "error"}, "^--allocation error is for --pattern unstructured and structured"),
        ({"pattern": "structured", "allocation": "owl"}, "^--allocation owl is for --pattern unstructured"),
        ({"target_size": 0.5, "target_speedup": 2}, "give one of --sparsity, --target-size and --target-speedup"),
        ({"target_size": 0.5, "sparsity": 0.5}, "give one of --sparsity, --target-size and --target-speedup"),
        ({"target_size": 0.5, "pattern": "2:4"}, "^--target-size needs --pattern structured, not 2:4"),
        ({"target_speedup": 2, "allocation": "uniform"}, "^--target-speedup needs --allocation error, not uniform"),
        ({"target_speedup": 0.9}, "^--target-speedup: Input should be greater than 1"),
        ({"target_size": 1.5}, "^--target-size: Input should be less than 1"),
        ({"target_size": 0.5, "heads": 0.5}, "^--heads is a share for --allocation uniform: --target-size chooses"),
        (
            {"pattern": "structured", "neurons": 0.5, "allocation": "error"},
            "^--neurons is a share .* --allocation error",
        ),
        ({"calibration": "stream", "packages": None, "offload": True, "target_speedup": 2}, "measured with --offload"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(
    tiny_sd3: Path, out: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, out, **{**QUICK, **options})


def test_a_gpu_that_is_not_there_is_refused(tiny_sd3: Path, out: Path) -> None:
    with pytest.raises(InputError, match="--device cuda:99: torch cannot use it here"):
        prune(tiny_sd3, out, **{**QUICK, "device": "cuda:99"})


def test_an_unknown_family_is_refused_and_the_known_ones_are_listed(tiny_sd3: Path, tmp_path: Path, out: Path) -> None:
    model = shutil.copytree(tiny_sd3, tmp_path / "other")
    index = json.loads((model / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "PixelMagic2DModel"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="PixelMagic2DModel is of a family that obsdiff does not know") as caught:
        prune(model, out, **QUICK)
    assert all(f"{name} ({spec.title})" in str(caught.value) for name, spec in FAMILIES.items())


def test_what_is_pruned_already_is_refused(finished: Path, out: Path) -> None:
    with pytest.raises(InputError, match="is pruned already: prune its base model"):
        prune(finished, out, **QUICK)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "model"])
def test_what_is_there_and_is_no_checkpoint_is_kept(tiny_sd3: Path, tmp_path: Path, kind: str, restart: bool) -> None:
    target = tmp_path / "photos"
    if kind == "file":
        target.write_text("keep me")
    elif kind == "folder":
        target.mkdir()
        (target / "holiday.png").write_text("keep me")
    else:
        shutil.copytree(tiny_sd3, target)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match=f"{target} exists and is not a pruned checkpoint"):
        prune(tiny_sd3, target, restart=restart, **QUICK)
    assert hashes(tmp_path) == before


def test_a_model_is_not_pruned_onto_itself(tiny_sd3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_sd3, tmp_path / "model")
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="exists and is not a pruned checkpoint"):
        prune(model, model, restart=True, **QUICK)
    assert hashes(tmp_path) == before


def test_a_checkpoint_of_another_recipe_is_kept_unless_told_otherwise(tiny_sd3: Path, checkpoint: Path) -> None:
    before = hashes(checkpoint.parent)
    for change in ({"seed": 1}, {"pattern": "1:4"}, {"num_prompts": 2}):
        with pytest.raises(
            InputError, match="is a checkpoint of another recipe: choose another name, or pass --restart"
        ):
            prune(tiny_sd3, checkpoint, **{**QUICK, **change})
    assert hashes(checkpoint.parent) == before
    info = prune(tiny_sd3, checkpoint, restart=True, **{**QUICK, "pattern": "1:4"})
    assert info.recipe["pattern"] == "1:4"
    assert json.loads((checkpoint / "obsdiff.json").read_text())["recipe"]["pattern"] == "1:4"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["out"]


def test_another_model_is_another_recipe(tiny_sd3: Path, tmp_path: Path, checkpoint: Path) -> None:
    model = changed_model(tiny_sd3, tmp_path / "changed", lambda tensors: tensors[f"{LAYER}.weight"].mul_(2))
    before = hashes(checkpoint)
    with pytest.raises(InputError, match="is a checkpoint of another recipe"):
        prune(model, checkpoint, **QUICK)
    assert hashes(checkpoint) == before


def test_a_refused_restart_leaves_the_checkpoint(tiny_sd3: Path, checkpoint: Path) -> None:
    before = hashes(checkpoint.parent)
    for options in ({"sparsity": 2}, {"pattern": "2:5"}):
        with pytest.raises(InputError):
            prune(tiny_sd3, checkpoint, restart=True, **{**QUICK, **options})
    assert hashes(checkpoint.parent) == before


def test_a_damaged_checkpoint_is_refused_by_name(tiny_sd3: Path, checkpoint: Path) -> None:
    (checkpoint / "obsdiff.json").write_text('{"schema_version": 1')
    with pytest.raises(InputError, match=r"obsdiff\.json cannot be read as JSON"):
        prune(tiny_sd3, checkpoint, **QUICK)
    (checkpoint / "obsdiff.json").write_text('{"schema_version": 99}')
    with pytest.raises(InputError, match=r"schema version 99, newer than this obsdiff reads: upgrade obsdiff"):
        prune(tiny_sd3, checkpoint, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "7:"}, "--blocks 7: selects none of the 3 blocks"),
        ({"include": "nothing"}, "no linear matches --include 'nothing'"),
        ({"exclude": "("}, "--include/--exclude: not a regular expression"),
        ({"pattern": "2:5"}, "the input dimension 32 is not a multiple of 5"),
        ({"seed": 1}, "left from a prune with another recipe"),
    ],
    ids=str,
)
def test_a_wrong_option_is_told_before_what_an_earlier_prune_left(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_sd3, tmp_path / "out", progress=Interrupting(8), **QUICK)
    before = hashes(tmp_path)
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, tmp_path / "out", **{**QUICK, **options})
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("config", [{"num_layers": "many"}, {"patch_size": 0}], ids=str)
def test_a_config_that_is_not_of_its_class_is_refused(
    tiny_sd3: Path, tmp_path: Path, out: Path, config: dict[str, Any]
) -> None:
    model = shutil.copytree(tiny_sd3, tmp_path / "model")
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=r"config\.json"):
        prune(model, out, **QUICK)


@pytest.mark.parametrize("restart", [False, True])
def test_a_working_folder_that_is_not_ours_is_kept(tiny_sd3: Path, tmp_path: Path, restart: bool) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "holiday.png").write_text("keep me")
    with pytest.raises(
        InputError, match=r"out\.partial is not a working folder of obsdiff: remove it, or choose another"
    ):
        prune(tiny_sd3, tmp_path / "out", restart=restart, **QUICK)
    assert hashes(tmp_path).keys() == {"out.partial/holiday.png"}
