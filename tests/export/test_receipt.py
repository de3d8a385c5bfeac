"""The receipt: it agrees with the weights and with the graph, sums up what engines tell, and gates."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from obsdiff.checkpoint import read_info
from obsdiff.errors import GateError, InputError
from obsdiff.export import inspect as inspecting
from obsdiff.export import receipt as receipts
from obsdiff.export.bundle import GRAPH, WEIGHTS, open_bundle
from obsdiff.export.receipt import Evidence, Receipt, merge, read_receipt, receipt_of, require_sparse, say
from obsdiff.export.stage import export
from obsdiff.models.gemms import find_gemms
from obsdiff.models.layers import as_matrix
from obsdiff.models.source import find_source, load_denoiser, meta_denoiser
from obsdiff.prune.stage import prune

QUICKEST: dict[str, Any] = {"solver": "magnitude", "num_prompts": 1, "steps": 1, "packages": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def sparse(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model with one block at 2:4, but for its last linear of the block, and its fp16 bundle. To read or copy."""
    folder = tmp_path_factory.mktemp("receipt")
    prune(one_block_sd3, folder / "pruned", pattern="2:4", exclude=r"ff\.net\.2$", **QUICKEST)
    export(folder / "pruned", folder / "bundle", precision="fp16")
    return folder / "pruned", folder / "bundle"


def receipt_in(bundle: Path) -> Receipt:
    found = read_receipt(bundle, open_bundle(bundle))
    assert found
    return found


def test_it_says_of_every_product_what_its_weight_is(sparse: tuple[Path, Path]) -> None:
    pruned, bundle = sparse
    info, weights = read_info(pruned), load_file(bundle / WEIGHTS)
    assert info
    receipt = receipt_in(bundle)
    matrices = {name.removesuffix(".weight") for name, w in weights.items() if name.endswith("weight") and w.ndim > 1}
    layers = {layer.name: layer for layer in receipt.layers}
    assert layers.keys() == matrices
    assert {name for name, layer in layers.items() if layer.nm_valid} == {layer.name for layer in info.layers}
    manifest = open_bundle(bundle)
    tokens = manifest.axes["height"].opt * manifest.axes["width"].opt // 4
    assert layers["transformer_blocks.0.attn.to_q"].rows == tokens * manifest.axes["batch"].opt
    for name, layer in layers.items():
        assert layer.shape == tuple(as_matrix(weights[f"{name}.weight"]).shape)
        assert (layer.dtype, layer.kernel, layer.dense_ms, layer.sparse_ms) == ("fp16", "unknown", None, None)
        assert len(layer.nodes) == 1
        assert layer.eligible == (layer.reason is None)
    assert layers["transformer_blocks.0.ff.net.2"].reason == "dense weights"
    assert layers["transformer_blocks.0.ff.net.0.proj"].eligible
    summary = receipt.summary
    assert (summary.layers, summary.valid) == (len(layers), len(info.layers))
    assert summary.eligible == sum(layer.eligible for layer in receipt.layers) == summary.valid
    assert 0 < summary.eligible_macs < sum(layer.macs_share for layer in receipt.layers) < 1
    assert summary.sparse is summary.gemm_share is summary.limit is summary.reached is None
    assert summary.evidence == "none: no engine that tells was built here"


def test_a_bundle_of_a_dense_model_in_fp32_has_nothing_to_run_sparse(one_block_bundle: Path) -> None:
    receipt = receipt_in(one_block_bundle)
    assert {layer.reason for layer in receipt.layers} == {"dense weights"}
    assert say(receipt.summary).startswith(f"0 of {len(receipt.layers)} products have 2:4 weights, 0 can run on sparse")


def test_without_a_graph_the_weights_alone_tell(graphless: Path) -> None:
    receipt = receipt_in(graphless)
    assert receipt.layers
    assert all(layer.nodes == () and layer.reason == "dense weights" for layer in receipt.layers)


