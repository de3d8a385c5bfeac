"""How much each step of the sampler counts in the Hessian (OBS-Diff, arXiv 2510.06751, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(num_steps: int, low: float = 0.8, high: float = 1.2) -> Tensor:
    """The same weight for every step: what GPTQ and SparseGPT do. Returns float32 [num_steps], all (low + high) / 2."""
    _check(num_steps, low, high)
    return torch.full((num_steps,), (low + high) / 2)


def linear_increase(num_steps: int, low: float = 0.8, high: float = 1.2) -> Tensor:
    """Weights that rise evenly from `low` at the first, noisiest step to `high`. Returns float32 [num_steps]."""
    _check(num_steps, low, high)
    return torch.linspace(low, high, num_steps) if num_steps > 1 else torch.tensor([high])


def linear_decrease(num_steps: int, low: float = 0.8, high: float = 1.2) -> Tensor:
    """Weights that fall evenly from `high` at the first, noisiest step to `low`. Returns float32 [num_steps]."""
    return linear_increase(num_steps, low, high).flip(0)


def log_increase(num_steps: int, low: float = 0.8, high: float = 1.2) -> Tensor:
    """Weights that rise as a logarithm from `low` at the first step to `high`: steeply at first.

    Returns float32 [num_steps].
    """
    _check(num_steps, low, high)
    steps = torch.arange(num_steps, dtype=torch.float64)
    rise = torch.log1p(steps) / torch.log(torch.tensor(float(num_steps))) if num_steps > 1 else torch.ones(1)
    return (low + (high - low) * rise).float()


def log_decrease(num_steps: int, low: float = 0.8, high: float = 1.2) -> Tensor:
    """Weights that favour the early, noisy steps: low + (high − low) ln(1 + (T−1−i)) / ln T, the paper's choice.

    Returns float32 [num_steps], from `high` at the first step of the sampler down to `low` at its last.
    Raises ValueError unless num_steps >= 1 and 0 < low <= high.
    """
    return log_increase(num_steps, low, high).flip(0)


WEIGHTINGS: dict[str, Callable[[int], Tensor]] = {
    "log-decrease": log_decrease,
    "log-increase": log_increase,
    "linear-decrease": linear_decrease,
    "linear-increase": linear_increase,
    "uniform": uniform,
}


def _check(num_steps: int, low: float, high: float) -> None:
    if num_steps < 1 or not 0 < low <= high:
        raise ValueError(f"needs num_steps >= 1 and 0 < low <= high, not {num_steps}, {low}, {high}")
