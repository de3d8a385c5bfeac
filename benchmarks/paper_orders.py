"""What OBS-Diff (arXiv 2510.06751) reports, and whether methods rank here as they do there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from obsdiff.measure.intervals import mean_interval

RANKED = {"latent_error": False, "item_accuracy": True, "frechet_distance": False}  # True: higher is better
PAIRED = ("latent_error", "item_accuracy")  # of every picture for itself
FIGURES = ("latent_error", "item_accuracy", "colour_accuracy", "frechet_distance")
HELD_OUT = ("held_out_item_accuracy", "held_out_colour_accuracy")
STEPS = ("log-decrease", "log-increase", "linear-decrease", "linear-increase", "uniform")
PACKAGES = ("one a stage", "8", "4", "2", "1")
PROMPTS = ("100", "64", "32", "16", "8")

Pair = tuple[str, str]
"""The better method and the worse one."""


@dataclass(frozen=True)
class Published:
    """The paper's own figures of one group of rows: another model, another metric."""

    what: str
    higher: bool
    values: Mapping[str, float]
    note: str = ""

    @property
    def order(self) -> list[str]:
        """The methods, the best first."""
        found = {name: value for name, value in self.values.items() if name != "dense"}
        return sorted(found, key=lambda name: found[name], reverse=self.higher)


def _fid(obs: float, magnitude: float, billions: float, tflops: float) -> Published:
    size = f"{billions} of 8.06 B parameters, {tflops} of 11.26 TFLOPs"
    return Published("SD3.5-large, FID", False, {"obs": obs, "L1": magnitude}, size)


PAPER = {
    ("unstructured", "50 %"): Published(
        "SD3-medium, ImageReward",
        True,
        {"dense": 0.9029, "magnitude": -2.27, "wanda": -0.11, "dsnot": -0.59, "obs": 0.6468},
    ),
    ("2:4", "2:4"): Published(
        "SD3.5-large, blocks 3 to 25, ImageReward",
        True,
        {"dense": 0.7549, "magnitude": -0.47, "wanda": -0.14, "dsnot": 0.03, "obs": 0.4493},
    ),
    ("structured", "15 %"): _fid(32.6, 159, 7.28, 9.63),
    ("structured", "20 %"): _fid(32.5, 190, 7.02, 9.09),
    ("structured", "25 %"): _fid(33.7, 229, 6.76, 8.55),
    ("structured", "30 %"): _fid(34.5, 327, 6.54, 8.10),
}


def claims(table: str, group: str) -> list[tuple[str, list[Pair]]]:
    """What is claimed of a group of rows: each claim in words, and as pairs of rows."""
    ours = ("ours before the paper's method", [(name, "obs") for name in ("alps", "auto", "auto, allocated")])
    if table in ("unstructured", "2:4", "structured"):
        # Of unstructured pruning FACTS has the paper's figures at 50 % alone: its order there stands for the others.
        known = PAPER.get((table, group)) or PAPER[table, "50 %"]
        where = "" if (table, group) in PAPER else " at 50 %"
        return [(f"the paper{where}: {' before '.join(known.order)}", list(combinations(known.order, 2))), ours]
    if table == "timesteps":
        return [("the paper's choice, log-decrease, before the others", [(STEPS[0], name) for name in STEPS[1:]])]
    if table == "compensation":
        return [("weights compensated before the mask alone", [("obs", "mask alone")])]
    names = {"packages": PACKAGES, "prompts": PROMPTS}[table]
    return [(f"more {table} before fewer", list(combinations(names, 2)))]


def by_picture(results: Sequence[Mapping[str, Any]], figure: str) -> np.ndarray[Any, Any]:
    """Float64 [images]: that figure of each picture, the mean of the calibration seeds."""
    return np.mean([np.array(result["pictures"][figure].split(), float) for result in results], axis=0)