def change(graph: onnx.GraphProto, node: str, how: str) -> None:
    """Changes the weight that a MatMul of the graph multiplies with, or takes it out of the file."""
    found = next(entry for entry in graph.node if entry.name == node)
    assert found.op_type == "MatMul"
    tensor = next(entry for entry in graph.initializer if entry.name == found.input[1])
    value = numpy_helper.to_array(tensor).copy()
    if how == "one weight too many":
        value[:4, 0] = 1
    elif how == "turned":
        value = value.T
    elif how == "computed":
        graph.initializer.remove(tensor)
        return
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


@pytest.mark.parametrize("how", ["one weight too many", "turned", "computed", "nothing"])
def test_a_graph_whose_weight_was_changed_is_caught(sparse: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    pruned, bundle = sparse
    name = "transformer_blocks.0.attn.to_q"
    node = next(layer.nodes[0] for layer in receipt_in(bundle).layers if layer.name == name)
    model = onnx.load(bundle / GRAPH)
    change(model.graph, node, how)
    onnx.save(model, tmp_path / "model.onnx")
    source = find_source(pruned)
    axes = {axis: entry.opt for axis, entry in open_bundle(bundle).axes.items()}
    gemms = find_gemms(meta_denoiser(source), source.spec, source.config, axes)
    modules: dict[str, nn.Module] = dict(load_denoiser(source, torch.float16).named_modules())
    layers = {layer.name: layer for layer in receipt_of(gemms, modules, 10**9, "fp16", tmp_path / "model.onnx").layers}
    assert all(layers[other].eligible for other in layers if layers[other].nm_valid and other != name)
    changed, reason = layers[name], layers[name].reason or ""
    if how == "nothing":
        assert changed.eligible
    elif how == "computed":
        assert (changed.nm_valid, changed.eligible) == (True, False)
        assert reason.startswith("not in the graph")
    else:
        assert (changed.nm_valid, changed.eligible) == (False, False)
        assert reason.endswith(f"in the graph's {node}")
        assert how == "turned" or reason.startswith("1 of 256 groups of 4 have more than 2 weights")


def test_inspect_shows_it_and_a_damaged_one_is_refused(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = sparse
    found = inspecting.inspect(bundle)["receipt"]
    assert found["sentence"] == say(receipt_in(bundle).summary)
    assert json.loads((bundle / "receipt.json").read_text()) == {k: v for k, v in found.items() if k != "sentence"}
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "receipt.json").write_text("{}")
    with pytest.raises(InputError, match=r"receipt\.json is not the file that was exported"):
        inspecting.inspect(copy)
    with pytest.raises(InputError, match="is not a receipt that obsdiff wrote: layers: Field required"):
        read_receipt(copy, open_bundle(bundle))


def example(count: int = 4, eligible: int = 3) -> Receipt:
    """A receipt of that many 2:4 layers, of which that many can run sparse."""
    layers = [
        receipts.Layer(
            name=f"layer.{i}",
            shape=(64, 64),
            rows=8,
            macs_share=0.2,
            dtype="fp16",
            nm_valid=True,
            eligible=i < eligible,
            reason=None if i < eligible else "K = 20 is no multiple of 16 (fp16)",
            nodes=(f"node_MatMul_{i}",),
        )
        for i in range(count)
    ]
    return Receipt(layers=tuple(layers), summary=receipts.sum_up(layers, None))


def test_kernels_and_times_are_merged_and_summed_up() -> None:
    evidence = Evidence(
        source="TensorRT 11",
        kernels={"layer.0": "sparse", "layer.1": "dense"},
        absent=("layer.2",),
        dense_ms={"layer.0": 4.0, "layer.1": 2.0, "layer.3": 1.0},
        sparse_ms={"layer.0": 2.5, "layer.1": 2.0},
        total_ms=(10.0, 8.0),
    )
    receipt = merge(example(), evidence)
    kernels = [layer.kernel for layer in receipt.layers]
    assert kernels == ["sparse", "dense", "unknown", "unknown"]
    assert [layer.reason for layer in receipt.layers] == [
        None,
        "the dense kernel was faster",
        "fused away: no layer of the engine names it",
        "K = 20 is no multiple of 16 (fp16)",
    ]
    summary = receipt.summary
    assert (summary.sparse, summary.evidence) == (1, "TensorRT 11")
    assert summary.gemm_share == pytest.approx(0.7)
    assert summary.limit == pytest.approx(1 / (0.4 + 0.3)), "6 of 10 ms are in eligible layers and can be halved"
    assert summary.reached == pytest.approx(1.25)
    assert "1 were seen to (TensorRT 11). 1.25× as fast as dense, of 1.43× at best" in say(summary)


def test_what_runs_sparse_was_eligible_whatever_the_rules_say() -> None:
    layer = merge(example(), Evidence(source="TensorRT 11", kernels={"layer.3": "sparse"})).layers[3]
    assert (layer.eligible, layer.reason, layer.kernel) == (True, None, "sparse")


@given(
    st.lists(st.floats(0.001, 100), min_size=4, max_size=4),
    st.lists(st.floats(0.5, 1), min_size=4, max_size=4),
    st.floats(0, 100),
)
def test_the_limit_bounds_what_halved_products_can_reach(times: list[float], left: list[float], rest: float) -> None:
    """Amdahl: with the eligible layers at between half and all of their time, and the rest as it was."""
    names = [f"layer.{i}" for i in range(4)]
    sparse = [ms * (share if i < 3 else 1) for i, (ms, share) in enumerate(zip(times, left, strict=True))]
    evidence = Evidence(
        source="a test",
        kernels=dict.fromkeys(names, "sparse"),
        dense_ms=dict(zip(names, times, strict=True)),
        sparse_ms=dict(zip(names, sparse, strict=True)),
        total_ms=(sum(times) + rest, sum(sparse) + rest),
    )
    summary = merge(example(), evidence).summary
    assert summary.limit is not None
    assert summary.reached is not None
    assert summary.gemm_share is not None
    assert 1 <= summary.limit <= 2 + 1e-9
    assert summary.reached <= summary.limit * (1 + 1e-9)
    assert 0 < summary.gemm_share <= 1 + 1e-9


@pytest.mark.parametrize(("text", "share"), [("90%", 0.9), ("90", 0.9), (" 100% ", 1.0), ("0.5%", 0.005)])
def test_shares_are_percent(text: str, share: float) -> None:
    assert receipts.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "0", "-5%", "101%", "nan", "all", "inf", "90%%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--require-sparse"):
        receipts.parse_share(text)


