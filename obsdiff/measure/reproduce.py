"""The command lines that make what a recipe, a manifest or a result describes."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from obsdiff.export.bundle import Manifest
from obsdiff.measure.results import Bench, Eval
from obsdiff.models.source import DATA
from obsdiff.prune.recipe import Recipe, flag, read_prompts

ALWAYS = {  # options whose defaults depend on the others, or on the model
    *("pattern", "sparsity", "allocation", "solver", "blocks", "device", "dtype"),
    *("steps", "height", "width", "guidance_scale"),
}
CALL = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "height": "--height",
    "width": "--width",
}


def prune_command(recipe: Mapping[str, Any], base: Mapping[str, str], out: str) -> str:
    """The prune that has this recipe. Prompts that do not ship with obsdiff are left to a file prompts.txt."""
    words = ["obsdiff", "prune", base.get("name", "MODEL"), out]
    if "config" in base:
        words += ["--config", base["config"]]
    for name, field in Recipe.model_fields.items():
        value = recipe.get(name)
        if not isinstance(value, str | int | float) or (name not in ALWAYS and value == field.default):
            continue
        words += [flag(name)] if value is True else [flag(name), _say(value)]
    for lora in recipe.get("lora") or ():
        words += ["--lora", f"{lora['name']}:{lora['scale']:g}"]
    prompts = list(recipe.get("prompts", ()))
    shipped = DATA / "prompts" / ("fashion.txt" if base.get("name") == "fashion" else "general.txt")
    if prompts == read_prompts(shipped)[: len(prompts)]:
        words += ["--num-prompts", str(len(prompts))]
    else:
        words += ["--prompts", "prompts.txt", "--num-prompts", str(len(prompts))]
    return shlex.join(words)


def export_command(manifest: Manifest, model: str, out: str) -> str:
    """The export that has this manifest's formats, precision and ranges."""
    words = ["obsdiff", "export", model, out]
    for name in manifest.formats:
        words += ["--format", name]
    words += ["--precision", manifest.precision]
    if batch := manifest.axes.get("batch"):
        passes = manifest.spec.passes
        words += ["--batch", f"{batch.min}:{max(1, batch.opt // passes)}:{max(1, batch.max // passes)}"]
    if side := manifest.axes.get("height"):
        words += ["--size", ":".join(str(latents * manifest.vae_scale) for latents in (side.min, side.opt, side.max))]
    return shlex.join(words)


def bench_command(bench: Bench) -> str:
    """The bench of these paths with these settings."""
    counts = {name: bench.settings.get(name) for name in ("batch_size", "runs", "warmup", "device")}
    given = [[flag(name), _say(value)] for name, value in counts.items() if value is not None]
    return _measured("bench", list(dict.fromkeys(row.path for row in bench.results)), given, bench.settings)


def eval_command(found: Eval) -> str:
    """The eval of these paths against that reference; its prompts are the report's."""
    given = [["--reference", found.reference.path], ["--num-images", str(len(found.settings.prompts))]]
    given += [["--seed", str(found.settings.seeds[0])]]
    extra = found.settings.model_extra or {}
    settings = {**extra, "num_inference_steps": extra.get("steps")}
    return _measured("eval", [drawn.path for drawn in found.results], given, settings)


def _measured(command: str, paths: Sequence[str], given: list[list[str]], settings: Mapping[str, Any]) -> str:
    call = [[option, _say(settings[name])] for name, option in CALL.items() if settings.get(name) is not None]
    return shlex.join(["obsdiff", command, *paths, *(word for option in (*given, *call) for word in option)])


def _say(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
