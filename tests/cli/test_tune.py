"""obsdiff tune as a user runs it, and --no-build where a bundle is loaded."""

from pathlib import Path
from typing import Any

import pytest

from cli import assert_sentence, call
from obsdiff.measure import tune as tuning
from obsdiff.runtime import pipeline

RESULT: dict[str, Any] = {
    "device": {"kind": "cpu", "name": "a processor", "target": "AVX2"},
    "shapes": [{"axes": {"batch": 2}, "images": 1.0, "height": 32, "width": 48}],
    "backends": [
        {**tuning.ROW, "backend": "torch", "status": "right", "milliseconds": [2.0], "speedups": [1.0], "speedup": 1.0},
        {
            **tuning.ROW,
            "backend": "onnxruntime",
            "status": "right",
            "milliseconds": [1.0],
            "speedups": [2.0],
            "speedup": 2.0,
            "relative_error": 1e-6,
        },
        {**tuning.ROW, "backend": "aoti", "status": "failed", "reason": "its process was killed by SIGSEGV"},
        {**tuning.ROW, "backend": "tensorrt", "status": "left out", "reason": "it needs a CUDA GPU"},
    ],
    "chosen": "onnxruntime",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What tune was called with; it answers with RESULT."""
    given: dict[str, Any] = {}

    def tune(bundle: Path, **options: Any) -> dict[str, Any]:
        given.update(options, bundle=bundle)
        return RESULT

    monkeypatch.setattr(tuning, "tune", tune)
    return given


def test_the_table_has_times_errors_and_reasons(asked: dict[str, Any]) -> None:
    lines = call("tune", "bundle").out.splitlines()
    assert lines[0].split() == ["backend", "1", "of", "48×32", "speed-up", "error"]
    assert lines[1].split() == ["torch", "2.00", "ms", "1.00×"]
    assert lines[2].split() == ["onnxruntime", "1.00", "ms", "2.00×", "1e-06", "fastest"]
    assert lines[3].endswith("failed: its process was killed by SIGSEGV")
    assert lines[4].endswith("left out: it needs a CUDA GPU")
    assert lines[5] == "onnxruntime is recorded for a processor (AVX2)"
    assert (asked["batches"], asked["sizes"], asked["backends"], asked["build"]) == ((), (), (), True)


def test_options_reach_it(asked: dict[str, Any]) -> None:
    words = [
        "--batch",
        1,
        "--batch",
        4,
        "--size",
        "512",
        "--size",
        "768x512",
        "--backends",
        "aoti, torch",
        "--no-build",
        "--require-sparse",
        "90%",
    ]
    assert call("tune", "bundle", *words, "--runs", 3, "--timeout", 9, "--device", "cpu", "--json").json == RESULT
    del asked["progress"]
    assert asked == {
        "bundle": Path("bundle"),
        "batches": [1, 4],
        "sizes": ["512", "768x512"],
        "backends": ["aoti", "torch"],
        "build": False,
        "require_sparse": 0.9,
        "device": "cpu",
        "runs": 3,
        "timeout": 9,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fashion"], "fashion does not exist or is no folder"),
        (["{bundle}", "--size", 7], "--size 7: 7 is no multiple of 4 pixels"),
        (["{bundle}", "--backends", "abacus"], "--backends abacus: there are torch"),
        (["{bundle}", "--backends", ","], "--backends : there are torch"),
        (["{bundle}", "--batch", 1000], "batch 2000 is outside"),
    ],
)
def test_bad_input_gets_one_sentence(one_block_bundle: Path, words: list[object], said: str) -> None:
    filled = [str(word).format(bundle=one_block_bundle) for word in words]
    assert_sentence(call("tune", *filled, "--device", "cpu"), 2, said)


@pytest.mark.parametrize(("words", "build"), [([], True), (["--no-build"], False)])
def test_run_may_be_forbidden_to_build(
    one_block_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], build: bool
) -> None:
    seen: list[dict[str, Any]] = []

    def load_backend(*given: Any, **options: Any) -> None:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_backend", load_backend)
    result = call("run", one_block_bundle, "a bag", "--out", tmp_path / "x.png", "--device", "cpu", *words)
    assert result.code == 130
    assert [options["build"] for options in seen] == [build]
    assert "backend: onnxruntime, the first that is ready (obsdiff tune finds the fastest)" in result.err
