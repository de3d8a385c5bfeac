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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give paths or --url"),
        (("x", "--url", "http://h"), "give paths or --url"),
        (("--url", "http://h", "--runs", 3), "--runs goes with PATH, not with --url"),
        (("--url", "http://h", "--height", 64), "--height goes with PATH or --scenario, not with --url"),
        (("x", "--rate", 2), "--rate goes with --url or --scenario, not with PATH"),
        (("x", "--clients", 1), "--clients goes with --url, not with PATH"),
        (("x", "--scenario", "offline", "--plot", "x.png"), "--plot goes with --url, not with --scenario"),
        (("x", "y", "--scenario", "offline"), "--scenario takes one path"),
        (("--url", "http://h", "--scenario", "offline"), "--scenario is for a path"),
        (("x", "--scenario", "everything"), "there are single-stream, offline, server"),
        (("x", "--scenario", "server"), "needs --rate"),
        (("x", "--scenario", "server", "--rate", 1, "--rate", 2), "a scenario takes one"),
        (("x", "--scenario", "offline", "--bound", 1), "go with --scenario server"),
        (("--url", "h:8000"), "give it whole"),
        (("--url", "http://h", "--plot", "x.bmp"), "name it .png"),
        (("--url", "http://h", "--api-key-file", "/nowhere/key"), "No such file"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(arguments: tuple[object, ...], words: str) -> None:
    assert_sentence(call("bench", *arguments), 2, words)


def test_an_option_at_its_default_is_still_given() -> None:
    assert_sentence(call("bench", "--url", "http://h", "--runs", 10), 2, "--runs goes with PATH")


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    assert_sentence(call("bench", "--url", "http://127.0.0.1:1"), 1, "cannot be reached")


@pytest.mark.parametrize(
    ("scenario", "batch"), [(("single-stream",), 1), (("offline",), 8), (("server", "--rate", 100, "--bound", 600), 8)]
)
def test_a_scenario_draws_what_was_asked_for(journey: Journey, scenario: tuple[object, ...], batch: int) -> None:
    few = ("--requests", 5, "--warmup", 0, "--steps", 2, "--device", "cpu")
    result = call("bench", journey.bundle, "--scenario", *scenario, *few, "--json")
    assert result.code == 0, result.err
    document = result.json
    assert (document["scenario"], document["backend"], document["max_batch_size"]) == (
        scenario[0],
        "onnxruntime",
        batch,
    )
    assert len(document["latencies_ms"]) == 5
    assert document["settings"]["num_inference_steps"] == 2
    assert document["within_bound"] is (True if "--bound" in scenario else None)
    assert (document["p90_ms"] is None) == (scenario[0] == "offline")


def test_a_bound_that_is_not_kept_is_a_gate(journey: Journey) -> None:
    few = ("--requests", 2, "--warmup", 0, "--steps", 2, "--device", "cpu", "--rate", 100, "--bound", 0.001)
    result = call("bench", journey.bundle, "--scenario", "server", *few)
    assert result.code == 3
    assert "not within the bound of 0.001 s" in result.err
    assert "server" in result.out
