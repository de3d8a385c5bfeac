"""bf16 graphs are checked as float32 ones with the same weights: constants, casts, bodies, weights in files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from obsdiff.export import widen
from obsdiff.export.bundle import open_bundle
from obsdiff.export.onnx import check_onnx
from obsdiff.export.parity import check_shapes, reference_outputs
from obsdiff.export.stage import export
from obsdiff.models.source import find_source, load_denoiser

BF16 = TensorProto.BFLOAT16


def tensor(name: str, values: torch.Tensor, raw: bool = True) -> Any:
    bits = values.to(torch.bfloat16).view(torch.int16).numpy().astype("<u2")
    if raw:
        return helper.make_tensor(name, BF16, values.shape, bits.tobytes(), raw=True)
    made = onnx.TensorProto(name=name, data_type=BF16, dims=values.shape)
    made.int32_data.extend(int(value) for value in bits.ravel())
    return made


def info(name: str, shape: list[Any], kind: int = BF16) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def graph(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """x W + b through a cast to float32 and back and a branch, W in a file, b as integers."""
    weight, bias = (torch.randn(*shape).to(torch.bfloat16) for shape in ((64, 48), (48,)))
    branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["two"], value=tensor("", torch.tensor([2.0]))),
            helper.make_node("Mul", ["sum", "two"], ["twice"]),
        ],
        "then",
        [],
        [info("twice", ["n", 48])],
    )
    other = helper.make_graph([helper.make_node("Identity", ["sum"], ["same"])], "else", [], [info("same", ["n", 48])])
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["product"]),
        helper.make_node("Cast", ["product"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wide"], ["narrow"], to=BF16),
        helper.make_node("Add", ["narrow", "b"], ["sum"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        nodes,
        "g",
        [info("x", ["n", 64])],
        [info("y", ["n", 48])],
        [tensor("W", weight), tensor("b", bias, raw=False), yes],
        value_info=[info("product", ["n", 48]), info("wide", ["n", 48], TensorProto.FLOAT)],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=1000)
    assert (tmp_path / "model.onnx.data").stat().st_size == weight.numel() * 2
    return path, weight, bias


def test_every_bf16_becomes_float32_with_the_same_values(graph: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    path, weight, bias = graph
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with widen.widened(path) as copy:
        assert BF16 not in {value.data_type for value in onnx.load(str(copy)).graph.initializer}
        session = onnxruntime.InferenceSession(str(copy), providers=["CPUExecutionProvider"])
        left = sorted(file.name for file in path.parent.iterdir())
    assert left == sorted([*before, ".model.onnx.fp32", ".model.onnx.fp32.data"])
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    x = torch.randn(5, 64)
    (got,) = session.run(None, {"x": x.numpy()})
    assert np.allclose(got, 2 * (x @ weight.float() + bias.float()).numpy(), rtol=1e-5, atol=1e-5)


def test_a_copy_does_not_outlive_a_failure(graph: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    path, *_ = graph
    with pytest.raises(KeyboardInterrupt), widen.widened(path):
        raise KeyboardInterrupt
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_bf16_bundle_is_checked_and_its_rounding_seen(one_block_sd3: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = export(one_block_sd3, bundle, precision="bf16")
    assert manifest == open_bundle(bundle)
    check = manifest.formats["onnx"]
    assert 1e-4 < check.relative_error < 3e-2, "bf16 keeps 8 bits"
    assert {entry.dtype for entry in manifest.outputs} == {"bfloat16"}
    assert not [name for name in manifest.files if "fp32" in name]
    # Against the module whose weights are rounded, the graph is exact: the error above is that of the weights.
    source = find_source(one_block_sd3)
    shapes = check_shapes(manifest.axes)
    rounded = load_denoiser(source, torch.float32).to(torch.bfloat16).float()
    expected = reference_outputs(rounded, source.spec, source.config, shapes)
    exact = check_onnx(expected, source.spec, source.config, shapes, bundle / "denoiser" / "model.onnx", "bf16")
    assert exact.relative_error < 0.5 * check.relative_error
