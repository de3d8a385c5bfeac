"""What TensorRT says of sparsity, on its own words: lines and layers as users of it posted them."""

import json
from pathlib import Path
from typing import Any

import pytest

from obsdiff.errors import InputError
from obsdiff.export.evidence import add_profile, bundle_evidence, files_of, nodes_of, read_layers
from obsdiff.export.receipt import Layer, Receipt, Summary, merge
from obsdiff.export.schema import Axis, Check, Engine, EngineKey, EngineOptions, File
from obsdiff.export.trt_log import Message, sparsity_counts, sparsity_lines

# NVIDIA/TensorRT issue 2169: eligible, none picked (TensorRT 8.4).
NONE_PICKED = [
    "(Sparsity) Layers eligible for sparse math: Conv_22, MatMul_51, MatMul_69, MatMul_83, Gemm_725",
    "(Sparsity) TRT inference plan picked sparse implementation for layers:",
]
# NVIDIA/TensorRT issue 4056, the first names of a long line (TensorRT 8.5); the guide's example of what follows.
FUSED = "(Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_621 + Add_627 + Relu_628"
SOME_PICKED = [
    "(Sparsity) Layers eligible for sparse math: conv1, conv2, conv3",
    "(Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3",
]
# NVIDIA/TensorRT issue 1403 (TensorRT 8.0) and pytorch/TensorRT issue 1340: one layer, and nothing at all.
ONE = [
    "(Sparsity) Layers eligible for sparse math: Conv_0",
    "(Sparsity) TRT inference plan picked sparse implementation for layers:",
]
NOTHING = [
    "(Sparsity) Layers eligible for sparse math:",
    "(Sparsity) TRT inference plan picked sparse implementation for layers:",
]
# TensorRT 10 on a Jetson, without names (below verbose).
COUNTED = [
    "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
    "(Sparsity) Chose 0 layer(s) using sparse tactics",
]
# NVIDIA/TensorRT issue 4020, an engine built with --sparsity=force: sparse weights, and a dense kernel.
FORCED: dict[str, Any] = {
    "Name": "resnetv15_stage3_conv0_fwd + resnetv15_stage3_batchnorm0_fwd + resnetv15_stage3_relu0_fwd",
    "LayerType": "CaskConvolution",
    "Weights": {"Type": "Int8", "Count": 294912},
    "HasSparseWeights": 1,
    "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_"
    "32_tilesize32x32x64_stage6_warpsize2x1x1_g1_tensor16x8x32_t1r3s3",
    "Metadata": "[ONNX Layer: resnetv15_stage3_conv0_fwd]\u001e[ONNX Layer: resnetv15_stage3_batchnorm0_fwd]\u001e"
    "[ONNX Layer: resnetv15_stage3_relu0_fwd]",
}
# The name of cuSPARSELt's kernel in half precision on Ampere and later, which TensorRT shares.
SPARSE_GEMM = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_tilesize128x128x64_stage3_warpsize2x2x1_sptensor16x8x32"
DENSE_GEMM = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1_tensor16x8x16"


def said(*lines: str) -> list[Message]:
    return [Message(3, line) for line in lines]


@pytest.mark.parametrize(
    ("lines", "eligible", "picked", "counts"),
    [
        (NONE_PICKED, ["Conv_22", "MatMul_51", "MatMul_69", "MatMul_83", "Gemm_725"], [], (5, 0)),
        (SOME_PICKED, ["conv1", "conv2", "conv3"], ["conv2", "conv3"], (3, 2)),
        ([FUSED], ["MatMul_401", "Conv_619 + Relu_620", "Conv_621 + Add_627 + Relu_628"], [], (3, None)),
        (ONE, ["Conv_0"], [], (1, 0)),
        (NOTHING, [], [], (0, 0)),
        (COUNTED, [], [], (39, 0)),
        (["[MemUsageChange] Init CUDA: CPU +0, GPU +0, now: CPU 1831, GPU 3621 (MiB)"], [], [], (None, None)),
    ],
)
def test_the_log_of_every_version_is_read(
    lines: list[str], eligible: list[str], picked: list[str], counts: tuple[int | None, int | None]
) -> None:
    assert sparsity_lines(said(*lines)) == (eligible, picked)
    assert sparsity_counts(said(*lines)) == counts


