"""Second moments of a layer's inputs, weighted by the sampler's step."""

import torch
from torch import Tensor


class Hessian:
    """H = Σ_t α_t X_t X_tᵀ / Σ_t α_t n_t over every token seen, float32 [width, width] (OBS-Diff, eq. 6)."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(width, width, device=device)
        self.weight = 0.0

    def add(self, inputs: Tensor, alpha: float = 1.0) -> None:
        """Adds the tokens of one call: [..., width], any floating dtype."""
        tokens = inputs.reshape(-1, inputs.shape[-1]).to(self.total.dtype)
        self.total.addmm_(tokens.T, tokens, alpha=alpha)
        self.weight += alpha * len(tokens)

    def mean(self) -> Tensor:
        """Raises ValueError when nothing was added, and when what was added holds NaN or infinity."""
        if not self.weight:
            raise ValueError("was never called during calibration")
        mean = self.total / self.weight
        if not mean.isfinite().all():
            raise ValueError("got NaN or infinity as input during calibration")
        return mean