def mean_figure(results: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """A figure and its interval over the pictures, each the mean of the calibration seeds; None when there is none."""
    found = [result["figures"][name] for result in results if name in result["figures"]]
    if not found or any(one["value"] is None for one in found):
        return None
    return {**found[0], **{key: float(np.mean([one[key] for one in found])) for key in ("value", "low", "high")}}


def judge(better: Sequence[Mapping[str, Any]], worse: Sequence[Mapping[str, Any]], figure: str) -> bool | None:
    """Whether the better one is better here; None when the pictures are too few to say so.

    Picture by picture where each has its figure; a distance of all pictures where the intervals lie apart.
    """
    up = RANKED[figure]
    if figure in PAIRED:
        gain = by_picture(better, figure) - by_picture(worse, figure)
        _, low, high = mean_interval(gain if up else -gain)
        return None if low <= 0 <= high else low > 0
    one, other = mean_figure(better, figure), mean_figure(worse, figure)
    if one is None or other is None or (one["low"] <= other["high"] and other["low"] <= one["high"]):
        return None
    return bool((one["value"] > other["value"]) == up)


def verdict(rows: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Sequence[Pair], figure: str) -> str:
    """How many pairs agree, and which do not; rows: the results of each by its name, those that are there."""
    known = [pair for pair in pairs if pair[0] in rows and pair[1] in rows]
    if not known or not any(mean_figure(rows[name], figure) for name in known[0]):
        return ""
    found = {pair: judge(rows[pair[0]], rows[pair[1]], figure) for pair in known}
    against = [f"{worse} before {better}" for (better, worse), agrees in found.items() if agrees is False]
    said = [f"{list(found.values()).count(True)} of {len(known)} agree"]
    if open_ := list(found.values()).count(None):
        said.append(f"{open_} undecided")
    return ", ".join(said) + (f", not: {'; '.join(against)}" if against else "")


def order_here(rows: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> str:
    """Those rows by their latent error, the best first."""
    known = [name for name in dict.fromkeys(names) if name in rows]
    return ", ".join(sorted(known, key=lambda name: float(by_picture(rows[name], "latent_error").mean())))


def order_table(groups: Mapping[Pair, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Markdown: each claim of each group (table, group), the order here, and the verdict by each ranked figure."""
    columns = ["rows", "claim", "here, by latent_error", *RANKED]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for (table, group), rows in groups.items():
        for text, pairs in claims(table, group):
            cells = [verdict(rows, pairs, figure) for figure in RANKED]
            if any(cells):
                title = table if table == group else f"{table} {group}"
                here = order_here(rows, [name for pair in pairs for name in pair])
                lines.append(f"| {' | '.join([title, text, here, *cells])} |")
    return lines


def row_table(
    table: str, groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], dense: Mapping[str, Any]
) -> list[str]:
    """Markdown: one line a row, the dense model first; beside it what the paper reports, where that is known."""
    published = {group: PAPER[table, group] for group in groups if (table, group) in PAPER}
    figures = [*FIGURES, *HELD_OUT]
    columns = ["rows", "", *figures, "parameters, M", "MACs, M", "prune, s"]
    columns += ["the paper: another model and metric"] * bool(published)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]

    def line(group: str, name: str, results: Sequence[Mapping[str, Any]], beside: Sequence[str]) -> str:
        first, cells = results[0], [_say(mean_figure(results, figure)) for figure in figures]
        left = min(first["parameters"], first["nonzero"]) / 1e6
        seconds = np.mean([result["prune_s"] for result in results]) if "prune_s" in first else None
        size = [f"{left:.2f}", f"{first['macs'] / 1e6:.0f}", "" if seconds is None else f"{seconds:.1f}"]
        return f"| {' | '.join([group, name, *cells, *size, *beside])} |"

    lines.append(line("", "dense", [dense], [""] * bool(published)))
    for group, rows in groups.items():
        known = published.get(group)
        for name, results in rows.items():
            value = known.values.get(name) if known else None
            note = f", {known.note}" if known and known.note and name == "obs" else ""
            said = f"{known.what} {value:g}{note}" if known and value is not None else ""
            lines.append(line(group, name, results, [said] * bool(published)))
    if dense_values := [
        f"{one.what}, dense: {one.values['dense']:g}" for one in published.values() if "dense" in one.values
    ]:
        lines += ["", "; ".join(dense_values)]
    return lines


def _say(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['value']:.3g} [{figure['low']:.3g}, {figure['high']:.3g}]"
