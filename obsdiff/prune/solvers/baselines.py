"""Pruning without compensation: what everything else is compared with."""

import torch
from torch import Tensor

from obsdiff.prune.solvers.patterns import NM, Pattern, best_mask, kept_count, nm_mask, pattern_mask


def magnitude(weight: Tensor, hessian: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Removes the smallest weights of the layer (Han et al., arXiv 1506.02626). Needs no hessian."""
    mask = pattern_mask(weight.abs(), pattern)
    return weight * mask, mask


def wanda(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Removes, within each output, the weights with the smallest |w| times input norm (arXiv 2306.11695)."""
    mask = _wanda_mask(_wanda_score(weight, hessian), pattern)
    return weight * mask, mask


def dsnot(
    weight: Tensor, hessian: Tensor, pattern: Pattern, mean: Tensor, cycles: int = 50, threshold: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Swaps weights in and out of Wanda's mask until each output is right on average (DSnoT, arXiv 2310.08915).

    mean float32 [in] is the (weighted) mean input. For an output with the expected error ε the pruned weight with the
    largest sign(ε) w E[x] / Var[x] comes back, and of the kept weights with sign(ε) w E[x] < 0 the one with the
    smallest Wanda score goes, for at most `cycles` swaps, while |ε| is above `threshold` times its start and keeps its
    sign. For N:M both are of one group, so that only groups with a weight to give are looked at.
    """
    score, effect = _wanda_score(weight, hessian), weight * mean
    mask = _wanda_mask(score, pattern)
    variance = (hessian.diagonal() - mean.square()).clamp(min=1e-12)
    error = effect.masked_fill(mask, 0).sum(1, keepdim=True)
    sign, enough = error.sign(), threshold * error.abs()
    width = pattern.m if isinstance(pattern, NM) else weight.shape[1]
    groups = torch.arange(weight.shape[1], device=weight.device) // width
    active = error != 0
    for _ in range(cycles):
        may_go = mask & (sign * effect < 0)
        gives = may_go.unflatten(1, (-1, width)).any(2).repeat_interleave(width, 1)
        grown = (sign * effect / variance).masked_fill(mask | ~gives, -torch.inf).argmax(1, keepdim=True)
        may_go &= groups == groups[grown]
        gone = score.masked_fill(~may_go, torch.inf).argmin(1, keepdim=True)
        after = error - effect.gather(1, grown) + effect.gather(1, gone)
        better = (after.sign() == sign) & (after.abs() < error.abs())
        active = active & better & may_go.any(1, keepdim=True) & (error.abs() > enough)
        if not active.any():
            break
        error = torch.where(active, after, error)
        mask.scatter_(1, grown, active | mask.gather(1, grown)).scatter_(1, gone, ~active & mask.gather(1, gone))
    return weight * mask, mask


def _wanda_score(weight: Tensor, hessian: Tensor) -> Tensor:
    return weight.abs() * hessian.diagonal().clamp(min=0).sqrt()


def _wanda_mask(score: Tensor, pattern: Pattern) -> Tensor:
    if isinstance(pattern, NM):
        return nm_mask(score, pattern)
    return best_mask(score, kept_count(pattern.sparsity, score.shape[1]))
