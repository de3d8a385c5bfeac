"""Tuning: the fastest backend that is right is recorded, whatever the others do, and nothing else is changed."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import obsdiff
from obsdiff.device import describe
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import engines
from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.export.inspect import inspect
from obsdiff.export.receipt import Evidence, read_receipt
from obsdiff.measure import tune as tuning
from obsdiff.measure import tune_process
from obsdiff.measure.tune import tune, tuned_shapes
from obsdiff.measure.tune_process import Worker
from obsdiff.progress import Progress
from obsdiff.runtime.backends import find_tuned
from obsdiff.runtime.pipeline import load

# Formats whose engines do what a library may do: what they do is in their names. Found by the workers on PYTHONPATH.
FAKES = """
import os, signal, sys, types
import torch
from obsdiff.export import engines

def dies(*given): os.kill(os.getpid(), signal.SIGSEGV)

def is_nan(*given): return lambda **inputs: torch.full_like(inputs["hidden_states"], float("nan"))

def remembers(path, manifest, *given):
    from obsdiff.runtime.backends import load_backend
    slow, known = load_backend("onnxruntime", path.parents[1], manifest, "cpu"), {}
    def denoise(**inputs):
        key = tuple((tuple(value.shape), float(value.double().sum())) for value in inputs.values())
        if key not in known:
            known[key] = slow(**inputs)
        return known[key].clone()
    return denoise

for name, opens in {"aoti": dies, "torch-tensorrt": is_nan, "tensorrt": remembers}.items():
    module = types.ModuleType("fake_" + opens.__name__)
    key = types.SimpleNamespace(format=name)
    module.make_key = lambda *given, key=key: key
    module.open_engine = opens
    sys.modules[module.__name__] = module
    engines.FORMATS[name] = module.__name__
engines.find_engine = lambda name, bundle, *given: (types.SimpleNamespace(format=name), bundle / "engines" / name)
"""


@pytest.fixture(scope="module")
def tuned(one_block_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle that was tuned, with processes and all, and the result. To read, not to change."""
    folder = tmp_path_factory.mktemp("tuned")
    bundle = Path(shutil.copytree(one_block_bundle, folder / "bundle"))
    (folder / "fakes").mkdir()
    (folder / "fakes" / "sitecustomize.py").write_text(FAKES)
    names = ["torch-sparse", "tensorrt", "torch-tensorrt", "aoti"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "fakes"))
        patch.setattr(tuning, "obstacle", lambda name, *_: "not installed" if name == "torch-sparse" else "")
        return bundle, obsdiff.tune(bundle, backends=names, batches=[1, 2], device="cpu", runs=2)


