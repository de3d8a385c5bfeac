"""Which solver, and how much damping: decided by the error on inputs that were not solved for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from obsdiff.prune.solvers.alps import alps
from obsdiff.prune.solvers.error import relative_error
from obsdiff.prune.solvers.obs import obs
from obsdiff.prune.solvers.patterns import Pattern

CANDIDATES = (("obs", 0.01), ("alps", 0.01), ("alps", 0.1), ("alps", 0.3), ("alps", 1.0))
FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"obs": obs, "alps": alps}
ROWS = 256  # outputs that candidates are tried on: rows share a hessian, so a part of them speaks for all


@dataclass(frozen=True)
class Choice:
    """The winner, its relative output error on held-out inputs and that of plain OBS, on the rows tried."""

    solver: str
    damping: float
    error: float
    obs_error: float


def choose(
    weight: Tensor,
    hessian: Tensor,
    held_out: Tensor,
    pattern: Pattern,
    candidates: Sequence[tuple[str, float]] = CANDIDATES,
) -> Choice:
    """Solves an evenly spread part of the rows with each candidate and keeps the best on `held_out`.

    weight [out, in] float32; hessian and held_out float32 [in, in], from inputs of different prompts. The first
    candidate, plain OBS, also wins ties, so the choice is never worse than it on the held-out inputs.
    """
    part = sample_rows(weight)
    errors = [
        relative_error(part, FUNCTIONS[solver](part, hessian, pattern, damping=damping)[0], held_out)
        for solver, damping in candidates
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Choice(*candidates[best], errors[best], errors[0])


def sample_rows(weight: Tensor) -> Tensor:
    """Up to ROWS rows of a weight, evenly spread."""
    return weight[:: max(1, len(weight) // ROWS)][:ROWS]
