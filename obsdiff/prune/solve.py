"""Solves one stage of a package: from Hessians and stored weights to pruned tensors, masks and records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.checkpoint import ChoiceRecord, GroupRecord, LayerRecord
from obsdiff.errors import InputError
from obsdiff.models import ModelSpec, walk
from obsdiff.models.layers import as_matrix, from_matrix
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
        """weight as the layer has it, bool mask of its matrix [out, in]."""
        self.tensors[f"{name}.weight"] = weight.cpu().contiguous()
        self.masks[name] = mask.cpu()
        sparsity = 1 - mask.float().mean().item()
        shape = (mask.shape[0], mask.shape[1])
        chosen = ChoiceRecord(**vars(choice)) if choice else None
        self.layers.append(LayerRecord(name=name, shape=shape, sparsity=sparsity, error=error, choice=chosen))


@dataclass(frozen=True)
class Problem:
    """What stages are solved from: weights as they are now, by state-dict name; the rows and columns left of linears
    that lost some before (walk.kept_entries); and how much goes where that is not uniform: sparsity by linear, or
    units that stay by group stage."""

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
            own = problem.weights[f"{name}.weight"]
            weight = as_matrix(own).to(parts[0].hessian.device)
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
            solved.add(name, from_matrix(pruned, own.shape), mask, solution.error, solution.choice)
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
    group, recipe = stage.group, problem.recipe
    assert group
    block = problem.denoiser.get_submodule(stage.parent)
    units = walk.unit_count(block, group)
    keep = int(problem.amounts.get(stage.name, units_to_keep(recipe, group.kind, units)))
    readers = [shared[0] for shared in stage.linears]
    # Each part, the even and the odd prompts with `auto`, as one list over the readers.
    parts = zip(*(_moments(hessians[shared], shared[0]) for shared in stage.linears), strict=True)
    means = [[moments.hessian for moments in part] for part in parts]
    weights = [as_matrix(problem.weights[f"{name}.weight"]).to(means[0][0].device) for name in readers]
    # Columns that went with another group of the same linear (heads and neurons of a fused projection) are not there.
    pairs = zip(readers, weights, strict=True)
    left = [problem.kept[name][1] if name in problem.kept else torch.arange(w.shape[1]) for name, w in pairs]
    spans = [_within(span, columns) for span, columns in zip(walk.reader_spans(block, group), left, strict=True)]
    try:
        removal = REMOVERS[recipe.solver](
            [weight[:, columns] for weight, columns in zip(weights, left, strict=True)],
            *([h[columns][:, columns] for h, columns in zip(part, left, strict=True)] for part in means),
            units=units,
            keep=keep,
            spans=spans,
            **_options(recipe),
        )
    except ValueError as error:
        raise InputError(f"{stage.name}: {error}") from None
    record = GroupRecord(block=stage.block, name=group.name, kind=group.kind, kept=removal.kept, of=units)
    solved = Solved(groups=[record])
    for name, columns, new, lost in zip(readers, left, removal.weights, removal.errors, strict=True):
        own = problem.weights[f"{name}.weight"]
        pruned = torch.zeros_like(as_matrix(own))
        pruned[:, columns] = new.cpu()
        solved.add(name, from_matrix(pruned, own.shape), _mask(name, pruned.shape, problem, record), lost)
    for span, axis in walk.spans_of(block, group):
        name = f"{stage.parent}.{span.linear}"
        if axis == 0 and f"{name}.weight" in problem.weights:
            rows = walk.span_entries(block, group, span, axis, walk.gone_units(record))
            for part in ("weight", "bias"):
                if f"{name}.{part}" in problem.weights:
                    tensor = solved.tensors[f"{name}.{part}"] = problem.weights[f"{name}.{part}"].clone()
                    tensor[rows] = 0
            weight = solved.tensors[f"{name}.weight"]
            solved.add(name, weight, _mask(name, as_matrix(weight).shape, problem, record), None)
    return solved


def _within(span: range, columns: Tensor) -> range:
    """The span counted in the columns that are left."""
    start = int((columns < span.start).sum())
    return range(start, start + int(((columns >= span.start) & (columns < span.stop)).sum()))


def _mask(name: str, shape: torch.Size, problem: Problem, record: GroupRecord) -> Tensor:
    """True where the matrix has a weight after those units and all that went before them."""
    mask = torch.zeros(shape, dtype=torch.bool)
    rows, columns = problem.kept.get(name) or map(torch.arange, shape)
    mask[rows[:, None], columns] = True
    rows, columns = walk.kept_entries(problem.denoiser, problem.spec, [record])[name]
    new = torch.zeros(shape, dtype=torch.bool)
    new[rows[:, None], columns] = True
    return mask & new


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
