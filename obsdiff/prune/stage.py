"""The prune stage: load, then for each package collect, solve and save, then finish."""

import contextlib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from obsdiff import checkpoint
from obsdiff.checkpoint import CheckpointInfo
from obsdiff.device import pick_device
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.files import folder_hash
from obsdiff.models import walk
from obsdiff.models.source import Source, find_source, load_pipeline, quiet_libraries
from obsdiff.models.walk import Stage
from obsdiff.progress import Progress
from obsdiff.prune import calibration, memory, ranks, stream, targets, work
from obsdiff.prune.hessian import Hessians
from obsdiff.prune.packages import by_block, cut
from obsdiff.prune.recipe import PACKAGES, Recipe, make_recipe
from obsdiff.prune.solve import Problem, Solved, solve_stage
from obsdiff.prune.solvers.patterns import check_width
from obsdiff.prune.survey import survey

MODES = {
    "sampler": (calibration.sampler_hessians, calibration.sampler_cost),
    "stream": (stream.stream_hessians, stream.stream_cost),
}


def prune(
    model: str | Path,
    out: str | Path,
    *,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CheckpointInfo:
    """Prunes a diffusers pipeline's denoiser in one shot and writes a pruned checkpoint (a diffusers folder) to `out`.

    Options are the fields of `obsdiff.prune.recipe.Recipe`, plus `num_prompts`; `prompts` may be a file or a list.
    Interrupted, the same call goes on after the last finished package. With `restart` what is there is discarded,
    if it is a pruned checkpoint. Returns what obsdiff.json holds.
    Raises InputError when the model, an option or `out` is wrong, and then nothing is changed.
    """
    progress = progress or Progress()
    out = Path(out)
    source = find_source(model)
    if (source.path / checkpoint.INFO).exists():
        raise InputError(f"{model} is pruned already: prune its base model")
    recipe = make_recipe(source, options)
    identity = {
        "base": {"name": source.name, "sha256": folder_hash(source.path)},
        "recipe": recipe.model_dump(mode="json"),
    }
    pick_device(recipe.device)
    with ranks.joined(recipe.device), quiet_libraries():
        ranks.agree(identity, "model or recipe")
        if ranks.rank():
            progress = Progress()
        folder = out.with_name(f"{out.name}.partial")
        done = ranks.from_first(None if ranks.rank() else _claim(out, folder, identity, restart))
        if isinstance(done, CheckpointInfo):
            progress.message(f"{out} is finished already")
            return done
        try:
            packages = _prune_packages(source, recipe, folder, progress)
        except InputError:
            if not ranks.rank():
                work.abandon(folder)
            raise
        finished = work.Finished(folder, range(packages))
        info = None if ranks.rank() else work.finish(source, identity, finished, folder, out)
        result = ranks.from_first(info)
        assert result
        return result


def _claim(out: Path, folder: Path, identity: Mapping[str, Any], restart: bool) -> CheckpointInfo | ObsdiffError | None:
    """work.claim, with its refusal as a value that can be sent to other ranks."""
    try:
        return work.claim(out, folder, identity, restart)
    except ObsdiffError as error:
        return error


def _plan(denoiser: nn.Module, source: Source, recipe: Recipe) -> list[list[Stage]]:
    """The packages, in the order they are solved, after a look at every weight and every width that they touch."""
    for name, parameter in denoiser.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{source.name}: {name} holds NaN or infinity")
    kinds = [
        stages_of(denoiser, source.spec, recipe.blocks, recipe.include, recipe.exclude)
        for stages_of, wanted in ((walk.group_stages, recipe.structured), (walk.linear_stages, recipe.layer_pattern))
        if wanted
    ]
    for name in (name for kind in kinds for stage in kind for shared in stage.linears for name in shared):
        width = walk.linear(denoiser, name).in_features
        try:
            if recipe.layer_pattern:
                check_width(recipe.layer_pattern, width)
        except ValueError as error:
            raise InputError(f"{name}: {error}; leave such layers out with --exclude") from None
    if recipe.calibration == "stream":
        return sorted((package for kind in kinds for package in by_block(kind)), key=lambda package: package[0].block)
    return [package for kind in kinds for package in cut(kind, recipe.packages or PACKAGES)]


def _prune_packages(source: Source, recipe: Recipe, folder: Path, progress: Progress) -> int:
    """Solves package after package, each saved when it is done and taken from disk when it was done before.

    One stage's tensors are held beside the model and the Hessians of a package. Returns how many packages there are.
    """
    stored = checkpoint.denoiser_weights(source.denoiser_path)
    device = ranks.local_device(recipe.device)
    pipe = load_pipeline(source, getattr(torch, recipe.dtype))
    denoiser = pipe.components[source.spec.component]
    packages = _plan(denoiser, source, recipe)
    done = ranks.from_first({k for k in range(len(packages)) if work.package_folder(folder, k).exists()})
    memory.check(memory.predict(denoiser, source.spec, packages, recipe, _tokens(source, recipe)), device, recipe)
    calibrate, cost = MODES[recipe.calibration]
    solves = sum(len(package) for k, package in enumerate(packages) if k not in done)
    with progress.task("encoding prompts", solves + cost(denoiser, source.spec, packages, done, recipe)):
        batches = calibration.encode_prompts(pipe, source.spec, recipe, device)
        sampler = calibration.sampler_of(pipe, "cpu" if recipe.offload else device)
        run = calibration.Calibration(sampler, denoiser, source.spec, batches, recipe, device, folder, progress.advance)
        amounts = _allocate(run, packages, stored, progress)
        for k, hessians in calibrate(run, packages, done):
            if hessians is None:
                for path in work.Finished(folder, [k]).files:
                    _apply(denoiser, load_file(path))
            else:
                ranks.add_up(hessian for parts in hessians.values() for hessian in parts)
                _solve_package(run, stored, amounts, packages, k, hessians)
    return len(packages)


def _tokens(source: Source, recipe: Recipe) -> int:
    """Tokens of one calibration call: image and prompt, twice with guidance."""
    step = source.vae_scale * int(source.config[source.spec.patch])
    image = (recipe.height // step) * (recipe.width // step)
    return recipe.batch_size * (2 if recipe.guidance_scale > 1 else 1) * (image + source.prompt_tokens)


def _allocate(
    run: calibration.Calibration, packages: Sequence[Sequence[Stage]], stored: Mapping[str, Tensor], progress: Progress
) -> Mapping[str, float]:
    """How much goes where, empty when it is the same everywhere; measured once, before anything is pruned, and kept."""
    recipe = run.recipe
    if recipe.allocation == "uniform":
        return {}
    allocation = ranks.from_first(work.read_allocation(run.folder))
    if not allocation:
        stages = [stage for package in packages for stage in package]
        found = survey(run, stages, stored)
        if recipe.structured:
            allocation = ranks.from_first(targets.allocate_groups(run, found, stages))
        else:
            sizes = {name: stored[f"{name}.weight"].numel() for name in found.names}
            assert recipe.sparsity
            allocation = ranks.from_first(targets.allocate_linears(found, sizes, recipe.allocation, recipe.sparsity))
        if not ranks.rank():
            work.write_allocation(run.folder, allocation)
    if missed := targets.shortfall(allocation):
        progress.message(missed)
    return allocation.amounts


def _solve_package(
    run: calibration.Calibration,
    stored: Mapping[str, Tensor],
    amounts: Mapping[str, float],
    packages: Sequence[Sequence[Stage]],
    k: int,
    hessians: Hessians,
) -> None:
    """Solves the package's stages, each on one rank, and puts them into every rank's denoiser and on disk."""
    earlier = work.Finished(run.folder, range(k))
    weights: Mapping[str, Tensor] = ChainMap(earlier.tensors, stored)  # type: ignore[arg-type]
    kept = walk.kept_entries(run.denoiser, run.spec, earlier.groups)
    problem = Problem(run.denoiser, run.spec, run.recipe, weights, kept, amounts)

    def solve(stage: Stage) -> Solved | ObsdiffError:
        try:
            return solve_stage(stage, hessians, problem)
        except ObsdiffError as error:
            return error

    saving = contextlib.nullcontext(lambda index, solved: None) if ranks.rank() else work.package(run.folder, k)
    with saving as save:
        for start in range(0, len(packages[k]), ranks.count()):
            together = packages[k][start : start + ranks.count()]
            mine = solve(together[ranks.rank()]) if ranks.rank() < len(together) else None
            for index, (stage, solved) in enumerate(zip(together, ranks.share_all(mine), strict=False), start):
                if isinstance(solved, ObsdiffError):
                    raise solved
                assert solved
                _apply(run.denoiser, solved.tensors)
                save(index, solved)
                worst = max(layer.error for layer in solved.layers if layer.error is not None)
                run.advance(1, f"package {k + 1}/{len(packages)}: solving {stage.name}, error {worst:.3f}")


def _apply(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not name.startswith(work.MASK):
                parameters[name].copy_(tensor)