class Scripted:
    """A worker without a process: takes `TIMES` milliseconds, or raises what stands there."""

    TIMES: Mapping[str, Any] = {}
    left: int = 0

    def __init__(self, request: Mapping[str, Any], *_: Any):
        self.backend, self.ended = request["backend"], False

    def __enter__(self) -> "Scripted":
        type(self).left += 1
        return self

    def __exit__(self, *_: Any) -> None:
        type(self).left -= 1

    def ask(self, do: str, **words: Any) -> Any:
        taken = self.TIMES[self.backend]
        if isinstance(taken, BaseException) and do in ("time", "reference"):
            self.ended = isinstance(taken, EOFError)
            raise ObsdiffError("gone") if self.ended else taken
        if do == "time":
            return taken[words["axes"]["batch"] // 2 - 1]
        return {"load": 1.0, "check": {"relative_error": 1e-6}}.get(do)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(tuning, "Worker", Scripted)
    monkeypatch.setattr(tuning, "obstacle", lambda *_: "")
    monkeypatch.setattr(tuning, "_foreign", lambda *_: "")
    monkeypatch.setattr(Scripted, "left", 0)
    return Scripted


@pytest.fixture
def bundle(one_block_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_block_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def manifest(one_block_bundle: Path) -> Manifest:
    return open_bundle(one_block_bundle)


def test_a_backend_that_crashes_or_is_wrong_takes_nothing_with_it(tuned: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["backend"]: row for row in tuned[1]["backends"]}
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "torch": "right",
        "torch-sparse": "left out",
        "tensorrt": "right",
        "torch-tensorrt": "failed",
        "aoti": "failed",
    }
    assert rows["aoti"]["reason"].startswith("its process was killed by SIGSEGV")
    assert "gives NaN or infinity at batch 2, height 8" in rows["torch-tensorrt"]["reason"]
    assert rows["torch-sparse"]["reason"] == "not installed"
    assert rows["tensorrt"]["relative_error"] < 1e-5
    assert tuned[1]["chosen"] == "tensorrt"  # it remembers, so nothing is faster
    assert [(shape["images"], shape["height"]) for shape in tuned[1]["shapes"]] == [(1, 32), (2, 32)]
    json.dumps(tuned[1])


def test_the_record_is_in_the_manifest_and_the_bundle_still_opens(tuned: tuple[Path, dict[str, Any]]) -> None:
    bundle, result = tuned
    manifest = open_bundle(bundle)
    record = find_tuned(manifest, "cpu")
    assert record
    assert record.backend == "tensorrt"
    assert record.milliseconds.keys() == {"torch", "tensorrt"}
    assert record.shapes == [shape["axes"] for shape in result["shapes"]]
    assert record.versions.keys() >= {"obsdiff", "torch", "onnxruntime"}
    assert load(bundle, device="cpu").obsdiff_backend == "onnxruntime"  # there is no TensorRT here
    assert not [path.name for path in bundle.iterdir() if path.name.startswith(".")]


def wait_for(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float = 60) -> Worker:
    """A worker that does what a shell script does, in no time."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(tune_process.sys, "executable", str(program))
    return Worker({"backend": "aoti"}, tmp_path / "log", timeout, Progress())


def test_a_worker_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, so its libraries cannot tidy up: AOTInductor unpacks each engine that it loads."""
    said = tmp_path / "said"
    script = f"mktemp -d > {said}.part; mv {said}.part {said}; sleep 100"
    with start(script, tmp_path, monkeypatch):
        wait_for(said.exists)
        left = Path(said.read_text().strip())
        assert left.is_dir()
    assert not left.exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo the library gives up >&2; exit 7", "its process ended with exit code 7: the library gives up"),
        ("exit 0", "its process ended with exit code 0"),
        ("kill -KILL $$", "its process was killed by SIGKILL, as the system does when memory runs out"),
        ("kill -ABRT $$", "its process was killed by SIGABRT"),
        ("(sleep 100) & exit 3", "its process ended with exit code 3"),
    ],
)
def test_how_a_process_ended_is_said(script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(script, tmp_path, monkeypatch) as worker:
        for _ in range(2):
            with pytest.raises(ObsdiffError) as caught:
                worker.ask("load")
            assert str(caught.value) == words
        assert worker.ended


def test_a_worker_that_does_not_answer_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(f"sleep 100 & echo $! > {tmp_path}/child; sleep 100", tmp_path, monkeypatch, timeout=0.1) as worker:
        with pytest.raises(ObsdiffError, match=r"^no answer within 0\.1 seconds$"):
            worker.ask("load")
        assert worker.ended
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


@given(
    runs=st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 10)), min_size=1, max_size=9), speed=st.floats(0.1, 10)
)
def test_a_machine_that_drifts_changes_no_speed_up(runs: list[tuple[float, float]], speed: float) -> None:
    theirs = [time * drift for time, drift in runs]
    found = tuning._times([[time / speed for time in theirs]], [theirs])
    assert found["speedup"] == pytest.approx(speed)
    assert found["speedups"] == pytest.approx([speed])
    assert found["milliseconds"] == pytest.approx([median(theirs) / speed])


@pytest.mark.parametrize(
    ("onnxruntime", "aoti", "chosen"),
    [
        ((2, 2), (1, 9), "onnxruntime"),
        ((2, 2), (1, 3), "aoti"),
        ((9, 9), (8, 8), "torch"),
        ((1, 1), (2, 2), "onnxruntime"),
    ],
)
def test_the_best_over_all_shapes_is_taken(
    bundle: Path, scripted: type[Scripted], onnxruntime: tuple[int, int], aoti: tuple[int, int], chosen: str
) -> None:
    scripted.TIMES = {"torch": (4, 4), "onnxruntime": onnxruntime, "aoti": aoti}
    result = tune(bundle, backends=list(scripted.TIMES), batches=[1, 2], device="cpu", runs=3)
    assert result["chosen"] == open_bundle(bundle).tuned[0].backend == chosen
    assert {row["backend"]: tuple(row["milliseconds"]) for row in result["backends"]} == scripted.TIMES


def test_a_device_keeps_one_record_and_others_keep_theirs(bundle: Path, scripted: type[Scripted]) -> None:
    for times, best in (
        ({"torch": [2], "onnxruntime": [1]}, "onnxruntime"),
        ({"torch": [1], "onnxruntime": [2]}, "torch"),
    ):
        value = json.loads((bundle / "manifest.json").read_text())
        other = {**describe("cpu")._asdict(), "name": "another", "threads": 1, "shapes": [], "backend": "aoti"}
        value["tuned"] = [{**other, "milliseconds": {}, "versions": {}}, *value["tuned"][-1:]]
        (bundle / "manifest.json").write_text(json.dumps(value))
        scripted.TIMES = times
        assert tune(bundle, backends=list(times), device="cpu", runs=1)["chosen"] == best
        assert [record.backend for record in open_bundle(bundle).tuned] == ["aoti", best]


