"""The prune stage: load, then for each package collect, solve and save, then finish."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from obsdiff import checkpoint
from obsdiff.checkpoint import CheckpointInfo
from obsdiff.errors import InputError
from obsdiff.files import folder_hash, read_json, write_json, write_tensors
from obsdiff.models import walk
from obsdiff.models.source import Source, find_source, load_pipeline, quiet_libraries
from obsdiff.models.walk import Stage
from obsdiff.progress import Progress
from obsdiff.prune import calibration
from obsdiff.prune.packages import cut
from obsdiff.prune.recipe import Recipe, make_recipe
from obsdiff.prune.solve import Solved, solve_stage
from obsdiff.prune.solvers.patterns import check_width

STATE = "state.json"
MASK = "mask/"


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
    work = out.with_name(f"{out.name}.partial")
    if (done := _claim(out, work, identity, restart)) is not None:
        progress.message(f"{out} is finished already")
        return done
    _check_device(recipe.device)
    with quiet_libraries():
        saved = _prune_packages(source, recipe, work, progress)
    info = _finish(source, identity, saved, work)
    if out.exists():
        shutil.rmtree(out)
    (work / "result").rename(out)
    shutil.rmtree(work)
    return info


def _claim(out: Path, work: Path, identity: Mapping[str, Any], restart: bool) -> CheckpointInfo | None:
    """Makes `work` ours, or says why not. Returns the checkpoint when this very prune is finished already."""
    if out.exists():
        info = checkpoint.read_info(out) if out.is_dir() else None
        same = info is not None and {"base": info.base, "recipe": info.recipe} == identity
        if same and not restart:
            shutil.rmtree(work, ignore_errors=True)  # killed between the last two steps
            return info
        if info is None:
            raise InputError(f"{out} exists and is not a pruned checkpoint: choose another name")
        if not restart:
            raise InputError(f"{out} is a checkpoint of another recipe: choose another name, or pass --restart")
    if work.exists():
        found = read_json(work / STATE) if (work / STATE).exists() else None
        if restart and found is not None:
            shutil.rmtree(work)
        elif found != identity:
            raise InputError(f"{work} is left from a prune with another recipe: remove it, or pass --restart")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / STATE, identity)
    return None


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: no such device; write cpu, cuda or cuda:0") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no CUDA GPU here")


def _plan(denoiser: nn.Module, source: Source, recipe: Recipe) -> list[Stage]:
    """The stages to solve, after a look at every weight and every width that they touch."""
    for name, parameter in denoiser.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{source.name}: {name} holds NaN or infinity")
    stages_of = walk.linear_stages if recipe.layer_pattern else walk.group_stages
    stages = stages_of(denoiser, source.spec, recipe.blocks, recipe.include, recipe.exclude)
    for name in (name for stage in stages for shared in stage.linears for name in shared):
        width = walk.linear(denoiser, name).in_features
        try:
            if recipe.layer_pattern:
                check_width(recipe.layer_pattern, width)
        except ValueError as error:
            raise InputError(f"{name}: {error}; leave such layers out with --exclude") from None
    return stages


def _prune_packages(source: Source, recipe: Recipe, work: Path, progress: Progress) -> list[Path]:
    """Solves package after package, each saved when it is done and taken from disk when it was done before.

    A package is a folder with one file a stage: only one stage's tensors are held beside the model and the Hessians.
    Returns the files in forward order.
    """
    spec, stored = source.spec, checkpoint.denoiser_weights(source.denoiser_path)
    pipe = load_pipeline(source, getattr(torch, recipe.dtype))
    denoiser = pipe.components[spec.component]
    packages = cut(_plan(denoiser, source, recipe), recipe.packages)
    folders = [work / f"package-{k:03}" for k in range(len(packages))]
    todo = [k for k, folder in enumerate(folders) if not folder.exists()]
    for folder in folders[: todo[0] if todo else None]:
        for path in sorted(folder.iterdir()):
            _apply(denoiser, load_file(path))
    batches = -(-len(recipe.prompts) // recipe.batch_size)
    total = len(todo) * batches * recipe.steps + sum(len(packages[k]) for k in todo)
    with progress.task("encoding prompts", total):
        embeds = calibration.encode_prompts(
            pipe, spec, recipe.prompts, recipe.call_options, recipe.batch_size, recipe.device
        )
        sampler = calibration.sampler_of(pipe, recipe.device)
        for k in todo:
            title = f"package {k + 1}/{len(packages)}"

            def on_step(step: int, title: str = title) -> None:
                progress.advance(min(step, 1), f"{title}: calibrating")

            inputs = [shared for stage in packages[k] for shared in stage.linears]
            hessians = calibration.collect(sampler, denoiser, inputs, embeds, recipe, on_step)
            part = folders[k].with_name(f"{folders[k].name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for number, stage in enumerate(packages[k]):
                solved = solve_stage(stage, hessians, stored, denoiser, spec, recipe)
                _apply(denoiser, solved.tensors)
                _save_stage(part / f"{number:04}.safetensors", solved)
                worst = max(layer.error for layer in solved.layers if layer.error is not None)
                progress.advance(1, f"{title}: solving {stage.name}, error {worst:.3f}")
            part.rename(folders[k])
    return [path for folder in folders for path in sorted(folder.iterdir())]


def _apply(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not name.startswith(MASK):
                parameters[name].copy_(tensor)


def _save_stage(path: Path, solved: Solved) -> None:
    masks = {f"{MASK}{name}": checkpoint.pack(mask) for name, mask in solved.masks.items()}
    records = {
        "layers": [record.model_dump() for record in solved.layers],
        "groups": [record.model_dump() for record in solved.groups],
    }
    write_tensors(path, {**solved.tensors, **masks}, {"records": json.dumps(records)})


def _finish(source: Source, identity: Mapping[str, Any], saved: list[Path], work: Path) -> CheckpointInfo:
    """Puts the packages together as a checkpoint in work/result."""
    layers, groups = [], []
    for path in saved:
        with safe_open(path, framework="pt") as file:
            records = json.loads(file.metadata()["records"])
        layers += records["layers"]
        groups += records["groups"]
    info = CheckpointInfo(
        **identity,
        versions=checkpoint.versions(),
        threads=torch.get_num_threads(),
        layers=layers,
        groups=groups,
    )
    result = work / "result"
    if result.exists():
        shutil.rmtree(result)
    result.mkdir()
    tensors = checkpoint.TensorFiles(saved)
    masks = {name.removeprefix(MASK): tensors[name] for name in tensors if name.startswith(MASK)}
    checkpoint.write_checkpoint(source, info, tensors, masks, result)
    return info
