"""Real builds by TensorRT-RTX, which needs no GPU for them: engines, progress, Ctrl-C, errors, kernel timings."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from obsdiff.errors import ObsdiffError
from obsdiff.export import tensorrt_rtx, trt_build
from obsdiff.export.bundle import GRAPH, Manifest, read_manifest
from obsdiff.export.schema import Axis, EngineKey, EngineOptions
from obsdiff.export.trt_log import get_logger
from obsdiff.progress import Progress

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def manifest(one_block_bundle: Path) -> Manifest:
    return read_manifest(one_block_bundle)


@pytest.fixture(scope="module")
def built(
    one_block_bundle: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineKey, Path]:
    """An engine of the model with one block for the SM86."""
    key = tensorrt_rtx.make_key(manifest, EngineOptions(sm=("86",)), "cpu")
    path = tmp_path_factory.mktemp("engine") / key.file
    tensorrt_rtx.build(one_block_bundle, manifest, key, path, Progress())
    return key, path


def test_tensorrt_rtx_builds_an_engine_without_a_gpu(built: tuple[EngineKey, Path]) -> None:
    key, path = built
    assert path.stat().st_size > 100_000
    assert [file.name for file in path.parent.iterdir()] == [key.file], "only TensorRT tells of its layers"
    assert trt.Runtime(get_logger(trt)).get_engine_validity(path.read_bytes())[1] & 32 == 0, "malformed"


def copy_graph(source: Path, folder: Path) -> Path:
    """A bundle's folder with its graph alone."""
    (folder / "denoiser").mkdir(parents=True)
    shutil.copy(source / GRAPH, folder / GRAPH)
    return folder


def test_a_node_that_the_parser_refuses_is_named_with_its_module(
    one_block_bundle: Path, manifest: Manifest, built: tuple[EngineKey, Path], tmp_path: Path
) -> None:
    folder = copy_graph(one_block_bundle, tmp_path)
    model = onnx.load(str(folder / GRAPH))
    (node,) = (
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and any("0.attn.to_k'" in entry.value for entry in node.metadata_props)
    )
    node.op_type, node.domain = "Fancy", "ours"
    model.opset_import.append(helper.make_opsetid("ours", 1))
    onnx.save(model, str(folder / GRAPH))
    with pytest.raises(ObsdiffError) as caught:
        tensorrt_rtx.build(folder, manifest, built[0], tmp_path / "out.plan", Progress())
    assert str(caught.value) == (
        f"TensorRT-RTX cannot use the graph: the node {node.name} (Fancy) of the module "
        "transformer_blocks.0.attn.to_k: it has no such operation"
    )
    assert not (tmp_path / "out.plan").exists()


def test_a_graph_that_is_no_graph_is_one_sentence(
    built: tuple[EngineKey, Path], manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "denoiser").mkdir()
    (tmp_path / GRAPH).write_bytes(b"junk" * 20)
    with pytest.raises(ObsdiffError, match=r"TensorRT-RTX cannot use the graph: .*Failed to parse the ONNX model"):
        tensorrt_rtx.build(tmp_path, manifest, built[0], tmp_path / "out.plan", Progress())


def test_what_the_builder_refuses_is_said_once_with_the_module(
    one_block_bundle: Path, manifest: Manifest, built: tuple[EngineKey, Path], tmp_path: Path
) -> None:
    turing = built[0].model_copy(update={"target": "sm_75"})  # fp32, which make_key refuses
    with pytest.raises(ObsdiffError, match=r"Turing \(SM75\): FP32 GEMM is not supported") as caught:
        tensorrt_rtx.build(one_block_bundle, manifest, turing, tmp_path / "out.plan", Progress())
    said = str(caught.value)
    assert said.count("FP32 GEMM") == 1
    assert " is of the module " in said
    assert "/_src" not in said
    assert "\n" not in said


def test_ctrl_c_cancels_the_build_and_nothing_is_written(
    one_block_bundle: Path,
    manifest: Manifest,
    built: tuple[EngineKey, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = trt_build._profile

    def interrupt(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return make(*arguments)

    monkeypatch.setattr(trt_build, "_profile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tensorrt_rtx.build(one_block_bundle, manifest, built[0], tmp_path / "out.plan", Progress())
    assert not list(tmp_path.iterdir())
    assert "BuildCanceled" in get_logger(trt).messages[-1].text


def test_the_builder_tells_what_it_is_at(
    one_block_bundle: Path,
    manifest: Manifest,
    built: tuple[EngineKey, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []

    class Noted(Progress):
        def advance(self, count: int = 1, note: str = "") -> None:
            assert count == 0
            notes.append(note)

    clock = iter(range(0, 10**9, 2))
    monkeypatch.setattr(trt_build, "monotonic", lambda: next(clock))
    tensorrt_rtx.build(one_block_bundle, manifest, built[0], tmp_path / "out.plan", Noted())
    assert "building tensorrt-rtx for sm_86: optimizing graph (30 of 30)" in notes
    assert all(note.startswith("building tensorrt-rtx for sm_86: ") for note in notes)


def test_profile_shapes_respect_steps() -> None:
    assert trt_build._points(Axis(min=5, opt=9, max=15, multiple=4)) == (8, 8, 12)
    assert trt_build._points(Axis(min=1, opt=12, max=589)) == (1, 12, 589)


class Cache:
    def __init__(self, entries: set[str]):
        self.entries = entries

    def combine(self, other: "Cache", ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.entries |= other.entries
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.entries)).encode()


class Config:
    """A builder's config as far as timings go: it takes none of another GPU, and no junk."""

    cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        try:
            return Cache(set(json.loads(content or b"[]")))
        except ValueError:
            return None

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = None if "of another GPU" in cache.entries else cache
        return self.cache is not None


def test_builds_that_share_a_timing_cache_keep_what_each_timed(tmp_path: Path) -> None:
    path, configs = tmp_path / "new" / "timings", (Config(), Config())
    caches = [trt_build._load_timings(config, path) for config in configs]
    for config, cache, entry in zip(configs, caches, "ab", strict=True):
        assert config.cache is cache
        cache.entries.add(entry)
        trt_build._save_timings(config, cache, path)
    assert json.loads(path.read_bytes()) == ["a", "b"]


@pytest.mark.parametrize("content", [b"junk", b'["of another GPU"]'])
def test_timings_that_are_of_no_use_are_left_out(tmp_path: Path, content: bytes) -> None:
    path, config = tmp_path / "timings", Config()
    path.write_bytes(content)
    cache = trt_build._load_timings(config, path)
    assert (cache.entries, config.cache) == (set(), cache)
    assert path.read_bytes() == content


def test_weights_beside_the_graph_are_found(
    built: tuple[EngineKey, Path], manifest: Manifest, one_block_bundle: Path, tmp_path: Path
) -> None:
    """As they lie past 2 GB."""
    folder = copy_graph(one_block_bundle, tmp_path)
    model = onnx.load(str(folder / GRAPH))
    (folder / GRAPH).unlink()
    onnx.save(model, str(folder / GRAPH), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert TensorProto.EXTERNAL in {
        value.data_location for value in onnx.load(str(folder / GRAPH), load_external_data=False).graph.initializer
    }
    tensorrt_rtx.build(folder, manifest, built[0], tmp_path / "out.plan", Progress())
    assert (tmp_path / "out.plan").stat().st_size == pytest.approx(built[1].stat().st_size, rel=0.1)
