"""Second moments of a layer's inputs, weighted by the sampler's step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Moments:
    """hessian float32 [width, width], the mean of x xᵀ; mean float32 [width], the mean of x."""

    hessian: Tensor
    mean: Tensor


class Hessian:
    """H = Σ_t α_t X_t X_tᵀ / Σ_t α_t n_t over every token seen, float32 [width, width] (OBS-Diff, eq. 6)."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(width, width, device=device)
        self.sum = torch.zeros(width, device=device)
        self.weight = 0.0

    def add(self, inputs: Tensor, alpha: float = 1.0) -> None:
        """Adds the tokens of one call: [..., width], any floating dtype. No tokens add nothing."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self.sum.add_(tokens.sum(0, dtype=torch.float32), alpha=alpha)
        if tokens.is_cuda and tokens.dtype in HALF:  # tensor cores multiply, float32 accumulates
            self.total.add_(torch.mm(tokens.T, tokens, out_dtype=torch.float32), alpha=alpha)
        else:
            tokens = tokens.to(self.total.dtype)
            self.total.addmm_(tokens.T, tokens, alpha=alpha)
        self.weight += alpha * len(tokens)


Hessians = dict[tuple[str, ...], list[Hessian]]
"""By the linears that share an input: one, or one of the even prompts and one of the odd."""


def mean(hessians: Sequence[Hessian]) -> Moments:
    """The moments of all that was added to any of them.

    Raises ValueError when nothing was added, and when what was added holds NaN or infinity.
    """
    weight = sum(hessian.weight for hessian in hessians)
    if not weight:
        raise ValueError("was never called during calibration")
    total, inputs = hessians[0].total, hessians[0].sum
    for hessian in hessians[1:]:
        total, inputs = total + hessian.total, inputs + hessian.sum
    moments = Moments(total / weight, inputs / weight)
    if not moments.hessian.isfinite().all():
        raise ValueError("got NaN or infinity as input during calibration")
    return moments
