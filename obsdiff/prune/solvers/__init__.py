"""Solvers: pure tensors in, pure tensors out. They import torch and nothing of obsdiff outside this folder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from obsdiff.prune.solvers.alps import alps
from obsdiff.prune.solvers.auto import Choice, choose
from obsdiff.prune.solvers.baselines import dsnot, magnitude, wanda
from obsdiff.prune.solvers.error import relative_error
from obsdiff.prune.solvers.obs import obs
from obsdiff.prune.solvers.patterns import NM, Pattern, Unstructured, check_width, is_nm, parse_nm

SOLVERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "obs": obs,
    "alps": alps,
    "dsnot": dsnot,
    "wanda": wanda,
    "magnitude": magnitude,
}
NEEDS_HESSIAN = frozenset(SOLVERS) - {"magnitude"}

__all__ = [
    "NEEDS_HESSIAN",
    "NM",
    "SOLVERS",
    "Choice",
    "Pattern",
    "Solution",
    "Unstructured",
    "choose",
    "is_nm",
    "parse_nm",
    "relative_error",
    "solve",
]


@dataclass(frozen=True)
class Solution:
    """weight [out, in] in the dtype that was given; mask bool [out, in], True = kept; error: relative output error
    (NaN without a hessian); choice: what `auto` took."""

    weight: Tensor
    mask: Tensor
    error: float
    choice: Choice | None = None


def solve(
    weight: Tensor,
    hessian: Tensor | None,
    pattern: Pattern,
    solver: str = "obs",
    held_out: Tensor | None = None,
    **options: Any,
) -> Solution:
    """Prunes one linear layer and compensates the weights that stay.

    weight [out, in], any floating dtype; hessian float32 [in, in], the (weighted) mean of x xᵀ over the layer's inputs,
    or None for solvers that do not look at inputs. Options go to the solver. `auto` also needs `held_out`, the same
    from as many other inputs: it takes what errs least on them, and solves with that for all inputs together.
    Raises ValueError for an unknown solver, a shape that does not fit, a pattern that does not divide the input
    dimension, and values that are not finite.
    """
    if solver not in ("auto", *SOLVERS):
        raise ValueError(f"unknown solver {solver!r}; there are auto, {', '.join(SOLVERS)}")
    if weight.ndim != 2:
        raise ValueError(f"the weight must be a matrix [out, in], not {list(weight.shape)}")
    check_width(pattern, weight.shape[1])
    if not weight.isfinite().all():
        raise ValueError("the weight holds NaN or infinity")
    if hessian is None and solver in NEEDS_HESSIAN:
        raise ValueError(f"{solver} needs a hessian")
    for given in (hessian, held_out):
        _check_hessian(given, weight)
    choice = None
    if solver == "auto":
        if hessian is None or held_out is None:
            raise ValueError("auto needs a hessian and a held_out one, from other inputs")
        choice = choose(weight.float(), hessian, held_out, pattern)
        solver, options = choice.solver, options | {"damping": choice.damping}
        hessian = (hessian + held_out) / 2
    pruned, mask = SOLVERS[solver](weight.float(), hessian, pattern, **options)
    pruned = pruned.to(weight.dtype)
    if not pruned.isfinite().all():
        raise ValueError(f"the compensated weights overflow {weight.dtype}: use a wider dtype or more damping")
    error = float("nan") if hessian is None else relative_error(weight, pruned, hessian)
    return Solution(pruned, mask, error, choice)


def _check_hessian(hessian: Tensor | None, weight: Tensor) -> None:
    if hessian is None:
        return
    if hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a weight {list(weight.shape)} needs a hessian [in, in], not {list(hessian.shape)}")
    if not hessian.isfinite().all():
        raise ValueError("the hessian holds NaN or infinity")
