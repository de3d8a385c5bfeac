"""Random linear layers with correlated inputs: what solvers are tried on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obsdiff.prune.solvers import SOLVERS

ALL_SOLVERS = ("auto", *SOLVERS)


@dataclass(frozen=True)
class Layer:
    """weight float32 [rows, width], inputs float32 [tokens, width]: the first half to solve, the rest held out."""

    weight: Tensor
    inputs: Tensor

    @property
    def hessian(self) -> Tensor:
        return second_moment(self.inputs[: len(self.inputs) // 2])

    def options(self, solver: str) -> dict[str, Any]:
        """What that solver needs beside a Hessian."""
        half = len(self.inputs) // 2
        return {
            "auto": {"held_out": second_moment(self.inputs[half:])},
            "dsnot": {"mean": self.inputs[:half].mean(0)},
        }.get(solver, {})


def second_moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def make_layer(rows: int = 8, width: int = 16, seed: int = 0, tokens: int = 256, correlated: bool = True) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator)
    if correlated:  # mixed by a random matrix, with a mean that is not zero, loud and faint inputs
        mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
        inputs = (inputs @ mixing + 0.3) * torch.linspace(0.3, 2, width)
    return Layer(torch.randn(rows, width, generator=generator), inputs)
