"""The ONNX graph: the same function as PyTorch at shapes that it was not traced at, or no graph at all."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_format
import pytest
import torch
from onnxscript import INT64
from onnxscript import opset20 as op
from torch import Tensor, nn

from obsdiff import checkpoint
from obsdiff.checkpoint import GroupRecord
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import onnx, parity
from obsdiff.export.bundle import open_bundle
from obsdiff.export.ranges import make_axes
from obsdiff.export.schema import Axis, Precision
from obsdiff.export.stage import export
from obsdiff.models.graph import random_inputs
from obsdiff.models.sd3 import SD3
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, find_source, load_denoiser
from obsdiff.runtime.backends import load_backend
from obsdiff.runtime.pipeline import load

Shape = dict[str, int]
SHAPES: list[Shape] = [
    {"batch": batch, "height": height, "width": width, "tokens": tokens}
    for batch, height, width, tokens in (
        (1, 8, 8, 12),
        (5, 6, 10, 1),
        (1, 4, 12, 333),
        (16, 10, 6, 13),
        (3, 12, 12, 77),
        (2, 4, 4, 589),
    )
]
RECORDS = [
    GroupRecord(block=0, name="attn", kind="heads", kept=[0, 3], of=4),
    GroupRecord(block=0, name="attn2", kind="heads", kept=[1], of=4),
    GroupRecord(block=1, name="attn", kind="heads", kept=[0, 1, 2], of=4),
    GroupRecord(block=1, name="ff", kind="neurons", kept=list(range(5, 77)), of=128),
    GroupRecord(block=1, name="ff_context", kind="neurons", kept=[7], of=128),
    GroupRecord(block=2, name="ff", kind="neurons", kept=list(range(0, 128, 3)), of=128),
]


def trace(denoiser: nn.Module, source: Source, path: Path, axes: Mapping[str, Axis] | None = None) -> Path:
    onnx.export_onnx(denoiser, SD3, source.config, axes or make_axes(source, "1:1:8", None), path)
    return path


def check(
    expected: list[Tensor], source: Source, path: Path, shapes: list[Shape], precision: Precision = "fp32"
) -> float:
    result = onnx.check_onnx(expected, SD3, source.config, shapes, path, precision)
    assert result.shapes == shapes
    return result.relative_error


@pytest.fixture(scope="module", params=["dense", "shrunk"])
def tiny_graph(
    request: pytest.FixtureRequest, tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Source, Path]:
    source = find_source(tiny_sd3)
    denoiser = load_denoiser(source, torch.float32)
    shrink(denoiser, SD3, RECORDS if request.param == "shrunk" else [])
    return denoiser, source, trace(denoiser, source, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_the_graph_computes_the_same_at_other_shapes(tiny_graph: tuple[nn.Module, Source, Path]) -> None:
    denoiser, source, path = tiny_graph
    expected = parity.reference_outputs(denoiser, SD3, source.config, SHAPES)
    assert all(output.std() > 0.01 for output in expected)
    assert check(expected, source, path, SHAPES) < 1e-5


@pytest.mark.parametrize("variant", ["dense", "structured"])
def test_the_embedded_model_computes_the_same_at_other_shapes(
    bundles: dict[str, Path], pruned: dict[str, Path], variant: str
) -> None:
    source = find_source("fashion" if variant == "dense" else pruned[variant])
    info = checkpoint.read_info(source.path)
    denoiser = load_denoiser(source, torch.float32)
    wide = parity.reference_outputs(denoiser, SD3, source.config, SHAPES)
    shrink(denoiser, SD3, info.groups if info else [])
    expected = parity.reference_outputs(denoiser, SD3, source.config, SHAPES)
    assert all((a - b).norm() < 1e-5 * a.norm() for a, b in zip(wide, expected, strict=True))
    assert check(expected, source, bundles[variant] / "denoiser" / "model.onnx", SHAPES) < 1e-5


def weight_shapes(path: Path) -> list[tuple[int, ...]]:
    return sorted(
        tuple(sorted(tensor.dims)) for tensor in onnx_format.load(path).graph.initializer if len(tensor.dims) == 2
    )


def test_the_weights_in_a_structured_graph_are_narrower(bundles: dict[str, Path]) -> None:
    dense, small = (weight_shapes(bundles[name] / "denoiser" / "model.onnx") for name in ("dense", "structured"))
    manifest = open_bundle(bundles["structured"])
    assert len(manifest.groups) == 6 * 3
    for record in manifest.groups:
        width = len(record.kept) * (16 if record.kind == "heads" else 1)
        full = record.of * (16 if record.kind == "heads" else 1)
        assert width < full
        linears = 8 if record.kind == "heads" else 2
        assert sum(width in shape for shape in small) >= linears
    assert sum(512 in shape for shape in dense) - sum(512 in shape for shape in small) >= 2 * 12
    sizes = [(bundles[name] / "denoiser" / "model.onnx").stat().st_size for name in ("dense", "structured")]
    saved = manifest.dense.bytes - manifest.totals.bytes
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.01)


def test_graph_inputs_have_the_names_and_dynamic_axes_of_the_spec(one_block_bundle: Path) -> None:
    graph = onnx_format.load(one_block_bundle / "denoiser" / "model.onnx").graph
    assert [entry.name for entry in graph.input] == [entry.name for entry in SD3.inputs]
    assert [entry.name for entry in graph.output] == [SD3.output.name]
    for entry, spec in zip(graph.input, SD3.inputs, strict=True):
        dims = entry.type.tensor_type.shape.dim
        fixed = [dim.dim_value or None for dim in dims]
        assert fixed == [
            {"in_channels": 8}.get(str(axis), 128 if str(axis).endswith("dim") else None) for axis in spec.axes
        ]


def test_floor_division_needs_its_own_translation(
    one_block_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter's own Div truncates, and crops the position embedding to the wrong width: refused."""

    def div(self: INT64, other: INT64) -> INT64:
        return op.Div(self, other)

    div.__annotations__ = {"self": INT64, "other": INT64, "return": INT64}
    monkeypatch.setattr(onnx, "_floordiv", lambda: div)
    with pytest.raises(ObsdiffError, match=r"ONNX Runtime fails at|disagrees with PyTorch") as caught:
        export(one_block_sd3, tmp_path / "bundle")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_floor_division_is_right_where_the_difference_is_odd(one_block_sd3: Path, one_block_bundle: Path) -> None:
    source = find_source(one_block_sd3)
    shapes = [{"batch": 1, "height": 2 * h, "width": 2 * w, "tokens": 3} for h in range(2, 7) for w in range(2, 7)]
    expected = parity.reference_outputs(load_denoiser(source, torch.float32), SD3, source.config, shapes)
    assert check(expected, source, one_block_bundle / "denoiser" / "model.onnx", shapes) < 1e-5


