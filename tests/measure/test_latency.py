"""Latency: every field that is promised, runs in turn, and stages that are parts of the whole."""

import json
from pathlib import Path
from typing import Any

import pytest

import obsdiff
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.measure import conditions, latency
from obsdiff.measure.latency import STAGES, bench, peak_memory, summarise, time_batch
from obsdiff.progress import Progress
from obsdiff.runtime.generate import call_options
from obsdiff.runtime.pipeline import load

FIELDS = {"path", "backend", "median_ms", "p90_ms", "p99_ms", "stages_ms", "images_per_second", "runs_ms", "ratio"}
FIELDS |= {"ratio_interval", "gpu", "peak_memory_bytes"}
KEYS = {"kind", "environment", "settings", "conditions", "warnings", "interrupted", "results"}


class Counting(Progress):
    """Counts what is announced and what is done."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def start(self, title: str, total: int) -> None:
        self.total += total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


@pytest.fixture(scope="module")
def result(one_block_bundle: Path, one_block_sd3: Path) -> dict[str, Any]:
    progress = Counting()
    paths = [one_block_bundle, one_block_sd3]
    found = bench(paths, batch_size=2, runs=3, warmup=1, num_inference_steps=2, progress=progress, device="cpu")
    assert progress.done == progress.total == 2 * (1 + 1 + 1 + 3)
    return found


def test_a_bench_returns_what_it_promises(result: dict[str, Any], one_block_bundle: Path, one_block_sd3: Path) -> None:
    assert set(result) == KEYS
    assert (result["kind"], result["interrupted"]) == ("bench", False)
    assert result["conditions"]["seconds"] > 0
    assert {"processor", "threads", "torch"} <= set(result["environment"])
    settings = {"batch_size": 2, "runs": 3, "warmup": 1, "device": "cpu", "num_inference_steps": 2, "height": 32}
    assert settings.items() <= result["settings"].items()
    assert [row["path"] for row in result["results"]] == [str(one_block_bundle), str(one_block_sd3)]
    assert [row["backend"] for row in result["results"]] == ["onnxruntime", "torch"]
    for row in result["results"]:
        assert set(row) == FIELDS
        ratios = [a / b for a, b in zip(result["results"][0]["runs_ms"], row["runs_ms"], strict=True)]
        assert row["ratio"] == pytest.approx(sorted(ratios)[1])
        assert row["ratio_interval"] is None  # of 3 runs
        assert set(row["stages_ms"]) == set(STAGES)
        assert len(row["runs_ms"]) == 3
        assert min(row["runs_ms"]) <= row["median_ms"] <= row["p90_ms"] <= row["p99_ms"] <= max(row["runs_ms"])
        assert row["median_ms"] == sorted(row["runs_ms"])[1]
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
    assert json.loads(json.dumps(result)) == result


def test_peak_memory_is_that_of_a_whole_process(result: dict[str, Any]) -> None:
    for row in result["results"]:
        assert 100e6 < row["peak_memory_bytes"] < 16e9


def test_stages_are_parts_of_the_whole(graphless: Path) -> None:
    pipe = load(graphless)
    sample = time_batch(pipe, 2, call_options(pipe, graphless, {"num_inference_steps": 3}))
    assert set(sample) == {"total", *STAGES}
    assert all(value > 0 for value in sample.values())
    assert sample["text_encoding"] + sample["denoising_loop"] + sample["decode"] < sample["total"]
    assert sample["denoiser_call"] < sample["denoising_loop"]


def test_timing_leaves_the_pipeline_as_it_was(graphless: Path) -> None:
    pipe = load(graphless)
    time_batch(pipe, 1, call_options(pipe, graphless, {"num_inference_steps": 1}))
    with pytest.raises(InputError, match="batch 18"):
        time_batch(pipe, 9, call_options(pipe, graphless, {"num_inference_steps": 1}))
    for owner, method in ((pipe, "encode_prompt"), (pipe.transformer, "forward"), (pipe.vae, "decode")):
        assert method not in vars(owner)


def test_paths_take_turns_and_the_first_changes(graphless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    numbers: dict[int, int] = {}

    def recording(pipe: Any, batch_size: int, options: Any) -> dict[str, float]:
        order.append(numbers.setdefault(id(pipe), len(numbers)))
        return time_batch(pipe, batch_size, options)

    monkeypatch.setattr(latency, "time_batch", recording)
    bench([graphless] * 3, runs=4, warmup=2, memory=False, num_inference_steps=1, device="cpu")
    rounds = [order[k : k + 3] for k in range(0, 18, 3)]
    assert len(order) == 18
    assert all(sorted(each) == [0, 1, 2] for each in rounds)
    assert [each[0] for each in rounds] == [rounds[0][0], *((rounds[0][0] + k) % 3 for k in range(1, 6))]


@pytest.mark.parametrize(("calls", "counts"), [(2, None), (3, [1]), (4, [1, 1]), (7, [3, 2])])
def test_ctrl_c_keeps_the_runs_that_were_whole(
    graphless: Path, monkeypatch: pytest.MonkeyPatch, calls: int, counts: list[int] | None
) -> None:
    """Two paths, one warm-up each: the interrupt comes after so many batches."""
    done = 0

    def interrupted(pipe: Any, batch_size: int, options: Any) -> dict[str, float]:
        nonlocal done
        if done == calls:
            raise KeyboardInterrupt
        done += 1
        return dict.fromkeys(("total", *STAGES), 0.001 * done)

    monkeypatch.setattr(latency, "time_batch", interrupted)
    given: dict[str, Any] = {"runs": 5, "warmup": 1, "memory": False, "device": "cpu"}
    if counts is None:
        with pytest.raises(KeyboardInterrupt):
            bench([graphless] * 2, **given)
        return
    found = bench([graphless] * 2, **given)
    assert found["interrupted"] is True
    assert found["settings"]["runs"] == 5
    assert [len(row["runs_ms"]) for row in found["results"]] == counts
    assert found["results"][0]["ratio"] == 1


def test_doubts_are_told_and_kept(graphless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hearing(Progress):
        heard: list[str] = []  # noqa: RUF012

        def message(self, text: str) -> None:
            self.heard.append(text)

    monkeypatch.setattr(conditions, "BUSY", -1.0)
    found = bench([graphless], runs=1, warmup=0, memory=False, device="cpu", progress=Hearing())
    assert "of the cores busy" in found["warnings"][0]
    assert f"warning: {found['warnings'][0]}" in Hearing.heard


def test_several_backends_share_a_run(one_block_bundle: Path, one_block_sd3: Path) -> None:
    paths, progress = [one_block_bundle, one_block_sd3], Counting()
    backends = ["torch", "onnxruntime"]
    given: dict[str, Any] = {"runs": 2, "warmup": 1, "memory": False, "num_inference_steps": 1, "device": "cpu"}
    found = bench(paths, backend=backends, progress=progress, **given)
    labels = [(row["path"], row["backend"]) for row in found["results"]]
    assert labels == [(str(paths[0]), "torch"), (str(paths[0]), "onnxruntime"), (str(paths[1]), "torch")]
    assert progress.done == progress.total


def test_a_bench_without_memory_says_null(graphless: Path) -> None:
    found = obsdiff.bench([str(graphless)], runs=1, warmup=0, memory=False, num_inference_steps=1)
    (row,) = found["results"]
    assert row["peak_memory_bytes"] is None
    assert row["median_ms"] == row["p99_ms"] == row["runs_ms"][0]


def test_percentiles_are_those_of_the_runs() -> None:
    samples = [dict.fromkeys(("total", *STAGES), k / 1000) for k in range(1, 102)]
    found = summarise(samples, 4)
    assert (found["median_ms"], found["p90_ms"], found["p99_ms"]) == pytest.approx((51, 91, 100))
    assert found["stages_ms"] == pytest.approx(dict.fromkeys(STAGES, 51))
    assert found["images_per_second"] == pytest.approx(4 / 0.051)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"runs": 0}, {"warmup": -1}, {"batch_size": -2}, {"paths": []}], ids=str
)
def test_a_bench_of_nothing_is_refused(graphless: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least one path, one run and one picture"):
        bench(**{"paths": [graphless], **options})


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"backend": "openvino"}, "--backend openvino: there are"),
        ({"backend": "onnxruntime"}, "has no ONNX graph"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"batch_size": 9}, "batch 18 is outside"),
        ({"height": 200}, "height 200 is outside .*: 16 to 48 pixels in steps of 8"),
        ({"width": 20}, "width 20 is outside .*: 16 to 48 pixels in steps of 8"),
    ],
    ids=str,
)
def test_a_bench_that_cannot_run_says_why(graphless: Path, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        bench([graphless], memory=False, **options)


def test_a_process_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ObsdiffError, match=r"measuring the memory of .*nothing failed: .*does not exist") as caught:
        peak_memory(tmp_path / "nothing", "auto", "cpu", 1, {})
    assert isinstance(caught.value, InputError)  # the same exit code as without a process
    assert "InputError" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "[" not in str(caught.value)
