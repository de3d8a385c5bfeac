"""What a prune will do, from the model's config and the recipe alone."""

import dataclasses
from collections.abc import Collection, Sequence

from torch import nn

from obsdiff.errors import InputError
from obsdiff.models import GroupRecord, layers, walk
from obsdiff.models.source import Source, meta_denoiser
from obsdiff.models.walk import Stage
from obsdiff.prune import targets
from obsdiff.prune.packages import by_block, cut
from obsdiff.prune.recipe import PACKAGES, Recipe
from obsdiff.prune.solve import units_to_keep
from obsdiff.prune.solvers.patterns import check_width


def plan(source: Source, recipe: Recipe) -> list[list[Stage]]:
    """The packages, in the order they are solved.

    Raises InputError for all that the model's config alone shows to be wrong, before anything is on disk or in memory.
    """
    if recipe.calibration == "stream" and not source.spec.carried:
        raise InputError(f"--calibration stream: the blocks of {source.spec.title} do not form one chain; use sampler")
    step = source.side_step
    if recipe.height % step or recipe.width % step:
        raise InputError(
            f"--height {recipe.height} --width {recipe.width}: this model draws multiples of {step} pixels"
        )
    denoiser = meta_denoiser(source)
    choice = (recipe.blocks, recipe.include, recipe.exclude)
    groups = walk.group_stages(denoiser, source.spec, *choice) if recipe.structured else []
    linears = walk.linear_stages(denoiser, source.spec, *choice) if recipe.layer_pattern else []
    linears = _without(linears, recipe.left_dense)
    if recipe.layer_pattern:
        left = _columns_left(denoiser, source, groups, recipe) if linears and groups else {}
        for name in (name for stage in linears for shared in stage.linears for name in shared):
            layer = walk.linear(denoiser, name)
            try:
                check_width(recipe.layer_pattern, left.get(name, layers.width(layer)) // layers.taps(layer))
            except ValueError as error:
                raise InputError(f"{name}: {error}; leave such layers out with --exclude") from None
    if recipe.target_size is not None:
        targets.check_size(denoiser, groups, recipe)
    kinds = [stages for stages in (groups, linears) if stages]
    if recipe.calibration == "stream":
        return sorted((package for kind in kinds for package in by_block(kind)), key=lambda package: package[0].block)
    return [package for kind in kinds for package in cut(kind, recipe.packages or PACKAGES)]


def _without(stages: Sequence[Stage], names: Collection[str]) -> list[Stage]:
    """The stages without those linears, and without stages that had no others."""
    left = []
    for stage in stages:
        kept = (tuple(name for name in shared if name not in names) for shared in stage.linears)
        left.append(dataclasses.replace(stage, linears=tuple(shared for shared in kept if shared)))
    return [stage for stage in left if stage.linears]


def _columns_left(denoiser: nn.Module, source: Source, stages: Sequence[Stage], recipe: Recipe) -> dict[str, int]:
    """Columns by linear once the groups have lost the shares of a uniform allocation."""
    records = []
    for stage in stages:
        assert stage.group
        units, kind = walk.unit_count(denoiser.get_submodule(stage.parent), stage.group), stage.group.kind
        kept = list(range(units_to_keep(recipe, kind, units)))
        records.append(GroupRecord(block=stage.block, name=stage.group.name, kind=kind, kept=kept, of=units))
    return {name: len(kept[1]) for name, kept in walk.kept_entries(denoiser, source.spec, records).items()}
