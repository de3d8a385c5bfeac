"""Solves one stage of a package: from Hessians and stored weights to pruned tensors, masks and records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.checkpoint import ChoiceRecord, GroupRecord, LayerRecord
from obsdiff.errors import InputError
from obsdiff.models import ModelSpec, walk
from obsdiff.models.walk import Stage
from obsdiff.prune.hessian import Hessian, Hessians, Moments, mean
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.solvers import Choice, Unstructured, solve
from obsdiff.prune.structured import REMOVERS, default_multiple, keep_count


@dataclass
class Solved:
    """Pruned tensors by state-dict name in the stored dtype, bool masks by linear, and what to write of them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    groups: list[GroupRecord] = field(default_factory=list)

    def add(self, name: str, weight: Tensor, mask: Tensor, error: float | None, choice: Choice | None = None) -> None:
        self.tensors[f"{name}.weight"] = weight.cpu().contiguous()
        self.masks[name] = mask.cpu()
        sparsity = 1 - mask.float().mean().item()
        shape = (weight.shape[0], weight.shape[1])
        chosen = ChoiceRecord(**vars(choice)) if choice else None
        self.layers.append(LayerRecord(name=name, shape=shape, sparsity=sparsity, error=error, choice=chosen))


@dataclass(frozen=True)
class Problem:
    """What stages are solved from: weights as they are stored, by state-dict name; the rows and columns left of
    linears that lost some in an earlier package (walk.kept_entries); and how much goes where that is not uniform:
    sparsity by linear, or units that stay by group stage."""

    denoiser: nn.Module
    spec: ModelSpec
    recipe: Recipe
    weights: Mapping[str, Tensor]
    kept: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    amounts: Mapping[str, float] = field(default_factory=dict)


def solve_stage(stage: Stage, hessians: Hessians, problem: Problem) -> Solved:
    """Solves the stage's linears, or removes units of its group. Raises InputError that names the layer."""
    return (_solve_group if stage.group else _solve_linears)(stage, hessians, problem)


def _options(recipe: Recipe) -> dict[str, Any]:
    return {} if recipe.damping is None else {"damping": recipe.damping}


def _solve_linears(stage: Stage, hessians: Hessians, problem: Problem) -> Solved:
    recipe, solved = problem.recipe, Solved()
    for shared in stage.linears:
        parts = _moments(hessians[shared], shared[0])
        for name in shared:
            weight = problem.weights[f"{name}.weight"].to(parts[0].hessian.device)
            rows, columns = problem.kept.get(name) or map(torch.arange, weight.shape)
            pattern = recipe.layer_pattern
            assert pattern
            if name in problem.amounts:
                pattern = Unstructured(problem.amounts[name])
            options = _options(recipe)
            hessian, *held_out = (part.hessian[columns][:, columns] for part in parts)
            if held_out:
                options["held_out"] = held_out[0]
            elif recipe.solver == "dsnot":
                options["mean"] = parts[0].mean[columns]
            wanted = weight[rows][:, columns]
            try:
                if recipe.target == "asymmetric":
                    wanted = asymmetric_target(wanted, parts, columns)
                solution = solve(wanted, hessian, pattern, recipe.solver, **options)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            pruned, mask = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
            pruned[rows[:, None], columns], mask[rows[:, None], columns] = solution.weight, solution.mask
            solved.add(name, pruned, mask, solution.error, solution.choice)
    return solved


def asymmetric_target(weight: Tensor, parts: Sequence[Moments], columns: Tensor, damping: float = 1.0) -> Tensor:
    """W̃ = W (X̃ Xᵀ + D) (X Xᵀ + D)⁻¹, which gives from the inputs X what W gives from the dense model's X̃.

    Pruning W̃ for the Hessian of X then minimises ‖W X̃ − Ŵ X‖² (GPTAQ, arXiv 2504.02692). D is `damping` times the
    diagonal of X Xᵀ; as much as 1 was best on the embedded model. weight [out, in]; returns its dtype.
    """
    hessian = sum(part.hessian[columns][:, columns] for part in parts)
    cross = sum(part.cross[columns][:, columns] for part in parts if part.cross is not None)
    assert isinstance(hessian, Tensor)
    diagonal = damping * hessian.diagonal()
    ridge = torch.diag(torch.where(diagonal > 0, diagonal, 1))
    lower = torch.linalg.cholesky(hessian + ridge)
    return torch.cholesky_solve((weight.float() @ (cross + ridge)).T, lower).T.to(weight.dtype)


def _solve_group(stage: Stage, hessians: Hessians, problem: Problem) -> Solved:
    group, denoiser, spec, recipe, stored = stage.group, problem.denoiser, problem.spec, problem.recipe, problem.weights
    assert group
    units = walk.unit_count(denoiser, spec, stage.block, group)
    keep = int(problem.amounts.get(stage.name, units_to_keep(recipe, group.kind, units)))
    readers = [shared[0] for shared in stage.linears]
    # Each part, the even and the odd prompts with `auto`, as one list over the readers.
    parts = zip(*(_moments(hessians[shared], shared[0]) for shared in stage.linears), strict=True)
    means = [[moments.hessian for moments in part] for part in parts]
    weights = [stored[f"{name}.weight"].to(means[0][0].device) for name in readers]
    try:
        removal = REMOVERS[recipe.solver](weights, *means, units=units, keep=keep, **_options(recipe))
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
    return keep_count(units, share or 0.0, unit_multiple(recipe, kind, units))


def unit_multiple(recipe: Recipe, kind: str, units: int) -> int:
    """What a number of units that stay must be a multiple of."""
    return 1 if kind == "heads" else recipe.round_to or default_multiple(units)


def _moments(hessians: Sequence[Hessian], name: str) -> list[Moments]:
    try:
        return [mean([part]) for part in hessians]
    except ValueError as error:
        raise InputError(f"{name} {error}") from None
