"""A bf16 graph with float32 in place of bf16, for ONNX Runtime, whose CPU has no bf16 kernels.

The weights stay rounded to bf16 and every node stays: what is checked is the graph and its weights. That its arithmetic
holds in bf16 too, with 8 bits of mantissa after every node, is not: only a GPU can tell.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SMALL = 1024  # values: constants of the graph, which are kept in it, as ONNX Runtime wants those that give shapes


@contextlib.contextmanager
def widened(path: Path) -> Iterator[Path]:
    """A temporary copy of the graph beside it, in float32, its weights in a file of their own.

    One weight at a time is in memory, so that the size of the model is no matter.
    """
    import onnx

    copy, data = (path.with_name(f".{path.name}.fp32{suffix}") for suffix in ("", ".data"))
    try:
        model = onnx.load(str(path), load_external_data=False)
        with data.open("wb") as file:
            for graph in _graphs(model):
                _widen(graph, path.parent, file)
        onnx.save(model, str(copy))
        yield copy
    finally:
        copy.unlink(missing_ok=True)
        data.unlink(missing_ok=True)


def _graphs(model: Any) -> Iterator[Any]:
    """The graph, the bodies of its nodes and of the functions that it calls."""
    from onnx import AttributeProto

    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            waiting += [entry.g for entry in node.attribute if entry.type == AttributeProto.GRAPH]


def _widen(graph: Any, folder: Path, data: BinaryIO) -> None:
    from onnx import AttributeProto, TensorProto

    narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
    tensors: Iterable[Any] = getattr(graph, "initializer", ())  # a function has none
    for tensor in tensors:
        if tensor.data_type == narrow:
            _widen_tensor(tensor, folder, data)
    for name in ("input", "output", "value_info"):
        for value in getattr(graph, name):
            if not isinstance(value, str) and value.type.tensor_type.elem_type == narrow:
                value.type.tensor_type.elem_type = wide
    for node in graph.node:
        for entry in node.attribute:
            if entry.type == AttributeProto.TENSOR and entry.t.data_type == narrow:
                _widen_tensor(entry.t, folder, None)
            elif entry.name in ("to", "dtype", "output_dtype", "stash_type") and entry.i == narrow:
                entry.i = wide


def _widen_tensor(tensor: Any, folder: Path, data: BinaryIO | None) -> None:
    """Writes the values to `data`, or into the tensor where there are few of them or `data` is None."""
    from onnx import TensorProto, external_data_helper

    bits: np.ndarray
    if external_data_helper.uses_external_data(tensor):
        where = external_data_helper.ExternalDataInfo(tensor)
        bits = np.memmap(folder / where.location, "<u2", "r", where.offset or 0, (int(where.length) // 2,))
    elif tensor.raw_data:
        bits = np.frombuffer(tensor.raw_data, "<u2")
    else:
        bits = np.asarray(tensor.int32_data, "<u2")
    values = (bits.astype("<u4") << 16).view("<f4")
    tensor.ClearField("int32_data")
    tensor.ClearField("external_data")
    tensor.data_type, tensor.data_location = TensorProto.FLOAT, TensorProto.DEFAULT
    tensor.raw_data = b""
    if data is None or values.size <= SMALL:
        tensor.raw_data = values.tobytes()
        return
    external_data_helper.set_external_data(tensor, Path(data.name).name, data.tell(), values.nbytes)
    tensor.ClearField("raw_data")
    values.tofile(data)
