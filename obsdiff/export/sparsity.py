"""Whether a weight can run on sparse tensor cores: the pattern, the shape, the dtype, and what the graph made of it.

The rules, from NVIDIA's documents:

- TensorRT ("Structured Sparsity" in its guide): of every four input channels of each output channel and each pixel of
  the kernel at least two are zero, and the precision is FP16, INT8 or a later one of that width.
- cuSPARSELt (`cusparseLtStructuredDescriptorInit`; PyTorch keeps the same table in `torch.sparse.semi_structured`,
  `SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS`): rows and columns of the weight are multiples of 16
  in fp16 and bf16, of 32 in int8 and fp8. In fp32 the cores compute in TF32, and there the pattern is 1:2, not 2:4.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.models.layers import as_matrix

GROUP, KEPT = 4, 2
MULTIPLE = {"fp16": 16, "bf16": 16}
SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter: the modules that a node comes from, outermost first


def not_24(weight: Tensor) -> str:
    """Why the weight of a linear or convolution is not 2:4 along its inputs, "" where it is."""
    channels = weight.shape[1]
    if channels % GROUP:
        return f"K = {channels} is no multiple of {GROUP}"
    filled = (as_matrix(weight) != 0).reshape(-1, GROUP).sum(1)
    bad, groups = int((filled > KEPT).sum()), len(filled)
    if bad * 2 > groups:
        return "dense weights"
    return f"{bad} of {groups} groups of {GROUP} have more than {KEPT} weights" if bad else ""


def misfit(shape: tuple[int, int], precision: str) -> str:
    """Why a 2:4 weight of that shape [out, in] has no sparse kernel in that precision, "" where it may have one.

    `in` counts the input channels of one tap of a convolution.
    """
    if precision not in MULTIPLE:
        return f"{precision}: sparse tensor cores take 2:4 weights in fp16, bf16, int8 and fp8 (tf32 needs 1:2)"
    for axis, size in zip(("out", "K"), shape, strict=True):
        if size % MULTIPLE[precision]:
            return f"{axis} = {size} is no multiple of {MULTIPLE[precision]} ({precision})"
    return ""


@dataclass(frozen=True)
class Product:
    """A node of the graph that multiplies with a constant weight, as [out, in] or [out, in, height, width]."""

    node: str
    weight: Tensor


def graph_products(path: Path, scopes: Mapping[str, str]) -> Iterator[tuple[str, Product]]:
    """The products of the ONNX file by the name of the linear that they come from. `scopes` is linear by graph scope.

    A Linear of a 3-D input is a MatMul in the graph with its weight stored [in, out] under a new name, one of a 2-D
    input a Gemm: the scopes that the exporter noted tell which is which, and the weight's own name where it has none.
    One weight is read at a time.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            name = next((scopes[scope] for scope in reversed(_scopes(node)) if scope in scopes), None)
            sides = (1, 0) if node.op_type == "MatMul" else (1,)
            for side in sides:
                found = _constant(node.input[side], tensors, makers, path.parent)
                if found is None:
                    continue
                source, weight = found
                name = name or scopes.get(source.removesuffix(".weight"))
                flipped = side == 1 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node)))
                if name and weight.ndim in (2, 4):
                    yield name, Product(node.name, weight.T if flipped else weight)
                break


def _scopes(node: Any) -> list[str]:
    text = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        return list(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return []


def _flag(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "transB"), 0)


def _constant(
    name: str, tensors: Mapping[str, Any], makers: Mapping[str, Any], folder: Path
) -> tuple[str, Tensor] | None:
    """Where the tensor is stored and whether each of its values is zero, through nodes that move values alone."""
    from onnx import numpy_helper

    if name in tensors:
        return name, torch.from_numpy(numpy_helper.to_array(tensors[name], str(folder)) != 0)
    node = makers.get(name)
    if node is None or node.op_type not in ("Transpose", "Cast", "Identity"):
        return None
    found = _constant(node.input[0], tensors, makers, folder)
    if found is None or node.op_type != "Transpose":
        return found
    order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
    return found[0], found[1].permute(order or list(reversed(range(found[1].ndim))))
