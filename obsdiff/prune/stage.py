"""The prune stage: load, then for each package collect, solve and save, then finish."""

import contextlib
import dataclasses
import os
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
from obsdiff.models import known_families, walk
from obsdiff.models.source import Source, load_pipeline, meta_denoiser, quiet_libraries
from obsdiff.models.walk import Stage
from obsdiff.progress import Progress
from obsdiff.prune import calibration, faster, memory, ranks, stream, targets, work
from obsdiff.prune.base import assemble, find_base
from obsdiff.prune.hessian import Hessians
from obsdiff.prune.packages import apart
from obsdiff.prune.plan import plan
from obsdiff.prune.recipe import Recipe, make_recipe
from obsdiff.prune.solve import Problem, Solved, solve_stage
from obsdiff.prune.survey import survey

MODES = {
    "sampler": (calibration.sampler_hessians, calibration.sampler_cost),
    "stream": (stream.stream_hessians, stream.stream_cost),
}


def prune(
    model: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CheckpointInfo:
    """Prunes a diffusers pipeline's denoiser in one shot and writes a pruned checkpoint (a diffusers folder) to `out`.

    Options are the fields of `obsdiff.prune.recipe.Recipe`, plus `num_prompts`; `prompts` may be a file or a list.
    MODEL may be a single-file checkpoint with `config`, a pipeline of its architecture; `lora` a list of PATH[:SCALE].
    Interrupted, the same call goes on after the last finished package. With `restart` what is there is discarded,
    if it is a pruned checkpoint. Returns what obsdiff.json holds.
    Raises InputError when the model, an option or `out` is wrong, and then nothing is changed.
    """
    progress = progress or Progress()
    out = Path(os.path.realpath(out))  # `..` and links as the system reads them: a linked OUT is replaced where it is
    source, base = find_base(model, config)
    if (source.path / checkpoint.INFO).exists():
        raise InputError(f"{model} is pruned already: prune its base model")
    recipe = make_recipe(source, options)
    pick_device(recipe.device)
    refused = ""
    if recipe.structured:
        if not any(kind.groups for kind in source.spec.blocks):
            raise InputError(
                f"--pattern {recipe.pattern}: obsdiff does not know which weights of {source.spec.denoiser} make up a "
                f"head or a neuron, as it does for {known_families()}"
            )
        refused = source.spec.heads_refused or walk.tied_heads(meta_denoiser(source), source.spec)
    if refused and recipe.heads:
        raise InputError(f"--heads {recipe.heads:g}: {source.spec.title} can lose none: {refused}")
    folder = out.parent / f"{out.name}.partial"
    with ranks.joined(recipe.device), quiet_libraries():
        ranks.agree((base, recipe.model_dump(mode="json")), "model or recipe")
        if ranks.rank():
            progress = Progress()
        recipe = _keep_dense(source, recipe, out, folder, restart, progress)
        identity = {
            "base": base,
            "recipe": recipe.model_dump(mode="json"),
        }
        if (asked := options.get("num_prompts") or 0) > (there := len(recipe.prompts)):
            progress.message(f"--num-prompts {asked}: there are {there}, and all of them are used")
        if refused:
            progress.message(f"neurons go and no heads: {refused}")
        if variant := source.pipeline_variant:
            progress.message(
                f"{source.name}: the weights used are those of the variant {variant}, there are no plain ones"
            )
        packages = plan(source, recipe)
        done = ranks.from_first(None if ranks.rank() else _claim(out, folder, identity, restart))
        if isinstance(done, CheckpointInfo):
            progress.message(f"{out} is finished already")
            return done
        try:
            if config is not None or recipe.lora:
                source = _assemble(source, config is not None, recipe, folder)
            _prune_packages(source, recipe, packages, folder, progress)
        except InputError:
            if not ranks.rank():
                work.abandon(folder)
            raise
        finished = work.Finished(folder, range(len(packages)))
        info = None if ranks.rank() else work.finish(source, identity, finished, folder, out)
        result = ranks.from_first(info)
        assert result
        return result


def _assemble(source: Source, config: bool, recipe: Recipe, folder: Path) -> Source:
    """base.assemble on the first rank, for all; its refusal is everybody's."""
    made: Source | InputError = dataclasses.replace(source, path=folder / "base")
    if not ranks.rank():
        try:
            made = assemble(source, config, recipe.lora, folder / "base")
        except InputError as error:
            made = error
    made = ranks.from_first(made)
    assert isinstance(made, Source)
    return made


def _keep_dense(source: Source, recipe: Recipe, out: Path, folder: Path, restart: bool, progress: Progress) -> Recipe:
    """faster.keep_dense on the first rank, for all: no two would measure the same."""
    made: Recipe | ObsdiffError = recipe
    if not ranks.rank():
        try:
            known = None if restart else faster.earlier_table(out, folder)
            made = faster.keep_dense(source, recipe, known, progress)
        except ObsdiffError as error:
            made = error
    made = ranks.from_first(made)
    assert isinstance(made, Recipe)
    return made


def _claim(out: Path, folder: Path, identity: Mapping[str, Any], restart: bool) -> CheckpointInfo | ObsdiffError | None:
    """work.claim, with its refusal as a value that can be sent to other ranks."""
    try:
        return work.claim(out, folder, identity, restart)
    except ObsdiffError as error:
        return error


def _prune_packages(
    source: Source, recipe: Recipe, packages: Sequence[Sequence[Stage]], folder: Path, progress: Progress
) -> None:
    """Solves package after package, each saved when it is done and taken from disk when it was done before.

    One stage's tensors are held beside the model and the Hessians of a package.
    """
    stored = checkpoint.denoiser_weights(source.denoiser_path)
    device = ranks.local_device(recipe.device)
    pipe = load_pipeline(source, getattr(torch, recipe.dtype))
    denoiser = pipe.components[source.spec.component]
    for name, parameter in denoiser.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{source.name}: {name} holds NaN or infinity")
    done = ranks.from_first({k for k in range(len(packages)) if work.package_folder(folder, k).exists()})
    tokens, shapes = tokens_of_call(source, recipe), memory.input_shapes(source, packages, recipe)
    need = memory.predict(denoiser, source.spec, packages, recipe, tokens, shapes)
    memory.check(need, device, recipe, bool(source.spec.carried))
    calibrate, cost = MODES[recipe.calibration]
    solves = sum(len(package) for k, package in enumerate(packages) if k not in done)
    with progress.task("encoding prompts", solves + cost(denoiser, source.spec, packages, done, recipe)):
        batches = calibration.encode_prompts(pipe, source.spec, recipe, device)
        sampler = calibration.sampler_of(pipe, "cpu" if recipe.offload else device, bool(source.spec.arguments))
        run = calibration.Calibration(sampler, denoiser, source.spec, batches, recipe, device, folder, progress.advance)
        amounts = _allocate(run, packages, stored, progress)
        for k, hessians in calibrate(run, packages, done):
            if hessians is None:
                for path in work.Finished(folder, [k]).files:
                    _apply(denoiser, load_file(path))
            else:
                ranks.add_up(hessian for parts in hessians.values() for hessian in parts)
                _solve_package(run, stored, amounts, packages, k, hessians)


def tokens_of_call(source: Source, recipe: Recipe) -> int:
    """Tokens of one calibration call: image and prompt, for each pass that guidance adds."""
    image = (recipe.height // source.side_step) * (recipe.width // source.side_step)
    return recipe.batch_size * source.spec.passes_at(recipe.guidance_scale) * (image + source.prompt_tokens)


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
    if missed := targets.shortfall(allocation, recipe):
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
    fresh: dict[str, Tensor] = {}  # of this package, where a later stage of it goes on with them
    weights: Mapping[str, Tensor] = ChainMap(fresh, earlier.tensors, stored)  # type: ignore[arg-type]
    groups = list(earlier.groups)

    def solve(stage: Stage) -> Solved | ObsdiffError:
        kept = walk.kept_entries(run.denoiser, run.spec, groups)
        try:
            return solve_stage(stage, hessians, Problem(run.denoiser, run.spec, run.recipe, weights, kept, amounts))
        except ObsdiffError as error:
            return error

    saving = contextlib.nullcontext(lambda index, solved: None) if ranks.rank() else work.package(run.folder, k)
    with saving as save:
        index = 0
        for together in apart(packages[k], ranks.count()):
            mine = solve(together[ranks.rank()]) if ranks.rank() < len(together) else None
            for stage, solved in zip(together, ranks.share_all(mine), strict=False):
                if isinstance(solved, ObsdiffError):
                    raise solved
                assert solved
                _apply(run.denoiser, solved.tensors)
                save(index, solved)
                index += 1
                worst = max(layer.error for layer in solved.layers if layer.error is not None)
                run.advance(1, f"package {k + 1}/{len(packages)}: solving {stage.name}, error {worst:.3f}")
                again = {name for later in packages[k][index:] for name in later.touched}
                fresh |= {name: t for name, t in solved.tensors.items() if name.rpartition(".")[0] in again}
                groups += solved.groups


def _apply(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not name.startswith(work.MASK):
                parameters[name].copy_(tensor)
