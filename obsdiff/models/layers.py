"""Linears and convolutions alike as a matrix [out, in] times inputs [tokens, in]."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Linear | nn.Conv2d
PIECE = 2**27
"""Entries of a convolution's patches at a time. One sample of Stable Diffusion 1.5 at 512 pixels has up to 35 million
(960 channels, 9 taps, 64 by 64 positions): a batch of 8 with guidance would take 1.1 GB in half precision."""


def as_matrix(weight: Tensor) -> Tensor:
    """[out, in] of a linear's weight, [out, height * width * in] of a convolution's [out, in, height, width].

    A convolution's input channels lie next to each other, tap after tap: N:M is along the channels, which is what
    sparse kernels for NHWC convolutions multiply along.
    """
    return weight if weight.ndim != 4 else weight.permute(0, 2, 3, 1).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The weight of that shape again."""
    if len(shape) != 4:
        return matrix
    out, channels, height, width = shape
    return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2).contiguous()


def width(layer: Layer) -> int:
    """Columns of the layer's matrix."""
    return layer.weight[0].numel()


def taps(layer: Layer) -> int:
    """How many runs of input channels a row of the matrix is made of: N:M must not reach from one into the next.

    Raises ValueError for a convolution in groups, whose outputs do not read the same inputs.
    """
    if isinstance(layer, nn.Linear):
        return 1
    if layer.groups > 1:
        raise ValueError(f"a convolution in {layer.groups} groups is no single matrix and cannot be pruned")
    return layer.kernel_size[0] * layer.kernel_size[1]


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """[out, in] of the layer's matrix."""
    return len(layer.weight), width(layer)


def inputs_of(layer: Layer, value: Tensor) -> Tensor:
    """What the matrix multiplies: a linear's input [..., in] as it is, a convolution's [n, C, h, w] as patches.

    Returns [n, tokens, in] for a convolution, a token for each output position (im2col), padded as it pads.
    """
    if isinstance(layer, nn.Linear):
        return value
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        value, padding = functional.pad(value, layer._reversed_padding_repeated_twice, mode), (0, 0)
    patches = functional.unfold(value, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.unflatten(1, (-1, taps(layer))).permute(0, 3, 2, 1).flatten(2)


def piece(layer: Layer, entries: int) -> int:
    """How many samples that many entries each are turned into patches at a time."""
    return max(1, PIECE // (entries * taps(layer)))


def pieces(layer: Layer, value: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """inputs_of in pieces, each with the samples that it holds: patches are as many times larger as there are taps."""
    whole = isinstance(layer, nn.Linear) or not len(value)
    step = max(1, len(value)) if whole else piece(layer, value[0].numel())
    for start in range(0, len(value), step):
        samples = slice(start, min(start + step, len(value)))
        yield samples, inputs_of(layer, value[samples])
