"""Pruning without compensation: what everything else is compared with."""

from torch import Tensor

from obsdiff.prune.solvers.patterns import NM, Pattern, best_mask, kept_count, nm_mask


def magnitude(weight: Tensor, hessian: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Removes the smallest weights of the layer (Han et al., arXiv 1506.02626). Needs no hessian."""
    score = weight.abs()
    if isinstance(pattern, NM):
        mask = nm_mask(score, pattern)
    else:
        mask = best_mask(score.view(1, -1), kept_count(pattern.sparsity, weight.numel())).view_as(weight)
    return weight * mask, mask


def wanda(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Removes, within each output, the weights with the smallest |w| times input norm (arXiv 2306.11695)."""
    score = weight.abs() * hessian.diagonal().clamp(min=0).sqrt()
    if isinstance(pattern, NM):
        mask = nm_mask(score, pattern)
    else:
        mask = best_mask(score, kept_count(pattern.sparsity, weight.shape[1]))
    return weight * mask, mask
