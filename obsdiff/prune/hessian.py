"""Second moments of a layer's inputs, weighted by the sampler's step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Moments:
    """hessian float32 [width, width], the mean of x xᵀ; mean float32 [width], the mean of x; cross float32
    [width, width], the mean of x̃ xᵀ with x̃ the dense model's input, where it was collected."""

    hessian: Tensor
    mean: Tensor
    cross: Tensor | None = None


class Hessian:
    """H = Σ_t α_t X_t X_tᵀ / Σ_t α_t n_t over every token seen, float32 [width, width] (OBS-Diff, eq. 6)."""

    def __init__(self, width: int, device: torch.device | str = "cpu", cross: bool = False):
        self.total = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, width, device=device) if cross else None
        self.sum = torch.zeros(width, device=device)
        self.weight = 0.0

    def add(self, inputs: Tensor, alpha: float = 1.0, dense: Tensor | None = None) -> None:
        """Adds the tokens of one call: [..., width], any floating dtype. No tokens add nothing.

        `dense` are the inputs that the dense model has in their place, for `cross`.
        """
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self.sum.add_(tokens.sum(0, dtype=torch.float32), alpha=alpha)
        _add_product(self.total, tokens, tokens, alpha)
        if self.cross is not None and dense is not None:
            _add_product(self.cross, dense.reshape(tokens.shape), tokens, alpha)
        self.weight += alpha * len(tokens)


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """total += alpha leftᵀ right, in float32."""
    if right.is_cuda and right.dtype in HALF:  # tensor cores multiply, float32 accumulates
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32), alpha=alpha)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype), alpha=alpha)


Hessians = dict[tuple[str, ...], list[Hessian]]
"""By the linears that share an input: one, or one of the even prompts and one of the odd."""


def mean(hessians: Sequence[Hessian]) -> Moments:
    """The moments of all that was added to any of them.

    Raises ValueError when nothing was added, and when what was added holds NaN or infinity.
    """
    weight = sum(hessian.weight for hessian in hessians)
    if not weight:
        raise ValueError("was never called during calibration")
    first, *others = hessians
    total, inputs, cross = first.total, first.sum, first.cross
    for hessian in others:
        total, inputs = total + hessian.total, inputs + hessian.sum
        cross = None if cross is None or hessian.cross is None else cross + hessian.cross
    moments = Moments(total / weight, inputs / weight, None if cross is None else cross / weight)
    if not moments.hessian.isfinite().all():
        raise ValueError("got NaN or infinity as input during calibration")
    return moments
