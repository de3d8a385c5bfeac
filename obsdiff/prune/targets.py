"""From a survey and what things cost to how much each layer is pruned, and a check that a target was met."""

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from obsdiff.checkpoint import Allocation
from obsdiff.errors import InputError
from obsdiff.models import Group, GroupRecord, walk
from obsdiff.models.shrink import shrink
from obsdiff.models.walk import Stage
from obsdiff.prune.allocation import Level, allocate, owl
from obsdiff.prune.calibration import Calibration
from obsdiff.prune.recipe import Recipe, flag
from obsdiff.prune.solve import unit_multiple
from obsdiff.prune.survey import Curve, Survey, fewest_units
from obsdiff.prune.timing import Timer, interleaved, interpolate, time_groups

CLOSE = 0.03  # a target is met when what was reached is this near
TRIES = 4
BEYOND = "cannot be reached by heads and neurons alone"


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
    recipe = run.recipe
    if recipe.target_speedup is not None:
        return _allocate_time(run, survey, stages, recipe.target_speedup, timer)
    if recipe.target_size is not None:
        return _allocate_size(run, survey, stages, recipe.target_size)
    asked = recipe.sparsity or 0.0
    macs = _costs(run.denoiser, stages, survey.tokens)
    whole = sum(map(_dearest, macs.values()))
    if (1 - asked) * whole < (least := _least(run.denoiser, stages, macs, recipe)):
        most = _down((whole - least) / whole)
        raise InputError(f"--sparsity {asked:g} {BEYOND}: the most is --sparsity {most:g}, a share of their MACs")
    amounts = _pick(run, survey, stages, macs, (1 - asked) * whole)
    reached = 1 - _total(macs, amounts) / whole
    return Allocation(method="error", amounts=amounts, asked=asked, reached=reached)


def check_size(denoiser: nn.Module, stages: Sequence[Stage], recipe: Recipe) -> None:
    """Raises InputError when even the narrowest groups leave more than `target_size`; the denoiser may be on meta."""
    costs, total = _costs(denoiser, stages), _parameters(denoiser)
    fixed = total - sum(map(_dearest, costs.values()))
    least = (fixed + _least(denoiser, stages, costs, recipe)) / total
    if recipe.target_size is not None and recipe.target_size < least:
        where = "" if recipe.blocks == ":" else f" with --blocks {recipe.blocks}"
        raise InputError(
            f"--target-size {recipe.target_size:g} {BEYOND}: the least is --target-size {-_down(-least):g}{where}"
        )


def _allocate_size(run: Calibration, survey: Survey, stages: Sequence[Stage], asked: float) -> Allocation:
    check_size(run.denoiser, stages, run.recipe)
    costs, total = _costs(run.denoiser, stages), _parameters(run.denoiser)
    fixed = total - sum(map(_dearest, costs.values()))
    amounts = _pick(run, survey, stages, costs, asked * total - fixed)
    return Allocation(method="error", amounts=amounts, asked=asked, reached=(fixed + _total(costs, amounts)) / total)


def _allocate_time(run: Calibration, survey: Survey, stages: Sequence[Stage], asked: float, timer: Timer) -> Allocation:
    table = time_groups(run.denoiser, run.spec, stages, survey.block_inputs, timer)
    full = sum(map(_dearest, table.values()))
    least = _least(run.denoiser, stages, table, run.recipe)
    aim = asked
    tried: list[Allocation] = []
    for _ in range(TRIES):
        dense = timer([survey.probe.call(run.denoiser)])[0]
        budget = full - (dense - dense / aim)
        if budget < least and tried:
            break  # no correction helps any more
        if budget < least:
            most = _down(dense / (dense - (full - least)))
            raise InputError(f"--target-speedup {asked:g} {BEYOND}: the most on this device is about {most:.2f}")
        amounts = _pick(run, survey, stages, table, budget)
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
) -> dict[str, float]:
    levels = {s.name: _unit_levels(survey.curves[s.name], s, costs[s.name], run.recipe) for s in stages}
    return {name: level.amount for name, level in allocate(levels, budget).items()}


