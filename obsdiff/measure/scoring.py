"""The metrics of an eval: opened before anything is drawn, computed when all is."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from obsdiff.errors import first_line
from obsdiff.measure.comparable import Subject
from obsdiff.measure.intervals import distance_interval, mean_interval
from obsdiff.measure.metrics import METRICS, Missing
from obsdiff.measure.quality import Drawn
from obsdiff.progress import Progress

Figures = dict[str, dict[str, dict[str, Any]]]
"""Path, metric, figure."""


def open_metrics(
    wanted: Sequence[str],
    weights: Mapping[str, str | Path],
    first: Subject,
    count: int,
    device: str,
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The functions of the metrics that can be computed here, and why the others cannot. Raises InputError."""
    scorers, skipped, opened = {}, {}, {}
    for name in wanted:
        metric, given = METRICS[name], weights.get(name)
        try:
            if metric.of == "embedded" and not (
                first.embedded and {first.side(axis, overrides) for axis in ("height", "width")} == {32}
            ):
                raise Missing("it judges the embedded model's pictures of 32×32 pixels only")
            if count < metric.fewest:
                raise Missing(f"it needs at least {metric.fewest} images, not {count}: --num-images {metric.fewest}")
            key = (metric.open, given)  # FID and KID share their features
            if key not in opened:
                opened[key] = metric.open(Path(given) if given else None, device)
            scorers[name] = opened[key]
        except Missing as error:
            skipped[name] = str(error)
    return scorers, skipped


def score(
    scorers: Mapping[str, Any],
    prompts: Sequence[str],
    first: Subject,
    candidates: Sequence[Subject],
    drawn: Mapping[str, Drawn],
    skipped: dict[str, str],
    progress: Progress,
) -> Figures:
    """Every metric of every path; one that fails is told in `skipped`, and the others go on."""
    figures: Figures = {one.path: {} for one in (first, *candidates)}
    features: dict[tuple[Any, str], torch.Tensor] = {}
    for name, function in scorers.items():
        metric = METRICS[name]

        def featured(path: str, function: Any = function) -> torch.Tensor:
            if (function, path) not in features:
                features[function, path] = function(drawn[path])
            return features[function, path]

        try:
            found = {}
            for one in (first, *candidates):
                progress.advance(1, f"measuring {name}")
                if metric.kind == "alone":
                    values = function(drawn[one.path], prompts)
                    values = values[~values.isnan()]
                    if not len(values):
                        raise Missing("no prompt says what it could judge")
                    found[one.path] = figure(mean_interval(values.numpy(), metric.share), len(values), metric.better)
                elif one is not first and metric.distance:
                    interval = distance_interval(metric.distance, featured(one.path), featured(first.path))
                    found[one.path] = figure(interval, len(prompts), metric.better)
                elif one is not first:
                    values = function(drawn[one.path], drawn[first.path])
                    found[one.path] = figure(mean_interval(values.numpy()), len(values), metric.better)
            for path, entry in found.items():
                figures[path][name] = entry
        except Missing as error:
            skipped[name] = str(error)
        except Exception as error:  # whatever a library raises for weights that are not its own
            if metric.of != "other":
                raise
            skipped[name] = f"it failed: {first_line(error)}"
    return figures


def figure(interval: Sequence[float], images: int, better: str) -> dict[str, Any]:
    """A figure as it is written; None for what is not finite."""
    value, low, high = (number if math.isfinite(number) else None for number in interval)
    return {"value": value, "low": low, "high": high, "images": images, "better": better}


def gate(name: str, least: bool, limit: float, path: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    value = figures[name]["value"] if name in figures else None
    met = value is not None and (value >= limit if least else value <= limit)
    return {
        "metric": name,
        "path": path,
        "bound": "min" if least else "max",
        "limit": limit,
        "value": value,
        "met": met,
    }