def receipt(*nodes: str, eligible: bool = True) -> Receipt:
    """A receipt of one 2:4 layer for each of those nodes of a graph; the i-th has i + 1 tenths of the MACs."""
    layers = [
        Layer(
            name=f"layer.{node}",
            shape=(64, 64),
            rows=8,
            macs_share=(i + 1) / 10,
            dtype="fp16",
            nm_valid=True,
            eligible=eligible,
            nodes=(node,),
        )
        for i, node in enumerate(nodes)
    ]
    return Receipt(layers=tuple(layers), summary=Summary(layers=len(layers), valid=0, eligible=0, eligible_macs=0))


def told(lines: list[str], layers: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What is written beside an engine after such a log."""
    eligible, picked = sparsity_lines(said(*lines))
    counts = dict(zip(("eligible", "picked"), sparsity_counts(said(*lines)), strict=True))
    return {"eligible": eligible, "picked": picked, "counts": counts, "layers": layers or []}


def test_a_log_that_names_what_it_picked_tells_of_all() -> None:
    found = read_layers(told(SOME_PICKED), receipt("conv1", "conv2", "conv3", "conv4"), "a log")
    assert found.kernels == {
        "layer.conv1": "dense",
        "layer.conv2": "sparse",
        "layer.conv3": "sparse",
        "layer.conv4": "dense",
    }
    assert found.absent == ()


def test_nothing_picked_is_dense_everywhere_named_or_counted() -> None:
    for lines in (NONE_PICKED, COUNTED, NOTHING):
        found = read_layers(told(lines), receipt("MatMul_51", "MatMul_1"), "a log")
        assert set(found.kernels.values()) == {"dense"}
        assert merge(receipt("MatMul_51", "MatMul_1"), found).summary.sparse == 0


def test_a_number_without_names_and_a_name_of_no_node_do_not_tell_which() -> None:
    for line in (
        "(Sparsity) Chose 2 layer(s) using sparse tactics",
        "(Sparsity) Chose 1 layer(s) using sparse tactics: __myl_Fc_myl0_12",
    ):
        found = read_layers(told([line]), receipt("MatMul_1", "MatMul_2"), "a log")
        assert found.kernels == {}
        assert merge(receipt("MatMul_1"), found).summary.sparse is None
    assert read_layers(told([]), receipt("MatMul_1"), "a log").kernels == {}


def test_sparse_weights_on_a_dense_kernel_are_not_taken_for_sparse() -> None:
    found = read_layers(told([], [FORCED]), receipt("resnetv15_stage3_conv0_fwd"), "an inspector")
    assert found.kernels == {"layer.resnetv15_stage3_conv0_fwd": "dense"}


def test_the_inspector_tells_by_the_kernels_name_and_the_nodes_in_the_metadata() -> None:
    layers = [
        {"Name": "__myl_Fc_myl0_1", "TacticName": SPARSE_GEMM, "Metadata": "[ONNX Layer: a]\u001f[ONNX Layer: add]"},
        {"Name": "b + add_2", "TacticName": DENSE_GEMM},
        {"Name": "__myl_Move_myl0_3", "TacticName": "__myl_Move_0x1b2c", "Metadata": "[ONNX Layer: c]"},
    ]
    found = read_layers(told([], layers), receipt("a", "b", "c", "gone"), "an inspector")
    assert found.kernels == {"layer.a": "sparse", "layer.b": "dense"}
    assert found.absent == ("layer.gone",)
    merged = merge(receipt("a", "b", "c", "gone"), found)
    assert [layer.kernel for layer in merged.layers] == ["sparse", "dense", "unknown", "unknown"]
    assert merged.layers[3].reason == "fused away: no layer of the engine names it"


def test_an_engine_that_hides_its_nodes_lets_nothing_count_as_fused_away() -> None:
    layers = [{"Name": "{ForeignNode[node_MatMul_1...node_add_9]}", "LayerType": "Myelin"}]
    assert read_layers(told([], layers), receipt("node_MatMul_1"), "an inspector").absent == ()


def test_nodes_of_a_layer() -> None:
    assert nodes_of({"Name": "Conv_621 + Add_627 + Relu_628"}) == {"Conv_621", "Add_627", "Relu_628"}
    assert "resnetv15_stage3_conv0_fwd" in nodes_of(FORCED)


def test_a_fused_product_shares_its_time_by_the_macs() -> None:
    rest = {"Name": "softmax", "Metadata": "", "ms": 1.0}
    profile = {
        "device": "NVIDIA H100",
        "dense": [{"Name": "a + b", "Metadata": "", "ms": 3.0}, rest],
        "sparse": [{"Name": "x", "Metadata": "[ONNX Layer: a]\u001e[ONNX Layer: b]", "ms": 1.5}, rest],
    }
    own = receipt("a", "b")
    found = add_profile(read_layers(told([]), own, "TensorRT 11"), profile, own)
    assert found.dense_ms == pytest.approx({"layer.a": 1.0, "layer.b": 2.0})
    assert found.sparse_ms == pytest.approx({"layer.a": 0.5, "layer.b": 1.0})
    assert found.total_ms == (4.0, 2.5)
    assert found.source == "TensorRT 11, IProfiler on NVIDIA H100"
    summary = merge(own, found).summary
    assert summary.gemm_share == pytest.approx(0.75)
    assert summary.reached == pytest.approx(1.6) == summary.limit


class FakeManifest:
    """The parts of a manifest that are asked for."""

    def __init__(self, *engines: Engine):
        self.engines = engines
        self.files: dict[str, File] = {}


def engine(target: str, ran: bool) -> Engine:
    axis = Axis(min=1, opt=1, max=2)
    key = EngineKey(
        format="tensorrt",
        source="0" * 64,
        target=target,
        version="11.0.0",
        cuda="13",
        precision="fp16",
        profile={"batch": axis},
        options=EngineOptions(),
    )
    check = Check(shapes=[], max_difference=0, relative_error=0, tolerance=1)
    return Engine(key=key, seconds=1, check=check if ran else None)


def test_the_engine_that_has_most_to_tell_is_heard(tmp_path: Path) -> None:
    ran, built, timed = engine("sm_90", ran=True), engine("sm_80", ran=False), engine("sm_89", ran=True)
    manifest: Any = FakeManifest(timed, ran, built)
    own = receipt("conv2")

    def write(name: str, value: Any) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
        manifest.files[name] = None

    assert bundle_evidence(tmp_path, manifest, own) is None
    write(files_of(built)[0], told(COUNTED))
    found = bundle_evidence(tmp_path, manifest, own)
    assert found
    assert found.source == "TensorRT 11.0.0 for sm_80: its build log and engine inspector"
    write(files_of(ran)[0], told(SOME_PICKED))
    found = bundle_evidence(tmp_path, manifest, own)
    assert found
    assert (found.source.split(":")[0], dict(found.kernels)) == ("TensorRT 11.0.0 for sm_90", {"layer.conv2": "sparse"})
    write(files_of(timed)[0], told(COUNTED))
    write(files_of(timed)[1], {"device": "NVIDIA L4", "dense": [{"Name": "conv2", "ms": 1.0}], "sparse": []})
    found = bundle_evidence(tmp_path, manifest, own)
    assert found
    assert found.source.endswith("sm_89: its build log and engine inspector, IProfiler on NVIDIA L4")
    write(files_of(timed)[0], [])
    with pytest.raises(InputError, match=r"layers\.json is not what obsdiff wrote"):
        bundle_evidence(tmp_path, manifest, own)
