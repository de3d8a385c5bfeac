"""The denoiser as an ONNX graph with dynamic batch, latent size and prompt length, checked in ONNX Runtime."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import ObsdiffError, first_line
from obsdiff.export.parity import compare
from obsdiff.export.program import dynamic_axes, quiet, traced_sizes
from obsdiff.export.schema import Axis, Check, Precision
from obsdiff.export.widen import widened
from obsdiff.models import Input, ModelSpec, graph

OPSET = 20  # 23 emits Attention and RMSNormalization, which TensorRT-RTX parses and then fails to build
PROTOBUF_LIMIT = 2**31 - 2**20  # a serialised graph must stay below 2 GiB: weights move to a file beside it


def export_onnx(
    denoiser: nn.Module, spec: ModelSpec, config: Mapping[str, Any], axes: Mapping[str, Axis], path: Path
) -> None:
    """Traces the denoiser with torch's dynamo exporter and writes the graph, weights beside it past 2 GB.

    Raises ObsdiffError with the exporter's reason when the denoiser cannot be traced.
    """
    write_graph(graph.TensorDenoiser(denoiser, spec), "the denoiser", [spec.output.name], spec, config, axes, path)


def write_graph(
    module: nn.Module,
    name: str,
    outputs: Sequence[str],
    spec: ModelSpec,
    config: Mapping[str, Any],
    axes: Mapping[str, Axis],
    path: Path,
) -> list[str]:
    """Traces a module that takes the spec's inputs in their order, and returns what dtypes come out.

    `name` says what it is. Raises ObsdiffError with the exporter's reason when it cannot be traced.
    """
    dtype = next(module.parameters()).dtype
    inputs = graph.random_inputs(spec, config, traced_sizes(axes), dtype)
    dynamic = dynamic_axes(spec, config, axes)
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), _exact_zeros():
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes={"inputs": dynamic},
                opset_version=OPSET,
                custom_translation_table={operator.floordiv: _floordiv(), torch.ops.aten.squeeze.dim: _squeeze()},
                verbose=False,
            )
        except Exception as error:  # the exporter's errors share no base class
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ObsdiffError(f"{name} could not be traced to ONNX: {reason}") from error
        assert program is not None
        _check_dynamic(program.model.graph.inputs, dynamic, spec.graph_inputs(config))
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        program.save(path, external_data=size > PROTOBUF_LIMIT)
    return [str(value.dtype.numpy()) for value in program.model.graph.outputs if value.dtype]


def _check_dynamic(values: Sequence[Any], dynamic: Sequence[Mapping[int, Any]], entries: Sequence[Input]) -> None:
    """Tracing may fix an axis without a word (len of a tensor, a Python number made of its shape)."""
    for value, dims, entry in zip(values, dynamic, entries, strict=True):
        for i in dims:
            if isinstance(value.shape[i], int):
                raise ObsdiffError(f"tracing fixed {entry.axes[i]} of the input {entry.name} at {value.shape[i]}")


def check_onnx(
    expected: Sequence[Tensor],
    spec: ModelSpec,
    config: Mapping[str, Any],
    shapes: Sequence[Mapping[str, int]],
    path: Path,
    precision: Precision,
) -> Check:
    """Runs the graph in ONNX Runtime on the inputs that gave `expected` in PyTorch, float32.

    A bf16 graph is run with its weights rounded to bf16 and float32 in between: the CPU has no bf16 kernels.
    Raises ObsdiffError when the graph does not load or run, gives NaN, or is further off than the precision explains.
    """
    run = open_graph(path, precision)

    def denoise(**inputs: Tensor) -> Tensor:
        (result,) = run(**inputs)
        return result

    return compare(denoise, expected, spec, config, shapes, precision, name="graph")


def open_graph(path: Path, precision: Precision) -> Callable[..., list[Tensor]]:
    """The graph as a function of its inputs by name, on the CPU, for checks. Raises ObsdiffError as check_onnx does."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # errors come back as exceptions; printed too, they come twice
    try:
        with widened(path) if precision == "bf16" else contextlib.nullcontext(path) as runnable:
            session = onnxruntime.InferenceSession(str(runnable), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise ObsdiffError(f"ONNX Runtime does not load the {precision} graph: {first_line(error)}") from None

    def run(**inputs: Tensor) -> list[Tensor]:
        inputs = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in inputs.items()}
        feeds = {name: onnxruntime.OrtValue.from_dlpack(value.__dlpack__()) for name, value in inputs.items()}
        try:
            return [torch.from_dlpack(result) for result in session.run_with_ort_values(None, feeds)]
        except Exception as error:
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            raise ObsdiffError(f"ONNX Runtime fails at {shapes}: {first_line(error)}") from None

    return run


def _floordiv() -> Any:
    """operator.floordiv for ONNX that rounds down for negative numbers too.

    onnxscript 0.7 emits a bare Div, which truncates: SD3's position embedding is then cropped to the wrong width
    wherever the difference between its size and the picture's is odd.
    """
    from onnxscript import INT64
    from onnxscript import opset20 as op

    def floordiv(self: INT64, other: INT64) -> INT64:
        return op.Div(op.Sub(self, op.Mod(self, other)), other)

    floordiv.__annotations__ = {"self": INT64, "other": INT64, "return": INT64}
    return floordiv


def _squeeze() -> Any:
    """aten.squeeze of one axis for ONNX that leaves an axis alone whose size is not 1, as PyTorch's does.

    onnxscript 0.7 emits a bare Squeeze, which is an error for PixArt's `squeeze(1)` on the image's tokens.
    """
    from onnxscript import opset20 as op

    def squeeze(self: Any, dim: int) -> Any:
        if self.shape[dim] != 1:
            return op.Identity(self)
        return op.Squeeze(self, op.Constant(value_ints=[dim]))

    return squeeze


@contextlib.contextmanager
def _exact_zeros() -> Iterator[None]:
    """onnxscript's optimiser takes what is within 1e-8 of 0 for 0 and drops it, while the body does not.

    Sana's attention adds 1e-15 so as not to divide by zero: without it nearly half of the output is NaN.
    """
    from onnxscript.rewriter import pattern
    from onnxscript.rewriter.rules.common import _no_op

    inputs = [value for rule in _no_op.rules for node in rule._target_pattern for value in node.inputs]
    constants: list[Any] = [value for value in inputs if isinstance(value, pattern.Constant)]
    kept = [constant._abs_tol for constant in constants]
    for constant in constants:
        constant._abs_tol = 0.0
    try:
        yield
    finally:
        for constant, tolerance in zip(constants, kept, strict=True):
            constant._abs_tol = tolerance
