"""95 % bootstrap intervals: how far a figure would move with other pictures of the same kind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
FEW = 40  # resamples of a figure that is dear to compute
LEVEL = 0.95


def mean_interval(values: np.ndarray[Any, Any], share: bool = False, seed: int = 0) -> tuple[float, float, float]:
    """The mean of values [n] and its percentile bootstrap interval: (mean, low, high), NaN when a value is.

    `share`: the values are 0 or 1. When all are the same, resampling says that nothing could change; the exact
    (Clopper-Pearson) interval is taken then. One value that is no share has no interval: its ends are NaN. Raises
    ValueError when there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no value to take the mean of")
    mean, count, tail = float(values.mean()), len(values), (1 - LEVEL) / 2
    if share and mean in (0.0, 1.0):
        edge = tail ** (1 / count)
        return (1.0, edge, 1.0) if mean else (0.0, 0.0, 1 - edge)
    if count == 1:
        return mean, np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile(values[drawn].mean(1), (tail, 1 - tail))
    return mean, min(float(low), mean), max(float(high), mean)


def distance_interval(
    distance: Callable[[Tensor, Tensor], float], features: Tensor, reference: Tensor, seed: int = 0
) -> tuple[float, float, float]:
    """The distance between two sets of features [n, d] of the same prompts, and its interval: (value, low, high).

    The bootstrap draws prompts, the same for both sets. A distance of distributions is larger the fewer different
    pictures there are, so the resamples lie above the value: only their spread is used, value ± 1.96 deviations.
    """
    value = distance(features, reference)
    draw = np.random.default_rng(seed)
    spread = []
    for _ in range(FEW):
        chosen = torch.from_numpy(draw.integers(0, len(features), len(features)))
        spread.append(distance(features[chosen], reference[chosen]))
    reach = 1.96 * float(np.std(spread, ddof=1))
    return value, value - reach, value + reach
