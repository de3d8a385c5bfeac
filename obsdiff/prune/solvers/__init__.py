"""Solvers: pure tensors in, pure tensors out. They import torch and nothing of obsdiff outside this folder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obsdiff.prune.solvers.baselines import magnitude, wanda
from obsdiff.prune.solvers.obs import obs
from obsdiff.prune.solvers.patterns import NM, Pattern, Unstructured, check_width, is_nm, parse_nm

SOLVERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "obs": obs,
    "wanda": wanda,
    "magnitude": magnitude,
}
NEEDS_HESSIAN = frozenset(SOLVERS) - {"magnitude"}

__all__ = [
    "NEEDS_HESSIAN",
    "NM",
    "SOLVERS",
    "Pattern",
    "Solution",
    "Unstructured",
    "is_nm",
    "parse_nm",
    "relative_error",
    "solve",
]


@dataclass(frozen=True)
class Solution:
    """weight [out, in] in the dtype that was given; mask bool [out, in], True = kept; error: relative output error
    (NaN without a hessian)."""

    weight: Tensor
    mask: Tensor
    error: float


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """sqrt(tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)); 0 where the layer puts out nothing anyway."""
    weight, difference = weight.float(), (weight.float() - pruned.float())
    lost = ((difference @ hessian) * difference).sum(dtype=torch.float64)
    total = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float((lost.clamp(min=0) / total).sqrt()) if total > 0 else 0.0


def solve(weight: Tensor, hessian: Tensor | None, pattern: Pattern, solver: str = "obs", **options: Any) -> Solution:
    """Prunes one linear layer and compensates the weights that stay.

    weight [out, in], any floating dtype; hessian float32 [in, in], the (weighted) mean of x xᵀ over the layer's inputs,
    or None for solvers that do not look at inputs. Options go to the solver.
    Raises ValueError for an unknown solver, a shape that does not fit, a pattern that does not divide the input
    dimension, and values that are not finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; there are {', '.join(SOLVERS)}")
    if weight.ndim != 2:
        raise ValueError(f"the weight must be a matrix [out, in], not {list(weight.shape)}")
    check_width(pattern, weight.shape[1])
    if not weight.isfinite().all():
        raise ValueError("the weight holds NaN or infinity")
    if hessian is None:
        if solver in NEEDS_HESSIAN:
            raise ValueError(f"{solver} needs a hessian")
    elif hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a weight {list(weight.shape)} needs a hessian [in, in], not {list(hessian.shape)}")
    elif not hessian.isfinite().all():
        raise ValueError("the hessian holds NaN or infinity")
    pruned, mask = SOLVERS[solver](weight.float(), hessian, pattern, **options)
    pruned = pruned.to(weight.dtype)
    if not pruned.isfinite().all():
        raise ValueError(f"the compensated weights overflow {weight.dtype}: use a wider dtype or more damping")
    error = float("nan") if hessian is None else relative_error(weight, pruned, hessian)
    return Solution(pruned, mask, error)
