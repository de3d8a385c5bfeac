"""obsdiff eval: a table, JSON, gates, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from cli import assert_sentence, call

from .conftest import Journey

QUICK = ("--num-images", 4, "--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def evaluated(journey: Journey, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("eval") / "q"
    gates = ("--min", "psnr=1", "--max", "latent_error=1e-9", "--min", "kid=0")
    paths = (journey.checkpoint, journey.bundle)
    return call("eval", *paths, "--reference", "fashion", *QUICK, *gates, "--out", folder, "--json"), folder


def test_gates_are_told_one_by_one_after_the_result(evaluated: tuple[Any, Path], journey: Journey) -> None:
    result, folder = evaluated
    assert result.code == 3
    last = result.err.splitlines()[-1]
    for path in (journey.checkpoint, journey.bundle):
        assert f"{path}: latent_error is" in last
        assert f"{path}: kid could not be computed" in last
    assert "psnr" not in last
    assert [row["backend"] for row in result.json["results"]] == ["torch", "onnxruntime"]
    assert (folder / "eval.json").exists()
    (checkpoint, bundle) = (row["metrics"]["latent_mse"]["value"] for row in result.json["results"])
    assert bundle == pytest.approx(checkpoint, rel=0.02)  # the same weights in another engine


def test_the_table_has_a_row_a_metric_and_a_column_a_path(journey: Journey) -> None:
    options = ("--metrics", "psnr, ssim", "--metrics", "item_accuracy,fid", "--min", "ssim=-1")
    result = call("eval", journey.checkpoint, "--reference", "fashion", *QUICK, *options)
    assert result.code == 0, result.err
    title, header, *rows = (line for line in result.out.splitlines() if line.strip())
    assert title.startswith("4 images a path, 2 steps, guidance 4.0, 32×32")
    assert header.split() == ["metric", "better", "images", "fashion", "(reference)", "out"]
    assert sorted(row.split()[0] for row in rows) == ["item_accuracy", "psnr", "ssim"]
    assert all(row.split()[1:3] == ["higher", "4"] and " to " in row for row in rows)
    assert "skipped fid: it needs at least 2048 images" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x",), "x does not exist"),
        (("fashion",), "fashion is given twice"),
        (("x", "--min", "psnr"), "--min psnr: write it as METRIC=VALUE"),
        (("x", "--max", "psnr=much"), "much is no number"),
        (("x", "--max", "psnr=nan"), "finite"),
        (("x", "--min", "psnr=1", "--min", "psnr=2"), "psnr is given twice"),
        (("x", "--weights", "fid"), "--weights fid: write it as METRIC=PATH"),
        (("x", "--metrics", "beauty"), "there is no metric beauty"),
        (("x", "--device", "toaster"), "--device toaster"),
    ],
    ids=str,
)
def test_bad_input_is_a_sentence(arguments: tuple[object, ...], words: str) -> None:
    assert_sentence(call("eval", *arguments, "--reference", "fashion"), 2, words)
