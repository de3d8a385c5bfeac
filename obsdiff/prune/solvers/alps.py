"""ADMM for the mask, conjugate gradients for the weights on it."""

import torch
from torch import Tensor

from obsdiff.prune.solvers.patterns import Pattern, pattern_mask


def alps(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    damping: float = 0.1,
    rho: float = 0.1,
    growth: float = 1.6,
    settled: float = 1e-3,
    rounds: int = 30,
    refits: int = 10,
) -> tuple[Tensor, Tensor]:
    """Splits the layer into weights W and a sparse copy D that are pulled together (ALPS, arXiv 2406.07831).

    Every input is scaled to a second moment of one, then `damping` is added to the diagonal: unlike OBS's share of the
    mean it weighs loud and faint inputs alike, and 0.1 to 1 pay where calibration is short. A round is three ADMM steps
    with one ρ, and so one factorisation: W = (H + ρ)⁻¹ (H W₀ − V + ρ D), D the best fit of W + V / ρ to the pattern,
    V += ρ (W − D). ρ grows by the factor `growth` (the paper's finer schedule is half again as slow and 0.5 % better)
    until a round changes less of the mask than the share `settled`; conjugate gradients then solve W on the mask.
    weight [out, in] float32.
    Raises ValueError when the hessian cannot be factored even so.
    """
    dense, target, scaled, scale = _scale(weight, hessian, damping, rho)
    mask = pattern_mask(dense.abs(), pattern)
    sparse, dual = dense * mask, torch.zeros_like(dense)
    for _ in range(rounds):
        before, inverse = mask, torch.cholesky_inverse(torch.linalg.cholesky(_plus(scaled, rho)))
        for _ in range(3):
            free = (target - dual + rho * sparse) @ inverse
            wanted = free + dual / rho
            mask = pattern_mask(wanted.abs(), pattern)
            sparse = wanted * mask
            dual += rho * (free - sparse)
        changed = (mask != before).sum().item() / (2 * mask.sum().item())
        if changed < settled:
            break
        rho *= growth
    return conjugate_gradients(sparse, target, scaled, mask, refits) / scale, mask


def refit(weight: Tensor, hessian: Tensor, start: Tensor, mask: Tensor, damping: float, steps: int = 10) -> Tensor:
    """The weights on a mask that is given, from `start`, with alps's damping. All [out, in] but hessian; float32."""
    _, target, scaled, scale = _scale(weight, hessian, damping)
    return conjugate_gradients(start * scale, target, scaled, mask, steps) / scale


def conjugate_gradients(start: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Lowers tr(½ W H Wᵀ − W Tᵀ) over the weights on the mask, all rows at once, from `start`.

    start, target T and mask [out, in], hessian float32 [in, in] with a diagonal of about one (it is its own
    preconditioner then). The loss falls at every step.
    """
    weight = start * mask
    residual = (target - weight @ hessian) * mask
    direction = residual
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian) * mask
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0)
        weight = weight + step * direction
        residual = residual - step * image
        previous, energy = energy, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(previous > 0, energy / previous, 0) * direction
    return weight


def _scale(weight: Tensor, hessian: Tensor, damping: float, rho: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight, its target and the damped H for inputs with a second moment of one, and the scale taken."""
    scale = hessian.diagonal().clamp(min=0).sqrt()
    live = scale > 0
    scale = torch.where(live, scale, 1)
    scaled = _solvable(hessian / scale[:, None] / scale, damping, rho)
    dense = weight * scale * live
    return dense, dense @ scaled, scaled, scale


def _solvable(scaled: Tensor, damping: float, rho: float) -> Tensor:
    """H with a diagonal of 1 + damping, raised tenfold until H + ρ has a Cholesky factor despite round-off."""
    while damping <= 1000:
        scaled.diagonal().fill_(1 + damping)
        if not torch.linalg.cholesky_ex(_plus(scaled, rho))[1]:
            return scaled
        damping *= 10
    raise ValueError("the hessian is too far from positive definite to be damped")


def _plus(matrix: Tensor, shift: float) -> Tensor:
    return matrix + shift * torch.eye(len(matrix), device=matrix.device)
