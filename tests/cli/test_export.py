"""obsdiff export: the path of the issue, its table and its JSON, and what stays when it fails."""

import json
import re
import shutil
from pathlib import Path

import pytest
from disk import full_disk

from cli import Result, assert_sentence, call, tree
from obsdiff.export.bundle import open_bundle

from .conftest import Journey


@pytest.fixture(scope="module")
def small(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A bundle of the model with one block, and what the command said."""
    bundle = tmp_path_factory.mktemp("export") / "bundle"
    engine = ("--format", "onnx", "--format", "tensorrt-rtx", "--sm", "8.6,89")
    return bundle, call("export", one_block_sd3, bundle, "--batch", "1:1:2", "--size", "16:32:48", *engine)


def test_the_path_of_the_issue_exports(journey: Journey) -> None:
    assert journey.export.code == 0, journey.export.err
    assert journey.export.json == json.loads((journey.bundle / "manifest.json").read_text())
    manifest = open_bundle(journey.bundle)
    assert list(manifest.formats) == ["onnx"]
    assert manifest.recipe
    assert (manifest.recipe["pattern"], manifest.recipe["solver"]) == ("2:4", "obs")
    assert manifest.formats["onnx"].relative_error <= manifest.formats["onnx"].tolerance


def test_progress_goes_to_standard_error(journey: Journey) -> None:
    steps = journey.export.err.splitlines()
    assert {"shrinking", "tracing to onnx", "checking onnx", "hashing"} <= set(steps)
    assert steps == list(dict.fromkeys(steps))


def test_the_table_says_what_became_smaller_and_how_far_it_is_from_pytorch(small: tuple[Path, Result]) -> None:
    bundle, result = small
    assert result.code == 0, result.err
    manifest = open_bundle(bundle)
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in result.out.splitlines())}
    assert rows["parameters"][-1] == "1.00"
    assert {"parameters", "nonzero", "MACs a call", "weights"} <= rows.keys()
    assert f"{manifest.formats['onnx'].relative_error:.1e}" in result.out
    assert f"{manifest.formats['onnx'].max_difference:.1e}" in result.out


def test_batch_and_size_become_the_axes_of_the_graph(small: tuple[Path, Result]) -> None:
    manifest = open_bundle(small[0])
    scale = manifest.vae_scale
    batch, height = manifest.axes["batch"], manifest.axes["height"]
    assert (batch.min, batch.opt, batch.max) == (1, 2, 4), "a call with guidance takes two inputs an image"
    assert (height.min * scale, height.opt * scale, height.max * scale) == (16, 32, 48)


def test_an_engine_is_built_for_gpus_that_are_not_there(small: tuple[Path, Result]) -> None:
    bundle, result = small
    (engine,) = open_bundle(bundle).engines
    assert (engine.key.format, engine.key.target, engine.check) == ("tensorrt-rtx", "sm_86+sm_89", None)
    assert (bundle / engine.path).stat().st_size > 100_000
    assert engine.key.profile == open_bundle(bundle).axes
    assert "the tensorrt-rtx engine for sm_86+sm_89 was built and not run: it runs on a CUDA GPU" in result.err
    assert re.search(r"tensorrt-rtx for sm_86\+sm_89 .*\n.*not run here", result.out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "tensorrt-rtx", "--sm", "hopper"), ("--sm hopper", "86,89")),
        (("--format", "tensorrt-rtx", "--sm", "90"), ("--sm 90", "--format tensorrt")),
        (("--format", "tensorrt-rtx", "--sm", "75"), ("--sm 75", "fp16")),
        (("--format", "tensorrt-rtx", "--refit"), ("--refit", "GPU")),
        (("--format", "tensorrt-rtx", "--version-compatible"), ("--version-compatible", "--format tensorrt")),
        (("--hardware-compatible",), ("--hardware-compatible", "--format tensorrt")),
        (("--weight-streaming",), ("--weight-streaming", "--format tensorrt or tensorrt-rtx")),
        (("--format", "tensorrt-rtx", "--timing-cache", "t"), ("--timing-cache", "--format tensorrt")),
    ],
    ids=str,
)
def test_options_of_engines_are_checked_before_anything_is_loaded(
    tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_sentence(call("export", tmp_path / "no model", tmp_path / "bundle", *options), 2, *words)


def test_a_bundle_is_kept_unless_forced(small: tuple[Path, Result], one_block_sd3: Path) -> None:
    bundle, _ = small
    before = tree(bundle.parent)
    assert_sentence(call("export", one_block_sd3, bundle), 2, "is a bundle already", "--force")
    assert_sentence(call("export", one_block_sd3, bundle, "--force", "--format", "wings"), 2, "wings", "onnx")
    assert tree(bundle.parent) == before


def test_a_bundle_cannot_be_exported_again(small: tuple[Path, Result], tmp_path: Path) -> None:
    assert_sentence(call("export", small[0], tmp_path / "again"), 2, "is a bundle")
    assert not tree(tmp_path)


@pytest.mark.parametrize("name", ["masks.safetensors", "obsdiff.json"])
def test_a_damaged_checkpoint_is_not_exported(journey: Journey, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(journey.checkpoint, tmp_path / "copy")
    (copy / name).write_bytes((copy / name).read_bytes()[:50])
    assert_sentence(call("export", copy, tmp_path / "bundle"), 2, name)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_nothing(one_block_sd3: Path, tmp_path: Path) -> None:
    with full_disk(50_000):
        result = call("export", one_block_sd3, tmp_path / "bundle")
    assert_sentence(result, 1)
    assert not tree(tmp_path)
