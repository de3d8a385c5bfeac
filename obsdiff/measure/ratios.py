"""How many times as fast one is as the other, and how sure that is."""

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


def paired_ratio(first: Sequence[float], other: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The median of first/other over runs that were taken in turn, and its 95 % interval.

    Each run is compared with the one beside it, so that what slows both down for a while cancels. The interval is
    that of order statistics: exact for any distribution, and None below 6 runs, where no two of them are that sure.
    """
    ratios = sorted(a / b for a, b in zip(first, other, strict=False))  # an interrupted round has runs of the first
    depth = _depth(len(ratios))
    return float(np.median(ratios)), (ratios[depth - 1], ratios[-depth]) if depth else None


def median_ratio(first: Sequence[float], other: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The ratio of the medians of runs not taken together, and its 95 % bootstrap interval (None below 6 runs)."""
    ratio = float(np.median(first) / np.median(other))
    if min(len(first), len(other)) < 6:
        return ratio, None
    draw = np.random.default_rng(0)
    medians = [np.median(draw.choice(runs, (RESAMPLES, len(runs))), axis=1) for runs in (first, other)]
    low, high = np.quantile(medians[0] / medians[1], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return ratio, (float(low), float(high))


def _depth(count: int) -> int:
    """The largest k for which the k-th smallest and k-th largest of `count` values hold the median at that level."""
    below, depth = 0, 0
    for k in range(count):
        below += math.comb(count, k)
        if 2 * below > (1 - LEVEL) * 2**count:
            break
        depth = k + 1
    return depth
