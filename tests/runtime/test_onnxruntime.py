"""ONNX Runtime's providers: what they are told, and what they do without a word."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export.bundle import GRAPH, Manifest, open_bundle
from obsdiff.export.schema import Tensor as Signature
from obsdiff.models.graph import random_inputs
from obsdiff.models.sd3 import SD3
from obsdiff.models.source import find_source
from obsdiff.runtime.backends import load_backend, onnxruntime_tensorrt
from obsdiff.runtime.backends.onnxruntime import ELEMENTS, check_providers, nodes_elsewhere, open_graph, session_options

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def manifest(one_block_bundle: Path) -> Manifest:
    return open_bundle(one_block_bundle)


@pytest.fixture(scope="module")
def session(one_block_bundle: Path) -> Any:
    return onnxruntime.InferenceSession(str(one_block_bundle / GRAPH), session_options(), providers=[CPU])


def test_elements_are_those_of_onnx() -> None:
    for name, number in ELEMENTS.items():
        dtype = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64"}[name]
        assert number == getattr(TensorProto, dtype)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_every_precision_is_bound_without_a_copy_in_another(tmp_path: Path, name: str) -> None:
    element = ELEMENTS[name]
    info = [helper.make_tensor_value_info(entry, element, ["batch", 4]) for entry in ("x", "y")]
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Neg", ["wide"], ["turned"]),
        helper.make_node("Cast", ["turned"], ["y"], to=element),
    ]
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:]), opset_imports=opset, ir_version=10)
    (tmp_path / GRAPH).parent.mkdir()
    onnx.save(model, tmp_path / GRAPH)
    sides = [Signature.model_validate({"name": entry, "dtype": name, "axes": ("batch", 4)}) for entry in ("x", "y")]
    manifest: Any = SimpleNamespace(formats={"onnx": None}, inputs=sides[:1], outputs=sides[1:])
    denoise = open_graph(tmp_path, manifest, "cpu", {CPU: {}}, "onnxruntime")
    value = torch.randn(3, 4).to(getattr(torch, name))
    assert torch.equal(denoise(x=value), -value)


def test_a_provider_that_did_not_start_is_noticed(session: Any) -> None:
    check_providers(session, [CPU])
    with pytest.raises(ObsdiffError, match="could not start CUDAExecutionProvider and would have used CPUExecution"):
        check_providers(session, [CUDA, CPU])


def test_nodes_that_fall_back_are_noticed(session: Any) -> None:
    parts = session.get_provider_graph_assignment_info()
    assert nodes_elsewhere(parts, [CPU]) == []
    fallen = nodes_elsewhere(parts, [CUDA])
    assert {text.partition(" ")[2] for text in fallen} >= {"MatMul", "Softmax"} or any("Attention" in x for x in fallen)
    started = SimpleNamespace(get_providers=lambda: [CUDA, CPU], get_provider_graph_assignment_info=lambda: parts)
    with pytest.raises(ObsdiffError, match="CUDAExecutionProvider takes nothing of this graph"):
        check_providers(started, [CUDA])
    mixed = [SimpleNamespace(ep_name=CUDA, get_nodes=list), *parts]
    started.get_provider_graph_assignment_info = lambda: mixed
    with pytest.raises(ObsdiffError, match=r"leaves .*\d+ MatMul.* to the CPU: CUDAExecutionProvider does not take"):
        check_providers(started, [CUDA])


def test_arithmetic_of_shapes_may_stay_on_the_cpu() -> None:
    nodes = [SimpleNamespace(op_type=kind) for kind in ("Shape", "Gather", "Concat", "Mul", "Cast")]
    assert nodes_elsewhere([SimpleNamespace(ep_name=CPU, get_nodes=lambda: nodes)], [CUDA]) == []


def test_the_profile_has_every_input_at_the_ends_of_the_range(manifest: Manifest, one_block_sd3: Path) -> None:
    config = find_source(one_block_sd3).config
    for bound in ("min", "opt", "max"):
        axes = {name: getattr(axis, bound) for name, axis in manifest.axes.items()}
        wanted = {name: list(value.shape) for name, value in random_inputs(SD3, config, axes).items()}
        written = dict(entry.split(":") for entry in onnxruntime_tensorrt.profile(manifest, bound).split(","))
        assert {name: [int(size) for size in sizes.split("x")] for name, sizes in written.items()} == wanted


@pytest.mark.parametrize(
    ("precision", "flag"), [("fp32", None), ("fp16", "trt_fp16_enable"), ("bf16", "trt_bf16_enable")]
)
def test_the_provider_is_told_precision_sparsity_and_folder(
    manifest: Manifest, tmp_path: Path, precision: str, flag: str | None
) -> None:
    options = onnxruntime_tensorrt.trt_options(manifest.model_copy(update={"precision": precision}), tmp_path / "x")
    assert [name for name in options if name in ("trt_fp16_enable", "trt_bf16_enable")] == ([flag] if flag else [])
    assert all(options[f"trt_{name}_enable"] for name in ("sparsity", "engine_cache", "timing_cache"))
    assert options["trt_engine_cache_path"] == str(tmp_path / "x")
    assert options["trt_timing_cache_path"] == str(tmp_path)


def test_other_weights_have_another_folder(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path))
    changed = manifest.files[GRAPH].model_copy(update={"sha256": hashlib.sha256(b"other").hexdigest()})
    other = manifest.model_copy(update={"files": {**manifest.files, GRAPH: changed}})
    folders = [onnxruntime_tensorrt.engine_folder(each, "cpu") for each in (manifest, other)]
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders} == {tmp_path / "onnxruntime"}
    assert not onnxruntime_tensorrt.is_built(folders[0])
    folders[0].mkdir(parents=True)
    (folders[0] / "graph_sm90.engine").touch()
    assert onnxruntime_tensorrt.is_built(folders[0])


def test_tensorrt_is_refused_without_a_gpu_and_without_leave_to_build(
    manifest: Manifest, one_block_bundle: Path
) -> None:
    with pytest.raises(InputError, match="TensorRT runs on a CUDA GPU, not on cpu"):
        load_backend("onnxruntime-tensorrt", one_block_bundle, manifest, "cpu")
    with pytest.raises(InputError, match="has no onnxruntime-tensorrt engine for cuda, and --no-build forbids it"):
        load_backend("onnxruntime-tensorrt", one_block_bundle, manifest, "cuda", build=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_providers_of_a_gpu_keep_to_torchs_streams(
    one_block_bundle: Path, manifest: Manifest, one_block_sd3: Path, backend: str
) -> None:
    if not {CUDA, "TensorrtExecutionProvider"} <= set(onnxruntime.get_available_providers()):
        pytest.skip("needs onnxruntime-gpu")
    config = find_source(one_block_sd3).config
    denoise, wanted = (load_backend(name, one_block_bundle, manifest, "cuda") for name in (backend, "torch"))
    for seed in range(20):
        inputs = random_inputs(SD3, config, {"batch": 2, "height": 8, "width": 8, "tokens": 12}, seed=seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            late = {name: value.cuda() * 1.0 for name, value in inputs.items()}
            got, want = denoise(**late) * 1.0, wanted(**late)
            assert (got - want).norm() < 1e-3 * want.norm()