@pytest.fixture
def one_block(one_block_sd3: Path) -> tuple[nn.Module, Source]:
    source = find_source(one_block_sd3)
    return load_denoiser(source, torch.float32), source


def test_a_graph_of_other_weights_is_refused(one_block: tuple[nn.Module, Source], one_block_bundle: Path) -> None:
    denoiser, source = one_block
    path = one_block_bundle / "denoiser" / "model.onnx"
    shapes = parity.check_shapes(make_axes(source, "1:1:8", None))
    expected = parity.reference_outputs(denoiser, SD3, source.config, shapes)
    check(expected, source, path, shapes)
    with torch.no_grad():
        denoiser.transformer_blocks[0].ff.net[2].weight.mul_(1.01)
    moved = parity.reference_outputs(denoiser, SD3, source.config, shapes)
    with pytest.raises(ObsdiffError, match=r"fp32 graph disagrees with PyTorch: relative error .* is more than 1e-04"):
        check(moved, source, path, shapes)
    with pytest.raises(ObsdiffError, match="disagrees"):  # one shape of two is enough
        check([expected[0], moved[1]], source, path, shapes)


def test_the_largest_difference_is_recorded(one_block: tuple[nn.Module, Source], one_block_bundle: Path) -> None:
    denoiser, source = one_block
    found = open_bundle(one_block_bundle).formats["onnx"]
    expected = parity.reference_outputs(denoiser, SD3, source.config, found.shapes)
    path = one_block_bundle / "denoiser" / "model.onnx"
    expected[1][0, 0, 0, 0] += 1e-4
    moved = onnx.check_onnx(expected, SD3, source.config, found.shapes, path, "fp32")
    assert moved.max_difference == pytest.approx(1e-4, rel=0.05)
    assert found.max_difference < 1e-5
    assert found.relative_error < moved.relative_error < found.tolerance == parity.TOLERANCE["fp32"]


