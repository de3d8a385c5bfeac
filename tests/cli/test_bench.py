"""obsdiff bench: several paths in one run, as a table and as JSON."""

from typing import Any

import pytest

from cli import assert_sentence, call
from obsdiff.measure import latency

from .conftest import Journey

ONCE = ("--runs", 2, "--warmup", 0, "--steps", 2, "--device", "cpu")
STAGES = {"text_encoding", "denoising_loop", "denoiser_call", "decode"}


def measured(*backends: str) -> dict[str, Any]:
    """What a bench of as many paths returns, made up."""
    times = dict.fromkeys(("median_ms", "p90_ms", "p99_ms", "images_per_second", "peak_memory_bytes"), 1.0)
    row = {"path": "x", "stages_ms": dict.fromkeys(STAGES, 1.0), **times}
    return {"environment": {}, "settings": {}, "results": [{**row, "backend": backend} for backend in backends]}


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize(
    ("backends", "note"),
    [
        (
            ("torch", "onnxruntime", "torch"),
            "the speed-up mixes backends (torch, onnxruntime): export the dense model too",
        ),
        (("onnxruntime", "onnxruntime"), ""),
        (("torch",), ""),
    ],
    ids=str,
)
def test_a_speed_up_between_backends_is_told_once(
    monkeypatch: pytest.MonkeyPatch, backends: tuple[str, ...], note: str, json: bool
) -> None:
    monkeypatch.setattr(latency, "bench", lambda *given, **options: measured(*backends))
    result = call("bench", *("x" for _ in backends), *(["--json"] if json else []))
    assert (result.code, result.err.strip()) == (0, note)
    assert note not in result.out or not note


@pytest.fixture(scope="module")
def document(journey: Journey) -> Any:
    result = call("bench", "fashion", journey.bundle, *ONCE, "--batch-size", 2, "--json")
    assert result.code == 0, result.err
    assert "run 1/2" in result.err
    return result.json


@pytest.mark.slow
def test_every_path_is_measured_in_all_its_parts(journey: Journey, document: Any) -> None:
    model, bundle = document["results"]
    assert (model["path"], bundle["path"]) == ("fashion", str(journey.bundle))
    assert (model["backend"], bundle["backend"]) == ("torch", "onnxruntime")
    for row in document["results"]:
        assert len(row["runs_ms"]) == 2
        assert min(row["runs_ms"]) <= row["median_ms"] <= row["p90_ms"] <= row["p99_ms"] <= max(row["runs_ms"])
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["stages_ms"].keys() == STAGES
        assert all(value > 0 for value in row["stages_ms"].values())
        assert row["stages_ms"]["denoiser_call"] < row["stages_ms"]["denoising_loop"] < row["median_ms"]
        assert row["peak_memory_bytes"] > 50e6


@pytest.mark.slow
def test_the_document_says_where_and_how_it_was_measured(document: Any) -> None:
    assert document["settings"].items() >= {"batch_size": 2, "runs": 2, "warmup": 0, "num_inference_steps": 2}.items()
    assert {"system", "processor", "cores", "threads", "torch", "obsdiff"} <= document["environment"].keys()


@pytest.mark.slow
def test_the_table_compares_with_the_first_path(journey: Journey) -> None:
    result = call("bench", journey.bundle, *ONCE)
    assert result.code == 0, result.err
    header, row = (line for line in result.out.splitlines() if line.strip())
    assert header.split()[:5] == ["path", "backend", "median", "p90", "p99"]
    assert row.split()[:2] == [str(journey.bundle), "onnxruntime"]
    assert "1.00×" in row


def test_a_path_that_is_wrong_stops_it_before_anything_is_timed(journey: Journey) -> None:
    result = call("bench", journey.bundle, "nowhere", *ONCE)
    assert_sentence(result, 2, "nowhere does not exist")
    assert "run 1" not in result.err


def test_a_backend_for_what_is_no_bundle_is_refused() -> None:
    assert_sentence(call("bench", "fashion", "--backend", "onnxruntime", *ONCE), 2, "fashion is not a bundle")