def _units(denoiser: nn.Module, stages: Sequence[Stage]) -> dict[str, int]:
    return {stage.name: walk.unit_count(denoiser.get_submodule(stage.parent), _group(stage)) for stage in stages}


def _parameters(denoiser: nn.Module) -> int:
    return sum(parameter.numel() for parameter in denoiser.parameters())


def _costs(
    denoiser: nn.Module, stages: Sequence[Stage], tokens: Mapping[str, int] | None = None
) -> dict[str, dict[int, float]]:
    """What each group costs with none and with all of its units: weights, or MACs where the tokens are given."""
    units = _units(denoiser, stages)
    return {stage.name: {0: 0.0, units[stage.name]: _weights(denoiser, stage, tokens)} for stage in stages}


def _dearest(table: Mapping[int, float]) -> float:
    return interpolate(table, max(table))


def _total(costs: Mapping[str, Mapping[int, float]], amounts: Mapping[str, float]) -> float:
    return sum(interpolate(costs[name], int(count)) for name, count in amounts.items())


def _least(
    denoiser: nn.Module, stages: Sequence[Stage], costs: Mapping[str, Mapping[int, float]], recipe: Recipe
) -> float:
    """What all groups cost together at their narrowest."""
    units = _units(denoiser, stages)
    return sum(interpolate(costs[s.name], _widths(units[s.name], s, recipe)[-1]) for s in stages)


def _down(value: float) -> float:
    """To three digits after the point and never above, so that what a message names can be asked for."""
    return math.floor(value * 1000) / 1000


def shortfall(allocation: Allocation, recipe: Recipe) -> str:
    """A sentence when what was asked for was missed by more than 3 %, else an empty string."""
    if not allocation.asked or not allocation.reached or abs(allocation.reached / allocation.asked - 1) <= CLOSE:
        return ""
    option = next((name for name in ("target_speedup", "target_size") if getattr(recipe, name) is not None), "sparsity")
    noise = ", and timings of small layers are noisy" if option == "target_speedup" else ""
    return (
        f"{flag(option)} {allocation.asked:g} was asked for and {allocation.reached:.3f} was reached: heads and widths "
        f"come in steps{noise}"
    )


def _group(stage: Stage) -> Group:
    assert stage.group
    return stage.group


def _weights(denoiser: nn.Module, stage: Stage, tokens: Mapping[str, int] | None = None) -> float:
    """Weights and biases that go with the stage's units, if all went; times the tokens that they see, if given."""
    total, block, group = 0, denoiser.get_submodule(stage.parent), _group(stage)
    every = torch.arange(walk.unit_count(block, group))
    for span, axis in walk.spans_of(block, group):
        layer = walk.linear(block, span.linear)
        across = layer.weight.numel() // layer.weight.shape[axis] + (axis == 0 and layer.bias is not None)
        seen = tokens[f"{stage.parent}.{span.linear}"] if tokens else 1
        total += len(walk.span_entries(block, group, span, axis, every)) * across * seen
    return total


def _unit_levels(curve: Curve, stage: Stage, costs: Mapping[int, float], recipe: Recipe) -> list[Level]:
    allowed = _widths(int(curve[0][0]), stage, recipe)
    return [Level(units, interpolate(costs, int(units)), error) for units, error in curve if units in allowed]


def _widths(full: int, stage: Stage, recipe: Recipe) -> list[int]:
    """The widths that the group may end at: the full one, then multiples that tensor cores like, down to the last."""
    multiple = unit_multiple(recipe, _group(stage).kind, full)
    return [full, *(units for units in range(full - 1, fewest_units(full) - 1, -1) if units % multiple == 0)]


def _narrowed(run: Calibration, stages: Sequence[Stage], amounts: Mapping[str, float]) -> nn.Module:
    """A copy of the denoiser at those widths, whichever units they are: it is only timed."""
    units = _units(run.denoiser, stages)
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
