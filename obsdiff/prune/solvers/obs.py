"""Optimal Brain Surgeon on one linear layer, column by column."""

import torch
from torch import Tensor

from obsdiff.prune.solvers.patterns import NM, Pattern, Unstructured, best_mask, kept_count, nm_mask


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H plus `damping` times its mean diagonal on the diagonal; an input that never fires gets a diagonal of one."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    return hessian + torch.diag(torch.where(live, damping * mean, diagonal.new_ones(())))


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """The upper Cholesky factor U of (H + damping)⁻¹ = Uᵀ U, what the SparseGPT recursion reads its rows from.

    hessian float32 [in, in]. Where round-off has made H indefinite the damping is raised tenfold until it is not.
    Raises ValueError when no damping up to 100 times the mean diagonal helps.
    """
    while damping <= 100:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)
    raise ValueError("the hessian is too far from positive definite to be damped")


def obs(
    weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Removes weights and lets those to their right make up for them (SparseGPT, arXiv 2301.00774).

    The score is w² / [H⁻¹]²_qq in the factor's diagonal; unstructured masks are chosen per `block` of columns,
    N:M masks per group of M columns, each on weights that were already compensated. weight [out, in] float32.
    """
    rows = weight.T.contiguous()  # [in, out]: a column of the paper is one stretch of memory here
    mask = torch.ones_like(rows, dtype=torch.bool)
    rows[hessian.diagonal() <= 0] = 0
    inverse = inverse_factor(hessian, damping)
    if isinstance(pattern, NM):
        block = max(pattern.m, block - block % pattern.m)
    for start in range(0, len(rows), block):
        part = slice(start, min(start + block, len(rows)))
        w, kept, u = rows[part], mask[part], inverse[part, part]
        errors = torch.empty_like(w)
        scale = u.diagonal()[:, None]
        if isinstance(pattern, Unstructured):
            score = (w / scale).square().reshape(1, -1)
            kept.copy_(best_mask(score, kept_count(pattern.sparsity, score.numel())).view_as(w))
        for i in range(len(w)):
            if isinstance(pattern, NM) and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                kept[group] = nm_mask((w[group] / scale[group]).square().T, pattern).T
            torch.div(w[i], scale[i], out=errors[i])
            errors[i].masked_fill_(kept[i], 0)
            w[i:].addr_(u[i, i:], errors[i], alpha=-1)
        rows[part.stop :].addmm_(inverse[part, part.stop :].T, errors, alpha=-1)
    mask = mask.T.contiguous()
    return rows.T * mask, mask
