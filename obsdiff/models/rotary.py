"""Rotary positions (arXiv 2104.09864) without complex numbers, which no ONNX graph has."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_table(ids: Tensor, dims: Sequence[int], theta: float) -> Tensor:
    """Cosines and sines that turn a head's pairs of entries, `dims[axis]` entries of it by the position along an axis.

    ids [..., axes], float32; returns float32 [..., sum(dims) / 2, 2].
    """
    parts = [ids[..., axis, None] * _frequencies(dim, theta, ids.device) for axis, dim in enumerate(dims)]
    angles = torch.cat(parts, dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """Turns heads [batch, tokens, heads, dim] by a rotary_table [..., tokens, dim / 2, 2], or by its complex twin."""
    cos, sin = (table.real, table.imag) if table.is_complex() else table.unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(heads)