def test_what_torch_sparse_told_goes_into_the_receipt(
    bundle: Path, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_receipt(bundle, open_bundle(bundle))
    assert before
    assert before.summary.sparse is None
    name = before.layers[0].name
    told = Evidence(source="torch-sparse: timings", kernels={name: "sparse"}, dense_ms={name: 2}, sparse_ms={name: 1})
    monkeypatch.setattr(tuning.torch_sparse, "examine", lambda *_: told)
    scripted.TIMES = {"torch": [2], "torch-sparse": [1]}
    assert tune(bundle, backends=list(scripted.TIMES), device="cpu", runs=1)["chosen"] == "torch-sparse"
    after = read_receipt(bundle, open_bundle(bundle))
    assert after
    assert after.summary.sparse == 1
    assert after.summary.evidence == "torch-sparse: timings"
    assert (after.layers[0].kernel, after.layers[0].dense_ms, after.layers[0].sparse_ms) == ("sparse", 2, 1)
    assert inspect(bundle)["about"][f"tuned on {describe('cpu').name}"] == "torch-sparse: 1 ms (2.00 × torch)"


def test_what_was_not_asked_for_is_not_taken(bundle: Path, scripted: type[Scripted]) -> None:
    scripted.TIMES = {"torch": [1], "onnxruntime": [5]}
    result = tune(bundle, backends=["onnxruntime"], device="cpu", runs=1)
    assert [row["backend"] for row in result["backends"]] == ["torch", "onnxruntime"]
    assert result["chosen"] == "onnxruntime"


@pytest.mark.parametrize(
    ("times", "error", "words"),
    [
        ({"torch": [1], "onnxruntime": KeyboardInterrupt()}, KeyboardInterrupt, None),
        (
            {"torch": ObsdiffError("no memory"), "onnxruntime": [1]},
            ObsdiffError,
            "torch, which .* does not run: no mem",
        ),
        ({"torch": [1], "onnxruntime": ObsdiffError("bad")}, ObsdiffError, "no backend to record: onnxruntime: bad"),
    ],
    ids=["interrupted", "no reference", "none is right"],
)
def test_without_a_result_the_bundle_is_as_it_was(
    bundle: Path, scripted: type[Scripted], times: dict[str, Any], error: type[BaseException], words: str | None
) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    scripted.TIMES = times
    with pytest.raises(error, match=words):
        tune(bundle, backends=["onnxruntime"], device="cpu", runs=1)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert scripted.left == 0


def test_a_strangers_engine_is_left_out_unless_it_is_named(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_engine", lambda *_: (None, bundle / "manifest.json"))
    monkeypatch.setattr(engines, "runs_code", lambda key: True)
    reason = tuning._foreign("aoti", bundle, manifest, "cpu", [])
    assert reason.endswith("was not built by this user here: --backends aoti runs it all the same")
    assert tuning._foreign("aoti", bundle, manifest, "cpu", ["aoti"]) == ""
    monkeypatch.setattr(engines, "was_built_here", lambda path: True)
    assert tuning._foreign("aoti", bundle, manifest, "cpu", []) == ""


@given(batches=st.lists(st.integers(1, 8), max_size=3), sides=st.lists(st.sampled_from([16, 32, 48]), max_size=3))
def test_shapes_are_every_batch_at_every_size(manifest: Manifest, batches: list[int], sides: list[int]) -> None:
    found = tuned_shapes(manifest, batches, [str(side) for side in sides])
    pairs = {(shape["batch"], shape["height"], shape["width"]) for shape in found}
    assert len(pairs) == len(found)
    assert pairs == {(2 * b, s // 4, s // 4) for b in batches or [1] for s in sides or [32]}


def test_a_size_may_be_wide(manifest: Manifest) -> None:
    (shape,) = tuned_shapes(manifest, [], ["48x16"])
    assert (shape["width"], shape["height"]) == (12, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": [99]}, "batch 198 is outside what the bundle was exported for: 1 to 16 denoiser inputs"),
        ({"sizes": ["512"]}, "height 512 is outside what the bundle was exported for: 16 to 48 pixels in steps of 8"),
        ({"sizes": ["33"]}, "--size 33: 33 is no multiple of 4 pixels"),
        ({"sizes": ["0"]}, "--size 0: 0 is no multiple of 4 pixels"),
        ({"sizes": ["big"]}, "--size big: write the pixels of a side, such as 512, or WIDTHxHEIGHT"),
        ({"sizes": ["16xx16"]}, "--size 16xx16: write the pixels"),
        ({"backends": ["abacus"]}, "--backends abacus: there are torch, torch-sparse, onnxruntime"),
        ({"runs": 0}, "at least one run"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(bundle: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tune(bundle, device="cpu", **options)


def test_a_bundle_that_cannot_be_written_is_refused_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(tuning.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot be written, and the result is recorded there: Read-only file system"):
        tune(bundle, device="cpu")
