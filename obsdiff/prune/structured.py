"""Structured OBS: whole heads and neurons, which are sets of columns of the projections that read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.prune.solvers import relative_error
from obsdiff.prune.solvers.obs import damped


@dataclass(frozen=True)
class Removal:
    """kept: sorted unit indexes; weights: the compensated [out, in] of each reader, removed columns zero;
    errors: the relative output error of each (NaN without Hessians); losses: after each removal, the squares of the
    relative errors summed over the readers (OBS only)."""

    kept: list[int]
    weights: list[Tensor]
    errors: list[float]
    losses: tuple[float, ...] = ()


def keep_count(units: int, share: float, round_to: int) -> int:
    """Units left when `share` of them may go: at least that many stay, snapped up to a multiple of `round_to`.

    A width that is no multiple of 8 (better 64) falls off the tensor cores.
    """
    kept = max(1, units - int(units * share + 1e-9))
    return min(units, -(-kept // round_to) * round_to)


def default_multiple(width: int) -> int:
    """The multiple that neuron counts snap to: 64 at real sizes, 8 at small ones."""
    return 64 if width >= 1024 else 8


def remove_obs(
    weights: Sequence[Tensor],
    hessians: Sequence[Tensor],
    units: int,
    keep: int,
    damping: float = 0.01,
    spans: Sequence[range] = (),
) -> Removal:
    """Removes, one at a time, the unit whose loss the remaining ones make up for best (OBS-Diff, arXiv 2510.06751).

    weights [out_k, in] of the projections that read the same units, hessians float32 [in, in], one each; unit u is
    the u-th of `units` equal runs of columns, or of those in `spans`, a range for each weight: the columns outside stay
    and help to make up for what goes. The loss of a set S is tr(W_S [H⁻¹_SS]⁻¹ W_Sᵀ), summed over the readers
    as a share of what each puts out, so that an image and a text stream are counted in one unit. After each removal W
    and H⁻¹ are brought up to date by a Schur complement; at the end W is solved once more for the columns that
    stay, which is the same in exact arithmetic and sheds the round-off of the many updates.
    Raises ValueError when a Hessian cannot be factored.
    """
    spans = _check(weights, hessians, units, keep, spans)
    solvable = [damped(hessian, damping) for hessian in hessians]
    # An input that never fires costs nothing, whatever its weight.
    live = [weight.float() * (hessian.diagonal() > 0) for weight, hessian in zip(weights, hessians, strict=True)]
    alive, losses = greedy_units(live, solvable, units, keep, spans)
    pruned = [
        _refit(weight, hessian, _columns(weight, alive, span)).to(weight.dtype)
        for weight, hessian, span in zip(weights, solvable, spans, strict=True)
    ]
    errors = [
        relative_error(weight, new, hessian) for weight, new, hessian in zip(weights, pruned, hessians, strict=True)
    ]
    return Removal(alive.nonzero().flatten().tolist(), pruned, errors, tuple(losses))


def greedy_units(
    weights: Sequence[Tensor], hessians: Sequence[Tensor], units: int, keep: int, spans: Sequence[range] = ()
) -> tuple[Tensor, list[float]]:
    """Which units stay (bool [units]) and the losses summed up after each removal; hessians are positive definite."""
    spans = spans or [range(weight.shape[1]) for weight in weights]
    work = [weight.clone() for weight in weights]
    energies = [((w @ h) * w).sum().clamp(min=1e-30) for w, h in zip(work, hessians, strict=True)]
    inverses = [_inverse(hessian) for hessian in hessians]
    alive = torch.ones(units, dtype=torch.bool, device=work[0].device)
    losses: list[Tensor] = []
    for _ in range(units - keep):
        loss = sum(_losses(*terms[:3], units) / terms[3] for terms in zip(work, inverses, spans, energies, strict=True))
        assert isinstance(loss, Tensor)
        unit = int(torch.where(alive, loss, torch.inf).argmin())
        alive[unit] = False
        losses.append(loss[unit])
        for w, inverse, span in zip(work, inverses, spans, strict=True):
            size = len(span) // units
            _remove(w, inverse, slice(span.start + unit * size, span.start + (unit + 1) * size))
    return alive, torch.stack(losses).cumsum(0).tolist() if losses else []


def remove_magnitude(
    weights: Sequence[Tensor], hessians: Sequence[Tensor | None], units: int, keep: int, spans: Sequence[range] = ()
) -> Removal:
    """Removes the units whose columns have the smallest L1 norm and compensates nothing: the usual baseline."""
    spans = _check(weights, hessians, units, keep, spans)
    parts = [weight.float().abs().sum(0)[span.start : span.stop] for weight, span in zip(weights, spans, strict=True)]
    norms = torch.stack([part.view(units, -1).sum(1) for part in parts]).sum(0)
    kept = norms.topk(keep).indices.sort().values
    alive = torch.zeros(units, dtype=torch.bool, device=weights[0].device)
    alive[kept] = True
    pruned = [weight * _columns(weight, alive, span) for weight, span in zip(weights, spans, strict=True)]
    errors = [
        float("nan") if hessian is None else relative_error(weight, new, hessian)
        for weight, new, hessian in zip(weights, pruned, hessians, strict=True)
    ]
    return Removal(kept.tolist(), pruned, errors)


def remove_auto(
    weights: Sequence[Tensor],
    hessians: Sequence[Tensor],
    held_out: Sequence[Tensor],
    units: int,
    keep: int,
    dampings: Sequence[float] = (0.01, 0.1, 1.0),
    spans: Sequence[range] = (),
) -> Removal:
    """remove_obs with the damping that errs least on `held_out`, from as many other inputs; solved for all inputs.

    Raises ValueError as remove_obs does.
    """

    def error(damping: float) -> float:
        removal = remove_obs(weights, hessians, units, keep, damping, spans)
        pairs = zip(weights, removal.weights, held_out, strict=True)
        return sum(relative_error(weight, new, hessian) ** 2 for weight, new, hessian in pairs)

    both = [(a + b) / 2 for a, b in zip(hessians, held_out, strict=True)]
    return remove_obs(weights, both, units, keep, min(dampings, key=error), spans)


REMOVERS: dict[str, Callable[..., Removal]] = {
    "auto": remove_auto,
    "obs": remove_obs,
    "magnitude": remove_magnitude,
}


def _inverse(hessian: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise ValueError("the hessian is not positive definite: more calibration prompts or more damping are needed")
    return torch.cholesky_inverse(lower)


def _columns(weight: Tensor, alive: Tensor, span: range) -> Tensor:
    """bool [in]: the columns that stay when these units do; alive bool [units]."""
    columns = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    columns[span.start : span.stop] = alive.repeat_interleave(len(span) // len(alive))
    return columns


def _losses(weight: Tensor, inverse: Tensor, span: range, units: int) -> Tensor:
    """tr(W_S [H⁻¹_SS]⁻¹ W_Sᵀ) of every unit S. Returns float32 [units]; what is gone already gives 0 or NaN."""
    part = slice(span.start, span.stop)
    weight, inverse, size = weight[:, part], inverse[part, part], len(span) // units
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    blocks = inverse.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.reshape(-1, units, size).permute(1, 2, 0)
    gram = columns @ columns.transpose(1, 2)  # a quarter of the time of solving for every output
    return torch.cholesky_solve(gram, torch.linalg.cholesky_ex(blocks)[0]).diagonal(dim1=1, dim2=2).sum(1)


def _remove(weight: Tensor, inverse: Tensor, gone: slice) -> None:
    """Eliminates those columns in place: W −= W_S [H⁻¹_SS]⁻¹ H⁻¹_S,: and H⁻¹ to its Schur complement."""
    rows = inverse[gone].clone()
    solved = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, gone]))
    weight.addmm_(weight[:, gone].clone(), solved, alpha=-1)
    inverse.addmm_(rows.T, solved, alpha=-1)
    weight[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0


def _refit(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """The least-squares weight on the columns that stay: W H[:, K] (H[K, K])⁻¹, zero elsewhere."""
    target = (weight.float() @ hessian)[:, columns]
    lower = torch.linalg.cholesky(hessian[columns][:, columns])
    result = torch.zeros_like(weight, dtype=torch.float32)
    result[:, columns] = torch.cholesky_solve(target.T, lower).T
    return result


def _check(
    weights: Sequence[Tensor], hessians: Sequence[Tensor | None], units: int, keep: int, spans: Sequence[range]
) -> Sequence[range]:
    """The spans, which are all columns unless given. Raises ValueError for what does not fit together."""
    spans = spans or [range(weight.shape[1]) for weight in weights]
    if len({len(span) for span in spans}) > 1 or not len(weights) == len(hessians) == len(spans):
        raise ValueError("the readers of a group need the same input width and one hessian each")
    if len(spans[0]) % units or not 0 < keep <= units:
        raise ValueError(f"cannot keep {keep} of {units} units in {len(spans[0])} columns")
    if not all(weight.isfinite().all() for weight in weights):
        raise ValueError("the weight holds NaN or infinity")
    if not all(hessian is None or hessian.isfinite().all() for hessian in hessians):
        raise ValueError("the hessian holds NaN or infinity")
    return spans