def test_nan_and_infinity_are_refused_with_the_way_out(
    one_block: tuple[nn.Module, Source], one_block_bundle: Path, tmp_path: Path
) -> None:
    denoiser, source = one_block
    model = onnx_format.load(one_block_bundle / "denoiser" / "model.onnx")
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [32] and tensor.data_type == onnx_format.TensorProto.FLOAT:
            value = onnx_format.numpy_helper.to_array(tensor) + np.float32("inf")
            tensor.CopyFrom(onnx_format.numpy_helper.from_array(value, tensor.name))
    onnx_format.save(model, tmp_path / "model.onnx")
    expected = parity.reference_outputs(denoiser, SD3, source.config, SHAPES[:1])
    with pytest.raises(ObsdiffError, match=r"the fp32 graph gives NaN or infinity at .* the model itself overflows"):
        check(expected, source, tmp_path / "model.onnx", SHAPES[:1])


def test_half_precision_is_half_the_size_and_close(one_block_sd3: Path, tmp_path: Path, one_block_bundle: Path) -> None:
    manifest = export(one_block_sd3, tmp_path / "bundle", precision="fp16")
    assert open_bundle(tmp_path / "bundle") == manifest
    found = manifest.formats["onnx"]
    assert 1e-5 < found.relative_error < found.tolerance == 2e-2
    assert manifest.totals.bytes * 2 == open_bundle(one_block_bundle).totals.bytes
    graph = onnx_format.load(tmp_path / "bundle" / "denoiser" / "model.onnx").graph
    kinds = {entry.name: entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output)}
    half, full = onnx_format.TensorProto.FLOAT16, onnx_format.TensorProto.FLOAT
    assert kinds == {entry.name: full if entry.name == "timestep" else half for entry in (*SD3.inputs, SD3.output)}
    assert {entry.name: entry.dtype for entry in manifest.inputs}["timestep"] == "float32"
    inputs = random_inputs(SD3, find_source(one_block_sd3).config, SHAPES[1], torch.float16)
    outputs = [load_backend(name, tmp_path / "bundle", manifest, "cpu")(**inputs) for name in ("torch", "onnxruntime")]
    assert {output.dtype for output in outputs} == {torch.float16}
    assert (outputs[0] - outputs[1]).float().norm() < 1e-2 * outputs[0].float().norm()


def test_weights_move_beside_the_graph_past_the_limit(
    one_block_sd3: Path, one_block_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "PROTOBUF_LIMIT", 10_000)
    manifest = export(one_block_sd3, tmp_path / "bundle")
    data = tmp_path / "bundle" / "denoiser" / "model.onnx.data"
    assert data.stat().st_size > 100_000
    assert manifest.files["denoiser/model.onnx.data"].bytes == data.stat().st_size
    assert "denoiser/model.onnx.data" not in open_bundle(one_block_bundle).files
    inputs = random_inputs(SD3, find_source(one_block_sd3).config, SHAPES[2])
    wanted = load_backend("torch", one_block_bundle, open_bundle(one_block_bundle), "cpu")(**inputs)
    for backend in ("torch", "onnxruntime"):
        pipe = load(tmp_path / "bundle", backend=backend)
        torch.testing.assert_close(pipe.transformer(**inputs).sample, wanted, rtol=1e-4, atol=1e-4)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"denoiser/model\.onnx\.data is not the file that was exported"):
        load(tmp_path / "bundle")


