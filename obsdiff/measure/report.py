"""The report: one self-contained page that shows what variants of a model draw and what they cost."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from obsdiff.files import whole

PALETTE = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")  # Okabe and Ito, for all eyes
QUALITIES = {
    "latent_error": ("Latent error", "0 is the dense model's own picture; lower is better"),
    "item_accuracy": ("Item accuracy", "share of pictures whose item is right; higher is better"),
    "colour_accuracy": ("Colour accuracy", "share of pictures whose colour is right; higher is better"),
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a batch (median, p90) and of one denoiser call."""

    backend: str
    median_ms: float
    p90_ms: float
    denoiser_ms: float
    images_per_second: float


@dataclass(frozen=True)
class Layer:
    """A pruned linear: its relative output error and its share of zeros."""

    name: str
    error: float
    sparsity: float


@dataclass(frozen=True)
class Variant:
    """One way the model was pruned. `parameters` to `bytes` are the denoiser's, `macs` of one call at batch 1;
    `latency` is keyed by "batch 1" and so on."""

    name: str
    note: str
    images: Sequence[Image.Image]
    parameters: int
    nonzero: int
    macs: int
    bytes: int
    quality: Mapping[str, float]
    latency: Mapping[str, Latency]
    layers: Sequence[Layer]


@dataclass(frozen=True)
class Report:
    """The first variant is what the others are compared with; `commands` are pairs of a heading and a command line."""

    title: str
    summary: str
    prompts: Sequence[str]
    seed: int
    variants: Sequence[Variant]
    environment: Mapping[str, str]
    commands: Sequence[tuple[str, str]]
    notes: Sequence[str]


def write(report: Report, path: Path) -> None:
    """Renders the page; the same report gives the same bytes. What was at `path` stays if anything fails."""
    page = render(report)
    with whole(path) as part:
        part.write_text(page, encoding="utf-8")


def render(report: Report) -> str:
    """The page as HTML with everything in it: pictures, plot and styles. Raises ValueError for missing pictures."""
    import jinja2

    if any(len(variant.images) != len(report.prompts) for variant in report.variants):
        raise ValueError("every variant needs one picture a prompt")
    template = files("obsdiff.measure").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"human": human, "image": data_uri, "ms": _milliseconds}
    return environment.from_string(template).render(
        report=report,
        colours=dict(zip((v.name for v in report.variants), _cycle(len(report.variants)), strict=True)),
        figures=key_figures(report.variants),
        qualities=[_bars(report.variants, name, *text) for name, text in QUALITIES.items()],
        costs=_costs(report.variants),
        plot=error_plot(report.variants),
    )


def key_figures(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """Numbers for the head of the page, each with what it is; the best of the pruned variants."""
    dense, pruned = variants[0], variants[1:]
    found = []
    errors = {v.name: v.quality["latent_error"] for v in pruned if "latent_error" in v.quality}
    if errors:
        best = min(errors, key=lambda name: errors[name])
        found.append((f"{errors[best]:.3f}", f"smallest latent error of the pruned: {best}"))
    if pruned:
        small = min(pruned, key=lambda v: v.macs)
        found.append((f"{small.macs / dense.macs:.2f} ×", f"the MACs of dense: {small.name}"))
        light = min(pruned, key=lambda v: v.nonzero)
        found.append((f"{light.nonzero / dense.nonzero:.2f} ×", f"the nonzero parameters of dense: {light.name}"))
    speeds = [
        (dense.latency[batch].median_ms / v.latency[batch].median_ms, v.name, batch)
        for v in pruned
        for batch in v.latency
        if batch in dense.latency
    ]
    if speeds:
        ratio, name, batch = max(speeds)
        found.append((f"{ratio:.2f} ×", f"as fast as dense at {batch}: {name}"))
    return found


def human(number: float, unit: str = "") -> str:
    """4683552 as "4.68 M"."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def error_plot(variants: Sequence[Variant]) -> str:
    """Relative output error of each layer in forward order, a line a variant, as inline SVG in the page's text colour.

    Returns an empty string when no variant has layers.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    order = list(dict.fromkeys(layer.name for v in variants for layer in v.layers))
    if not order:
        return ""
    order.sort(key=_forward_order)
    position = {name: i for i, name in enumerate(order)}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "obsdiff", "font.family": "sans-serif"}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        axes, lines = figure.add_subplot(), {}
        for variant, colour in zip(variants, _cycle(len(variants)), strict=True):
            points = sorted((position[layer.name], layer.error) for layer in variant.layers)
            if points:
                marker = "o" if len(points) < len(order) / 2 else ""
                (lines[variant.name],) = axes.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, ms=3, lw=1.4
                )
        blocks = [_forward_order(name)[0] for name in order]
        starts = [i for i, block in enumerate(blocks) if not i or blocks[i - 1] != block]
        axes.set_xticks(starts, [f"block {blocks[i]}" for i in starts], ha="left")
        axes.set(ylabel="relative output error", xlim=(-1, len(order)))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        legend = axes.legend(lines.values(), [f"{k}" for k in range(len(lines))], frameon=False, ncols=3, fontsize=9)
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=name, parse_math=False)  # afterwards: labels with _ in front would be left out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg.replace("#000000", "currentColor"), count=1)
    return svg.replace("<text ", '<text fill="currentColor" ').replace("<svg ", '<svg role="img" ', 1)


def _forward_order(name: str) -> tuple[int, int, str]:
    block = re.search(r"\.(\d+)\.", name)
    stage = ("to_q", "to_k", "to_v", "add_", "to_out", "to_add_out", "net.0", "net.2")
    return int(block[1]) if block else 0, next((i for i, part in enumerate(stage) if part in name), 99), name


def _cycle(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _bars(variants: Sequence[Variant], name: str, title: str, meaning: str) -> dict[str, Any] | None:
    values = [(v.name, v.quality[name]) for v in variants if not math.isnan(v.quality.get(name, math.nan))]
    top = max((value for _, value in values), default=0.0)
    if not values or not top:
        return None
    rows = [{"name": n, "text": f"{value:.3f}", "share": value / top} for n, value in values]
    return {"title": title, "meaning": meaning, "rows": rows}


def _costs(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Bars of latency at each batch, then of size, each row with its ratio to the first variant."""
    charts = []
    for batch in variants[0].latency:
        timed = [(v.name, v.latency[batch].median_ms) for v in variants if batch in v.latency]
        charts.append(_cost(f"Latency, {batch}", "median of a batch", timed, _milliseconds, "× as fast"))
    for name, title, unit in (("macs", "MACs of a denoiser call", ""), ("nonzero", "Nonzero parameters", "")):
        sizes = [(v.name, float(getattr(v, name))) for v in variants]
        charts.append(_cost(title, "denoiser", sizes, lambda x, unit=unit: human(x, unit), "× of dense"))
    return charts


def _cost(title: str, meaning: str, values: list[tuple[str, float]], say: Any, kind: str) -> dict[str, Any]:
    top, first = max(value for _, value in values), values[0][1]
    ratio = (lambda value: first / value) if "fast" in kind else (lambda value: value / first)
    rows = [
        {"name": name, "text": f"{say(value)}{f'  {ratio(value):.2f} {kind}' if k else ''}", "share": value / top}
        for k, (name, value) in enumerate(values)
    ]
    return {"title": title, "meaning": meaning, "rows": rows}
