"""obsdiff bench: several paths in one run, as a table and as JSON."""

import errno
import json
import os
from pathlib import Path
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
    ratio = {"ratio": 1.0, "ratio_interval": None, "runs_ms": [1.0]}
    row = {"path": "x", "stages_ms": dict.fromkeys(STAGES, 1.0), **times, **ratio}
    results = [{**row, "backend": backend} for backend in backends]
    return {
        "kind": "bench",
        "environment": {},
        "settings": {"runs": 5},
        "warnings": [],
        "interrupted": False,
        "results": results,
    }


@pytest.mark.parametrize("as_json", [False, True])
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
    monkeypatch: pytest.MonkeyPatch, backends: tuple[str, ...], note: str, as_json: bool
) -> None:
    monkeypatch.setattr(latency, "bench", lambda *given, **options: measured(*backends))
    result = call("bench", *("x" for _ in backends), *(["--json"] if as_json else []))
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
        (("--compare", "a", "b", "x"), "give paths or --url or --compare"),
        (("--compare", "a", "b", "--url", "http://h"), "give paths or --url or --compare"),
        (("--compare", "a", "b", "--runs", 3), "--runs goes with PATH, not with --compare"),
        (("--compare", "a", "b", "--out", "c"), "--out goes with PATH or --url or --scenario, not with --compare"),
        (("--compare", "/nowhere/a", "/nowhere/b"), "/nowhere/a is missing"),
        (("x", "--out", "/nowhere/x.json"), "the folder does not exist"),
        (("x", "--out", "/dev/null"), "is a folder or a device"),
        (("x", "--out", "/"), "is a folder or a device"),
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
    assert (document["kind"], document["scenario"]) == ("scenario", scenario[0])
    (row,) = document["results"]
    assert (row["backend"], row["max_batch_size"]) == ("onnxruntime", batch)
    assert len(row["latencies_ms"]) == 5
    assert document["settings"]["num_inference_steps"] == 2
    assert row["within_bound"] is (True if "--bound" in scenario else None)
    assert (row["p90_ms"] is None) == (scenario[0] == "offline")


def test_a_bound_that_is_not_kept_is_a_gate(journey: Journey) -> None:
    few = ("--requests", 2, "--warmup", 0, "--steps", 2, "--device", "cpu", "--rate", 100, "--bound", 0.001)
    result = call("bench", journey.bundle, "--scenario", "server", *few)
    assert result.code == 3
    assert "not within the bound of 0.001 s" in result.err
    assert "100/s" in result.out


def test_a_rate_is_searched_for_a_bound(journey: Journey) -> None:
    few = ("--requests", 3, "--warmup", 1, "--steps", 1, "--device", "cpu", "--backend", "torch", "--json")
    result = call("bench", journey.bundle, "--scenario", "server", "--bound", 60, *few)
    assert result.code == 0, result.err
    (row,) = result.json["results"]
    assert row["rate"] > 0
    assert len(row["probes"]) == 6


def test_a_path_that_is_wrong_is_all_that_is_said() -> None:
    for kind in ((), ("--scenario", "offline")):
        result = call("bench", "nowhere", *kind)
        assert_sentence(result, 2, "nowhere does not exist")
        assert result.err.count("\n") == 1


LIGHT = ("--steps", 1, "--warmup", 0, "--device", "cpu", "--runs", 6)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "peak_memory", lambda *_: 1 << 30)


@pytest.mark.usefixtures("quick")
def test_what_is_written_is_what_is_printed_and_compares_with_itself(graphless: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    backends = ("--backend", "torch", "--backend", "onnxruntime")
    result = call("bench", graphless, graphless, *LIGHT, *backends, "--out", out, "--json")
    assert result.code == 0, result.err
    assert json.loads(out.read_text()) == result.json
    assert result.json["kind"] == "bench"
    assert result.err.count("left out: ") == 2
    assert "mixes backends" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json"]
    table = call("bench", "--compare", out, out)
    assert table.code == 0, table.err
    assert "1.00× (" in table.out
    found = call("bench", "--compare", out, out, "--json").json
    assert [(row["path"], row["backend"]) for row in found["rows"]] == [(graphless.name, "torch")] * 2
    assert call("bench", graphless, *LIGHT, "--out", out).code == 0  # again, over the old one


@pytest.mark.parametrize("text", ["notes", "[]", '{"kind": "eval"}'])
def test_a_file_that_is_something_else_is_not_written_over(tmp_path: Path, text: str) -> None:
    out = tmp_path / "x.json"
    out.write_text(text)
    assert_sentence(call("bench", "fashion", *LIGHT, "--out", out), 2, "is no result of obsdiff bench")
    assert out.read_text() == text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("second", [False, True])
def test_ctrl_c_writes_what_was_measured_and_a_second_ends_at_once(
    graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bool
) -> None:
    out, calls, real = tmp_path / "x.json", 0, latency.time_batch

    def pressed(*given: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*given)

    def pressed_again(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "time_batch", pressed)
    if second:
        monkeypatch.setattr(os, "fsync", pressed_again)
    result = call("bench", graphless, *LIGHT, "--out", out)
    assert result.code == 130
    assert "Traceback" not in result.err
    if second:
        assert list(tmp_path.iterdir()) == []
        return
    document = json.loads(out.read_text())
    assert (document["interrupted"], len(document["results"][0]["runs_ms"])) == (True, 3)
    assert f"3 of 6 runs of each, kept in {out}" in result.err
    assert graphless.name in result.out


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fills_up_hides_no_number(graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = call("bench", graphless, *LIGHT, "--out", tmp_path / "x.json")
    assert result.code == 1
    assert "No space left" in result.err
    assert "1.00×" in result.out
    assert list(tmp_path.iterdir()) == []
