"""The whole path on the embedded model: prune, export, draw, judge, time, and a report to look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from obsdiff.checkpoint import CheckpointInfo
from obsdiff.errors import InputError
from obsdiff.export.bundle import read_manifest
from obsdiff.export.inspect import inspect
from obsdiff.export.receipt import read_receipt
from obsdiff.export.schema import Totals
from obsdiff.export.stage import export
from obsdiff.measure import fashion, quality, report
from obsdiff.measure.environment import environment
from obsdiff.measure.intervals import mean_interval
from obsdiff.measure.latency import bench
from obsdiff.measure.reproduce import export_command, prune_command
from obsdiff.measure.results import Metric
from obsdiff.progress import Progress
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options
from obsdiff.runtime.pipeline import load

MODEL = "fashion"
SEED = 1000
UNSEEN = 22  # pictures beside the shown ones, to judge by
SHOWN = (
    "a photo of a red ankle boot",
    "teal trousers",
    "a photo of a yellow dress",
    "a purple sneaker",
    "a blue t-shirt",
    "a photo of a green bag",
    "an orange pullover",
    "a photo of a pink coat",
    "a black sandal",
    "a brown shirt",
)
CALIBRATION: dict[str, Any] = {"num_prompts": 16, "steps": 8, "batch_size": 16}


@dataclass(frozen=True)
class Plan:
    """A variant: its folder, its name in the report, how it is pruned (None: not at all), whether it is exported."""

    folder: str
    name: str
    options: Mapping[str, Any] | None = None
    exported: bool = False
    result: dict[str, Any] = field(default_factory=dict)


HALF = {"pattern": "unstructured", "sparsity": 0.5}
PLANS = (
    Plan("dense", "dense", None, True),
    Plan("2-4-magnitude", "2:4 magnitude", {"pattern": "2:4", "solver": "magnitude", "packages": 1}),
    Plan("2-4-obs", "2:4 OBS", {"pattern": "2:4", "solver": "obs"}),
    Plan("2-4", "2:4", {"pattern": "2:4"}, True),
    Plan("half-magnitude", "50 % magnitude", {**HALF, "solver": "magnitude", "packages": 1}),
    Plan("half-obs", "50 % OBS", {**HALF, "solver": "obs"}),
    Plan("structured", "structured 30 %", {"pattern": "structured", "sparsity": 0.3}, True),
)
BATCHES = {1: 5, 32: 2}  # pictures at once: timed runs


def demo(out: str | Path, progress: Progress | None = None) -> Path:
    """Makes every variant in `out` and returns the path of report.html. What is there already is used again.

    Raises InputError when `out` is a file or a folder with other things in it.
    """
    out, progress = Path(out), progress or Progress()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another name")
    if out.is_dir() and any(out.iterdir()) and not (out / "checkpoints").is_dir():
        raise InputError(f"{out} has other things in it: choose another name")
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / "bundles").mkdir(exist_ok=True)
    infos = {plan.folder: _prune(plan, out, progress) for plan in PLANS}
    for plan in PLANS:
        _export(plan, out, progress)
    paths = {plan.folder: _path(plan, out) for plan in PLANS}
    drawn, metrics = _draw(paths, progress)
    timed = [plan for plan in PLANS if plan.exported]
    latency: dict[str, list[report.Latency]] = {plan.folder: [] for plan in PLANS}
    with progress.task("timing", len(BATCHES)):
        for batch, runs in BATCHES.items():
            progress.advance(1, f"timing batch {batch}")
            found = bench([paths[plan.folder] for plan in timed], batch_size=batch, runs=runs, warmup=1, memory=False)
            for plan, row in zip(timed, found["results"], strict=True):
                latency[plan.folder].append(_latency(batch, row))
    variants = [
        _variant(plan, out, infos[plan.folder], drawn[plan.folder], metrics[plan.folder], latency[plan.folder])
        for plan in PLANS
    ]
    target = out / "report.html"
    report.write(_report(variants), target)
    return target


def _prune(plan: Plan, out: Path, progress: Progress) -> CheckpointInfo | None:
    if plan.options is None:
        return None
    progress.message(f"pruning {plan.name}")
    return prune(MODEL, out / "checkpoints" / plan.folder, progress=progress, **CALIBRATION, **plan.options)


def _export(plan: Plan, out: Path, progress: Progress) -> None:
    bundle = out / "bundles" / plan.folder
    if not plan.exported or bundle.exists():
        return
    model = out / "checkpoints" / plan.folder if plan.options else MODEL
    progress.message(f"exporting {plan.name}")
    export(model, bundle, batch=f"1:1:{max(BATCHES)}", progress=progress)


def _path(plan: Plan, out: Path) -> Path:
    return out / ("bundles" if plan.exported else "checkpoints") / plan.folder


def _draw(
    paths: Mapping[str, Path], progress: Progress
) -> tuple[dict[str, quality.Drawn], dict[str, dict[str, Metric]]]:
    """Pictures of every variant for the same prompts and seeds, the shown ones first, and how good they are."""
    prompts = [*SHOWN, *fashion.unseen_captions(UNSEEN)]
    seeds = range(SEED, SEED + len(prompts))
    drawn: dict[str, quality.Drawn] = {}
    metrics: dict[str, dict[str, Metric]] = {}
    classifier = fashion.load_classifier()
    with progress.task("drawing", len(paths)):
        for folder, path in paths.items():
            progress.advance(1, f"drawing {folder}")
            pipe = load(path)
            drawn[folder] = quality.draw(pipe, prompts, seeds, call_options(pipe, path), batch_size=16)
            pictures = quality.as_tensor(drawn[folder].images)
            hits = [
                fashion.accuracy(picture[None], [prompt], classifier)
                for picture, prompt in zip(pictures, prompts, strict=True)
            ]
            metrics[folder] = {
                name: _metric([hit[name] for hit in hits], "higher", share=True)
                for name in ("item_accuracy", "colour_accuracy")
            }
            if folder != "dense":
                dense = drawn["dense"].latents
                errors = (drawn[folder].latents - dense).square().mean((1, 2, 3)) / dense.var()
                metrics[folder]["latent_error"] = _metric(errors.tolist(), "lower")
    return drawn, metrics


def _metric(values: list[float], better: Any, share: bool = False) -> Metric:
    mean, low, high = mean_interval(np.array(values), share)
    return Metric(value=mean, low=low, high=high, images=len(values), better=better)


def _latency(batch: int, row: Mapping[str, Any]) -> report.Latency:
    return report.Latency(
        group=f"batch {batch}",
        backend=row["backend"],
        median_ms=row["median_ms"],
        p90_ms=row["p90_ms"],
        images_per_second=row["images_per_second"],
        denoiser_ms=row["stages_ms"]["denoiser_call"],
    )


def _variant(
    plan: Plan,
    out: Path,
    info: CheckpointInfo | None,
    drawn: quality.Drawn,
    metrics: Mapping[str, Metric],
    latency: list[report.Latency],
) -> report.Variant:
    path = _path(plan, out)
    totals = inspect(path)["totals"]
    dense, here = (Totals(**{name: pair[k] for name, pair in totals.items()}) for k in (0, 1))
    manifest = read_manifest(path) if plan.exported else None
    made = [prune_command(info.recipe, info.base, f"checkpoints/{plan.folder}")] if info else []
    if manifest:
        origin = f"checkpoints/{plan.folder}" if info else MODEL
        made.append(export_command(manifest, origin, f"bundles/{plan.folder}"))
    return report.Variant(
        name=plan.name,
        note="" if info else "The embedded model as it was trained.",
        images=drawn.images[: len(SHOWN)],
        metrics=metrics,
        latency=latency,
        layers=[
            report.Layer(layer.name, layer.error, layer.sparsity)
            for layer in (info.layers if info else [])
            if layer.error is not None
        ],
        totals=here,
        dense=dense,
        receipt=read_receipt(path, manifest) if manifest else None,
        commands=made,
    )


def _report(variants: list[report.Variant]) -> report.Report:
    return report.Report(
        title="One model, pruned six ways",
        summary="The same small text-to-image model before and after one-shot pruning: what it draws, what it costs.",
        variants=variants,
        reference=variants[0].name,
        prompts=SHOWN,
        seeds=range(SEED, SEED + len(SHOWN)),
        environments=[("", environment())],
        commands=(
            (
                "Prune your own pipeline (a diffusers folder or a hub id)",
                "obsdiff prune MODEL pruned --pattern 2:4",
            ),
            ("See what was pruned, layer by layer", "obsdiff inspect pruned"),
            ("Compile it", "obsdiff export pruned bundle --format onnx"),
            ("Draw with it", 'obsdiff run bundle "a red ankle boot" --out boot.png --seed 0'),
            ("Time it against the dense model", "obsdiff bench MODEL bundle"),
            ("Make a page like this one", "obsdiff report pruned bundle --out report.html"),
        ),
        what_for="Do the same to your own model",
        notes=NOTES,
    )


NOTES = (
    "Latent error: mean squared difference of the final latents to the dense model's for the same prompts and seeds, "
    f"over their variance; {len(SHOWN) + UNSEEN} prompts, {UNSEEN} of them in no calibration set. Accuracy: the "
    "shipped classifier's, on the same pictures; above 0.91 it is no better than on real photographs.",
    "2:4 does not make anything faster on a CPU: it needs sparse tensor cores. Its row is here to show that the "
    "pictures survive and that nothing got slower.",
    "At batch 1 this model (28 tokens, 128 channels) is bound by the overhead of each call, so removing heads and "
    "neurons shows only in larger batches. On models of real size the saving is close to that in MACs.",
    "The relative output error of a layer is measured on calibration inputs. Magnitude pruning measures it without "
    "using it. Within a structured group only the projections that read the removed units have one.",
)