class Untraceable(nn.Module):
    """Branches on its input, which no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        sample = inputs["hidden_states"]
        return (sample * self.scale if float(sample.sum()) > 0 else sample,)


def test_what_cannot_be_traced_says_why_in_one_line(one_block: tuple[nn.Module, Source], tmp_path: Path) -> None:
    denoiser, source = one_block
    spec, axes = dataclasses.replace(SD3, graph=lambda _: Untraceable()), make_axes(source, "1:1:8", None)
    with pytest.raises(
        ObsdiffError, match=r"the denoiser could not be traced to ONNX: .*(symbolic|data-dep)"
    ) as caught:
        onnx.export_onnx(denoiser, spec, source.config, axes, tmp_path / "model.onnx")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "model.onnx").exists()


class Fixing(nn.Module):
    """Makes a Python number of the batch, which tracing takes for a constant and says nothing."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, **inputs: Any) -> tuple[Tensor, ...]:
        return (self.denoiser(**inputs)[0] / len(inputs["hidden_states"]),)


def test_an_axis_that_tracing_fixes_is_named(one_block: tuple[nn.Module, Source], tmp_path: Path) -> None:
    denoiser, source = one_block
    spec, axes = dataclasses.replace(SD3, graph=Fixing), make_axes(source, "1:1:8", None)
    with pytest.raises(ObsdiffError, match=r"tracing fixed batch of the input hidden_states at 2"):
        onnx.export_onnx(denoiser, spec, source.config, axes, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_no_graph_is_refused(one_block: tuple[nn.Module, Source], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ObsdiffError, match=r"ONNX Runtime does not load the fp32 graph: .+") as caught:
        check([], one_block[1], tmp_path / "model.onnx", [])
    assert len(str(caught.value).splitlines()) == 1


AXES = {
    "batch": Axis(min=1, opt=2, max=16),
    "height": Axis(min=4, opt=8, max=12, multiple=2),
    "width": Axis(min=4, opt=8, max=12, multiple=2),
    "tokens": Axis(min=1, opt=12, max=589),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": Axis(min=4, opt=4, max=4)},
        {"height": Axis(min=8, opt=8, max=8, multiple=2), "width": Axis(min=8, opt=8, max=8, multiple=2)},
        {"tokens": Axis(min=1, opt=1, max=2)},
        {"height": Axis(min=64, opt=128, max=256, multiple=4), "width": Axis(min=64, opt=128, max=256, multiple=4)},
    ],
    ids=str,
)
def test_shapes_to_check_are_inside_the_ranges_and_not_the_traced_one(changes: dict[str, Axis]) -> None:
    axes = AXES | changes
    shapes = parity.check_shapes(axes)
    assert all(axes[name].allows(size) for shape in shapes for name, size in shape.items())
    for name, axis in axes.items():
        assert (axis.min == axis.max) or any(shape[name] != axis.opt for shape in shapes)
    if axes["height"].min < axes["height"].max:
        assert all(shape["height"] != shape["width"] for shape in shapes)


def test_axes_of_a_single_size_are_traced_as_constants(one_block: tuple[nn.Module, Source], tmp_path: Path) -> None:
    denoiser, source = one_block
    side = Axis(min=8, opt=8, max=8, multiple=2)
    fixed = {"batch": Axis(min=2, opt=2, max=2), "height": side, "width": side, "tokens": Axis(min=12, opt=12, max=12)}
    path = trace(denoiser, source, tmp_path / "model.onnx", fixed)
    shapes = [{"batch": 2, "height": 8, "width": 8, "tokens": 12}]
    assert parity.check_shapes(fixed) == shapes * 2
    check(parity.reference_outputs(denoiser, SD3, source.config, shapes), source, path, shapes)
    dims = onnx_format.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [2, 8, 8, 8]
