"""Two files of a bench: rows that belong together, ratios, and what else was different."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff.errors import InputError
from obsdiff.measure.compare import compare


def row(path: str, backend: str, milliseconds: float, memory: int | None = 1 << 30) -> dict[str, Any]:
    runs = (milliseconds * np.linspace(0.9, 1.1, 11)).tolist()
    median = float(np.median(runs))
    return {
        "path": path,
        "backend": backend,
        "median_ms": median,
        "p90_ms": float(np.percentile(runs, 90)),
        "p99_ms": runs[-1],
        "images_per_second": 1000 / median,
        "runs_ms": runs,
        "peak_memory_bytes": memory,
    }


def write(path: Path, *rows: dict[str, Any], **changes: Any) -> Path:
    bench = {
        "kind": "bench",
        "environment": {"processor": "x", "torch": "2.13"},
        "settings": {"batch_size": 1, "num_inference_steps": 20},
        "results": list(rows),
    }
    path.write_text(json.dumps(bench | changes))
    return path


def test_rows_are_matched_by_the_name_of_their_path_and_backend(tmp_path: Path) -> None:
    a = write(tmp_path / "a", row("/here/dense", "torch", 100), row("x/2-4", "torch", 80), row("dense", "aoti", 1))
    b = write(tmp_path / "b", row("2-4", "torch", 40, None), row("/there/dense/", "torch", 100), row("new", "torch", 9))
    found = compare(a, b)
    assert [(one["path"], one["backend"]) for one in found["rows"]] == [("dense", "torch"), ("2-4", "torch")]
    dense, pruned = found["rows"]
    assert dense["ratio"] == pytest.approx(1)
    assert pruned["ratio"] == pytest.approx(2)
    assert pruned["ratio_interval"][0] < 2 < pruned["ratio_interval"][1]
    assert pruned["median_ms"] == pytest.approx([80, 40])
    assert pruned["peak_memory_bytes"] == [1 << 30, None]
    assert (found["only_a"], found["only_b"]) == (["dense on aoti"], ["new on torch"])
    assert found["differences"] == []
    assert json.loads(json.dumps(found)) == found


def test_rows_of_one_name_are_matched_in_their_order(tmp_path: Path) -> None:
    a = write(tmp_path / "a", row("x/dense", "torch", 10), row("y/dense", "torch", 30))
    assert [one["ratio"] for one in compare(a, a)["rows"]] == [1, 1]


def test_what_else_was_different_is_told(tmp_path: Path) -> None:
    one = row("dense", "torch", 10)
    a = write(tmp_path / "a", one, warnings=["it was hot"])
    b = write(
        tmp_path / "b",
        one,
        environment={"processor": "y", "torch": "2.13", "gpu": "H"},
        settings={"batch_size": 4, "num_inference_steps": 20},
        interrupted=True,
    )
    assert compare(a, b)["differences"] == [
        "settings: batch_size is 1 and 4",
        "environment: processor is x and y",
        "environment: gpu is not there and H",
        f"{b} was interrupted",
        f"{a}: it was hot",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no file of obsdiff bench"),
        ('{"kind": "eval"}', "kind: Input should be 'bench'"),
        ('{"kind": "bench", "environment": {}, "settings": {}, "results": []}', "results: List should have"),
        ('{"kind": "bench", "environment": {}, "settings": {}, "results": [{"path": "x"}]}', "backend: Field required"),
    ],
)
def test_a_file_that_is_no_bench_is_refused(tmp_path: Path, text: str, words: str) -> None:
    good = write(tmp_path / "good", row("dense", "torch", 10))
    (tmp_path / "bad").write_text(text)
    for pair in ((good, tmp_path / "bad"), (tmp_path / "bad", good)):
        with pytest.raises(InputError, match=words) as caught:
            compare(*pair)
        assert str(tmp_path / "bad") in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(tmp_path: Path, value: float) -> None:
    bad = write(tmp_path / "bad", row("dense", "torch", 10) | {"median_ms": value})
    with pytest.raises(InputError, match="median_ms"):
        compare(bad, bad)


def test_files_without_a_common_row_and_missing_files_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", row("dense", "torch", 10)), write(tmp_path / "b", row("dense", "aoti", 10))
    with pytest.raises(InputError, match="in common: dense on torch against dense on aoti"):
        compare(a, b)
    with pytest.raises(InputError, match="nothing is missing"):
        compare(a, tmp_path / "nothing")
