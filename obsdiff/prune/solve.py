"""Solves one stage of a package: from Hessians and stored weights to pruned tensors, masks and records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.checkpoint import GroupRecord, LayerRecord
from obsdiff.errors import InputError
from obsdiff.models import ModelSpec, walk
from obsdiff.models.walk import Stage
from obsdiff.prune.hessian import Hessian
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.solvers import solve
from obsdiff.prune.structured import REMOVERS, default_multiple, keep_count

Hessians = dict[tuple[str, ...], Hessian]


@dataclass
class Solved:
    """Pruned tensors by state-dict name in the stored dtype, bool masks by linear, and what to write of them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    groups: list[GroupRecord] = field(default_factory=list)

    def add(self, name: str, weight: Tensor, mask: Tensor, error: float | None) -> None:
        self.tensors[f"{name}.weight"] = weight.cpu().contiguous()
        self.masks[name] = mask.cpu()
        sparsity = 1 - mask.float().mean().item()
        shape = (weight.shape[0], weight.shape[1])
        self.layers.append(LayerRecord(name=name, shape=shape, sparsity=sparsity, error=error))


def solve_stage(
    stage: Stage,
    hessians: Hessians,
    stored: Mapping[str, Tensor],
    denoiser: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
) -> Solved:
    """Solves the stage's linears, or removes units of its group. Raises InputError that names the layer."""
    if stage.group:
        return _solve_group(stage, hessians, stored, denoiser, spec, recipe)
    return _solve_linears(stage, hessians, stored, recipe)


def _options(recipe: Recipe) -> dict[str, Any]:
    return {"damping": recipe.damping} if recipe.solver == "obs" else {}


def _solve_linears(stage: Stage, hessians: Hessians, stored: Mapping[str, Tensor], recipe: Recipe) -> Solved:
    assert recipe.layer_pattern
    solved = Solved()
    for shared in stage.linears:
        hessian = _mean(hessians[shared], shared[0])
        for name in shared:
            weight = stored[f"{name}.weight"].to(hessian.device)
            try:
                solution = solve(weight, hessian, recipe.layer_pattern, recipe.solver, **_options(recipe))
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            solved.add(name, solution.weight, solution.mask, solution.error)
    return solved


def _solve_group(
    stage: Stage,
    hessians: Hessians,
    stored: Mapping[str, Tensor],
    denoiser: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
) -> Solved:
    group = stage.group
    assert group
    units = walk.unit_count(denoiser, spec, stage.block, group)
    keep = units_to_keep(recipe, group.kind, units)
    readers = [shared[0] for shared in stage.linears]
    means = [_mean(hessians[shared], shared[0]) for shared in stage.linears]
    weights = [stored[f"{name}.weight"].to(means[0].device) for name in readers]
    try:
        removal = REMOVERS[recipe.solver](weights, means, units, keep, **_options(recipe))
    except ValueError as error:
        raise InputError(f"{stage.name}: {error}") from None
    gone = torch.ones(units, dtype=torch.bool)
    gone[removal.kept] = False
    solved = Solved()
    solved.groups.append(GroupRecord(block=stage.block, name=group.name, kind=group.kind, kept=removal.kept, of=units))
    for name, weight, lost in zip(readers, removal.weights, removal.errors, strict=True):
        mask = torch.ones(weight.shape, dtype=torch.bool)
        mask[:, walk.unit_entries(gone.nonzero().flatten(), units, weight.shape[1])] = False
        solved.add(name, weight, mask, lost)
    for span in group.rows:
        name = f"{spec.blocks}.{stage.block}.{span.linear}"
        if f"{name}.weight" not in stored:
            continue
        weight = stored[f"{name}.weight"].clone()
        rows = walk.unit_entries(gone.nonzero().flatten(), units, len(weight), span.copies)
        weight[rows] = 0
        mask = torch.ones(weight.shape, dtype=torch.bool)
        mask[rows] = False
        solved.add(name, weight, mask, None)
        if f"{name}.bias" in stored:
            bias = stored[f"{name}.bias"].clone()
            bias[rows] = 0
            solved.tensors[f"{name}.bias"] = bias
    return solved


def units_to_keep(recipe: Recipe, kind: str, units: int) -> int:
    """Heads go one by one; neuron counts are snapped to a multiple, never past the share that was asked for."""
    share = getattr(recipe, kind)
    share = recipe.sparsity if share is None else share
    multiple = 1 if kind == "heads" else recipe.round_to or default_multiple(units)
    return keep_count(units, share or 0.0, multiple)


def _mean(hessian: Hessian, name: str) -> Tensor:
    try:
        return hessian.mean()
    except ValueError as error:
        raise InputError(f"{name} {error}") from None