def test_the_gate_counts_what_was_seen_and_nothing_else() -> None:
    unknown = example()
    with pytest.raises(GateError, match=r"no layer was seen to run sparse \(3 of the 4 2:4 layers could\).*tensorrt"):
        require_sparse(unknown, 0.01)
    half = merge(unknown, Evidence(source="TensorRT 11", kernels={"layer.0": "sparse", "layer.1": "sparse"}))
    require_sparse(half, 0.5)
    with pytest.raises(GateError, match=r"51%: 2 of 4 2:4 layers were seen .* is layer\.2 \(its kernel is not known\)"):
        require_sparse(half, 0.51)
    with pytest.raises(GateError, match="none of the 0 products has 2:4 weights"):
        require_sparse(example(0), 0.5)


def test_a_gate_that_is_not_met_keeps_the_bundle(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    pruned, _ = sparse
    with pytest.raises(GateError, match="no layer was seen to run sparse"):
        export(pruned, tmp_path / "bundle", precision="fp16", formats=(), require_sparse=0.9)
    assert receipt_in(tmp_path / "bundle").summary.sparse is None
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_profiling_needs_a_tensorrt_engine(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--profile is for --format tensorrt"):
        export(sparse[0], tmp_path / "bundle", profile=True)
    assert not list(tmp_path.iterdir())
