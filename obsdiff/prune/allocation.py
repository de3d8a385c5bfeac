"""Which layer gets how much sparsity: the amounts that together lose least for what they must save."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """One way to prune a layer: the sparsity or the units that stay, what it then costs, and the error it adds."""

    amount: float
    cost: float
    error: float


def allocate(curves: Mapping[str, Sequence[Level]], budget: float) -> dict[str, Level]:
    """The level of each layer that adds the least error while all costs together stay within `budget`.

    Walks down the lower convex hulls of error against cost, always where a unit of cost is saved for the least error:
    optimal but for the last step. ZipLM (arXiv 2302.04089) does the same search over latencies.
    Raises ValueError with what can be reached when even the cheapest levels cost more.
    """
    budget += 1e-9 * abs(budget)  # both are sums of many floats
    hulls = {name: _hull(levels) for name, levels in curves.items()}
    chosen = dict.fromkeys(hulls, 0)
    total = sum(hull[0].cost for hull in hulls.values())
    floor = sum(hull[-1].cost for hull in hulls.values())
    if floor > budget:
        raise ValueError(f"even the most that may go leaves a cost of {floor:.4g}, more than {budget:.4g}")
    while total > budget:
        steps = {
            name: (hull[i + 1].error - hull[i].error) / (hull[i].cost - hull[i + 1].cost)
            for name, hull in hulls.items()
            if (i := chosen[name]) + 1 < len(hull)
        }
        best = min(steps, key=steps.__getitem__)
        hull, i = hulls[best], chosen[best]
        total -= hull[i].cost - hull[i + 1].cost
        chosen[best] += 1
    return {name: hulls[name][i] for name, i in chosen.items()}


def _hull(levels: Sequence[Level]) -> list[Level]:
    """The lower convex hull of error over cost, from the dearest level down; levels that gain nothing fall out."""
    hull: list[Level] = []
    for level in sorted(levels, key=lambda level: (-level.cost, level.error)):
        if hull and level.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], level) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        while hull and level.error <= hull[-1].error:
            hull.pop()
        hull.append(level)
    return hull


def _slope(dear: Level, cheap: Level) -> float:
    return (cheap.error - dear.error) / (dear.cost - cheap.cost)


def owl(
    outliers: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float = 0.08
) -> dict[str, float]:
    """Less sparsity where more of a layer's scores are outliers (OWL, arXiv 2310.05175).

    outliers: the share of |w| ‖x‖ above five times its mean, by layer; sizes: weights. Sparsities lie within
    2 `spread` of each other, and their mean over all weights is `sparsity`.
    """
    low, high = min(outliers.values()), max(outliers.values())
    scale = 2 * spread / (high - low) if high > low else 0.0
    raw = {name: -(share - low) * scale for name, share in outliers.items()}
    mean = sum(raw[name] * sizes[name] for name in raw) / sum(sizes[name] for name in raw)
    return {name: min(max(sparsity + value - mean, 0.01), 0.99) for name, value in raw.items()}
