"""Which solver, and how much damping: decided by the error on inputs that were not solved for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from obsdiff.prune.solvers.alps import alps, refit
from obsdiff.prune.solvers.error import relative_error
from obsdiff.prune.solvers.obs import obs
from obsdiff.prune.solvers.patterns import Pattern

OBS_DAMPING = 0.01
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
ROWS = 256  # outputs that are tried: rows share a hessian, so a part of them speaks for all


@dataclass(frozen=True)
class Choice:
    """The winner, its relative output error on held-out inputs and that of plain OBS, on the rows tried."""

    solver: str
    damping: float
    error: float
    obs_error: float


def choose(
    weight: Tensor, hessian: Tensor, held_out: Tensor, pattern: Pattern, dampings: Sequence[float] = DAMPINGS
) -> Choice:
    """Solves an evenly spread part of the rows with OBS and with ALPS, and keeps what errs least on `held_out`.

    weight [out, in] float32; hessian and held_out float32 [in, in], from inputs of different prompts. ALPS's mask is
    found once and refitted with each damping, which orders them as solving anew with each would, at a fifth of the
    cost. OBS wins ties, so the choice is never worse than it on the held-out inputs.
    """
    part = sample_rows(weight)
    plain = relative_error(part, obs(part, hessian, pattern, OBS_DAMPING)[0], held_out)
    start, mask = alps(part, hessian, pattern)
    errors = {d: relative_error(part, refit(part, hessian, start, mask, d), held_out) for d in dampings}
    best = min(errors, key=errors.__getitem__)
    if plain <= errors[best]:
        return Choice("obs", OBS_DAMPING, plain, plain)
    return Choice("alps", best, errors[best], plain)


def sample_rows(weight: Tensor) -> Tensor:
    """Up to ROWS rows of a weight, evenly spread."""
    return weight[:: -(-len(weight) // ROWS)]
