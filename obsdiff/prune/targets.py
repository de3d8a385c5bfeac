"""From a survey and what things cost to how much each layer is pruned, and a check that a target was met."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

from obsdiff.checkpoint import Allocation
from obsdiff.errors import InputError
from obsdiff.models import Group, GroupRecord, walk
from obsdiff.models.shrink import shrink
from obsdiff.models.walk import Stage
from obsdiff.prune.allocation import Level, allocate, owl
from obsdiff.prune.calibration import Calibration
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.solve import unit_multiple
from obsdiff.prune.survey import Curve, Survey
from obsdiff.prune.timing import Timer, interleaved, interpolate, time_groups

CLOSE = 0.03  # a target is met when what was reached is this near
TRIES = 4


def allocate_linears(survey: Survey, sizes: Mapping[str, int], method: str, sparsity: float) -> Allocation:
    """Sparsities that differ by linear and are `sparsity` together. sizes: weights by linear."""
    if method == "owl":
        return Allocation(method="owl", amounts=owl(survey.outliers, sizes, sparsity))
    curves = {name: _sparsity_levels(curve, sizes[name]) for name, curve in survey.curves.items()}
    chosen = allocate(curves, (1 - sparsity) * sum(sizes.values()))
    return Allocation(method="error", amounts={name: level.amount for name, level in chosen.items()})


def _sparsity_levels(curve: Curve, size: int, steps: int = 10) -> list[Level]:
    """The measured levels and some between them: errors grow about exponentially with sparsity."""
    levels = []
    for (low, fine), (high, coarse) in pairwise(curve):
        fine, coarse = max(fine, 1e-12), max(coarse, 1e-12)
        for step in range(steps):
            share = step / steps
            amount = low + (high - low) * share
            levels.append(Level(amount, (1 - amount) * size, fine * (coarse / fine) ** share))
    return [*levels, Level(curve[-1][0], (1 - curve[-1][0]) * size, curve[-1][1])]


def allocate_groups(
    run: Calibration, survey: Survey, stages: Sequence[Stage], timer: Timer = interleaved
) -> Allocation:
    """Units of every group that stay for the least error.

    What may remain is a share of the groups' MACs (`sparsity`), of the denoiser's size (`target_size`), or of its time
    on this device (`target_speedup`: measured again on the narrowed denoiser, and corrected until it is near).
    Raises InputError when no allocation reaches the target.
    """
    recipe, units = run.recipe, _units(run, stages)
    if recipe.target_speedup is not None:
        return _allocate_time(run, survey, stages, recipe.target_speedup, timer)
    if recipe.target_size is None:
        sparsity = recipe.sparsity or 0.0
        macs = {stage.name: {0: 0.0, units[stage.name]: _weights(run, stage, survey.tokens)} for stage in stages}
        budget = (1 - sparsity) * sum(max(table.values()) for table in macs.values())
        return Allocation(method="error", amounts=_pick(run, survey, stages, macs, budget, f"--sparsity {sparsity:g}"))
    weights = {stage.name: {0: 0.0, units[stage.name]: _weights(run, stage)} for stage in stages}
    total = sum(parameter.numel() for parameter in run.denoiser.parameters())
    fixed = total - sum(max(table.values()) for table in weights.values())
    asked = recipe.target_size
    amounts = _pick(run, survey, stages, weights, asked * total - fixed, f"--target-size {asked:g}")
    left = sum(interpolate(weights[name], int(count)) for name, count in amounts.items())
    return Allocation(method="error", amounts=amounts, asked=asked, reached=(fixed + left) / total)


def _allocate_time(run: Calibration, survey: Survey, stages: Sequence[Stage], asked: float, timer: Timer) -> Allocation:
    table = time_groups(run.denoiser, run.spec, stages, survey.block_inputs, timer)
    full = sum(interpolate(table[name], count) for name, count in _units(run, stages).items())
    aim = asked
    tried: list[Allocation] = []
    for _ in range(TRIES):
        dense = timer([survey.probe.call(run.denoiser)])[0]
        budget = full - (dense - dense / aim)
        try:
            amounts = _pick(run, survey, stages, table, budget, f"--target-speedup {asked:g} on this device")
        except InputError:
            if not tried:
                raise
            break  # no correction helps any more
        slow, fast = timer([survey.probe.call(run.denoiser), survey.probe.call(_narrowed(run, stages, amounts))])
        tried.append(Allocation(method="error", amounts=amounts, asked=asked, reached=slow / fast, latency=table))
        if abs(slow / fast / asked - 1) <= CLOSE:
            break
        aim *= asked / (slow / fast)
    return min(tried, key=lambda allocation: abs((allocation.reached or 0) - asked))


def _pick(
    run: Calibration,
    survey: Survey,
    stages: Sequence[Stage],
    costs: Mapping[str, Mapping[int, float]],
    budget: float,
    option: str,
) -> dict[str, float]:
    levels = {s.name: _unit_levels(survey.curves[s.name], s, costs[s.name], run.recipe) for s in stages}
    try:
        return {name: level.amount for name, level in allocate(levels, budget).items()}
    except ValueError as error:
        raise InputError(f"{option} cannot be reached by heads and neurons alone: {error}") from None


def _units(run: Calibration, stages: Sequence[Stage]) -> dict[str, int]:
    return {stage.name: walk.unit_count(run.denoiser, run.spec, stage.block, _group(stage)) for stage in stages}


def shortfall(allocation: Allocation) -> str:
    """A sentence when a target was missed by more than 3 %, else an empty string."""
    if not allocation.asked or not allocation.reached or abs(allocation.reached / allocation.asked - 1) <= CLOSE:
        return ""
    return (
        f"the target was {allocation.asked:g} and {allocation.reached:.3f} was reached: heads and widths come in "
        "steps, and timings of small layers are noisy"
    )


def _group(stage: Stage) -> Group:
    assert stage.group
    return stage.group


def _weights(run: Calibration, stage: Stage, tokens: Mapping[str, int] | None = None) -> float:
    """Weights and biases that go with the stage's units, if all went; times the tokens that they see, if given."""
    total = 0
    for spans, axis in ((_group(stage).rows, 0), (_group(stage).columns, 1)):
        for span in spans:
            name = f"{run.spec.blocks}.{stage.block}.{span.linear}"
            if walk.has(run.denoiser, name):
                module = walk.linear(run.denoiser, name)
                bias = module.out_features if axis == 0 and module.bias is not None else 0
                total += (module.weight.numel() + bias) * (tokens[name] if tokens else 1)
    return total


def _unit_levels(curve: Curve, stage: Stage, costs: Mapping[int, float], recipe: Recipe) -> list[Level]:
    """The widths that the group may end at: multiples that tensor cores like, and the full one."""
    full = int(curve[0][0])
    multiple = unit_multiple(recipe, _group(stage).kind, full)
    return [
        Level(units, interpolate(costs, int(units)), error)
        for units, error in curve
        if units == full or units % multiple == 0
    ]


def _narrowed(run: Calibration, stages: Sequence[Stage], amounts: Mapping[str, float]) -> nn.Module:
    """A copy of the denoiser at those widths, whichever units they are: it is only timed."""
    units = _units(run, stages)
    records = [
        GroupRecord(
            block=stage.block,
            name=_group(stage).name,
            kind=_group(stage).kind,
            kept=list(range(int(amounts[stage.name]))),
            of=units[stage.name],
        )
        for stage in stages
    ]
    denoiser = copy.deepcopy(run.denoiser)
    shrink(denoiser, run.spec, records)
    return denoiser
