"""The report: one self-contained page that shows what variants of a model draw and what they cost."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from obsdiff.export.receipt import Receipt, say
from obsdiff.export.schema import Totals
from obsdiff.files import whole
from obsdiff.measure.results import Gate, Metric, fit

PALETTE = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")  # Okabe and Ito, for all eyes
METRICS = {  # the first of these that a report has is its main one
    "latent_error": ("Latent error", "how far the final latents are from the dense model's; 0 is the same picture"),
    "latent_mse": ("Latent MSE", "of the final latents against the dense model's; 0 is the same picture"),
    "lpips": ("LPIPS", "perceptual distance to the dense model's picture"),
    "ssim": ("SSIM", "structural similarity to the dense model's picture; 1 is the same"),
    "psnr": ("PSNR", "decibels, against the dense model's picture"),
    "item_accuracy": ("Item accuracy", "share of pictures whose item is right"),
    "colour_accuracy": ("Colour accuracy", "share of pictures whose colour is right"),
    "held_out_item_accuracy": ("Item accuracy, held out", "of pairs of item and colour that training never showed"),
    "held_out_colour_accuracy": ("Colour accuracy, held out", "of pairs of item and colour that training never showed"),
    "frechet_distance": ("Fréchet distance", "between the features of these pictures and of real ones"),
    "fid": ("FID", "between the features of these pictures and of the others"),
    "kid": ("KID", "between the features of these pictures and of the others"),
    "clip_score": ("CLIP score", "how well the picture fits its prompt"),
    "image_reward": ("ImageReward", "what people would prefer, as a model learned it"),
    "hpsv2": ("HPSv2", "what people would prefer, as a model learned it"),
}
LOSSLESS = 128  # pixels: up to this side a picture is kept exactly and shown in hard pixels


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a batch (median, p90) and of one denoiser call. Only rows of one `group` were measured together
    and may be compared."""

    group: str
    backend: str
    median_ms: float
    p90_ms: float
    images_per_second: float
    denoiser_ms: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Layer:
    """A pruned linear: its relative output error and its share of zeros."""

    name: str
    error: float
    sparsity: float


@dataclass(frozen=True)
class Variant:
    """One way the model was pruned, as far as it is known. `images`: one a prompt, or none; `totals` are the
    denoiser's, `dense` those that it had before; `layers` in forward order."""

    name: str
    note: str = ""
    images: Sequence[Image.Image] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    latency: Sequence[Latency] = ()
    layers: Sequence[Layer] = ()
    totals: Totals | None = None
    dense: Totals | None = None
    receipt: Receipt | None = None
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """`reference` names the variant that the others are compared with, and which then comes first. `environments` are
    what was measured where; `commands` pairs of a heading and a command line, and
    `what_for` the heading over them."""

    title: str
    summary: str
    variants: Sequence[Variant]
    reference: str | None = None
    prompts: Sequence[str] = ()
    seeds: Sequence[int] = ()
    pictures: str = ""
    gates: Sequence[Gate] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    environments: Sequence[tuple[str, Mapping[str, str]]] = ()
    commands: Sequence[tuple[str, str]] = ()
    what_for: str = "Do it again"
    notes: Sequence[str] = ()


def write(report: Report, path: Path) -> int:
    """Renders the page and returns its bytes; the same report gives the same. What was at `path` stays if it fails."""
    page = render(report).encode(errors="replace")
    with whole(path) as part:
        part.write_bytes(page)
    return len(page)


def render(report: Report) -> str:
    """The page as HTML with pictures, plots and styles in it. Raises ValueError for a report that is not whole."""
    import jinja2

    from obsdiff.measure import report_plots

    variants = report.variants
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names) or (report.reference is not None and names[:1] != [report.reference]):
        raise ValueError("every variant needs a name of its own, and the reference comes first")
    if len(report.seeds) != len(report.prompts) or any(len(v.images) not in (0, len(report.prompts)) for v in variants):
        raise ValueError("every prompt needs a seed, and every variant one picture a prompt")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "human": human,
        "image": data_uri,
        "ms": milliseconds,
        "figure": figure,
        "receipt": say,
    }
    colours = {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(names)}
    drawn = [variant for variant in variants if variant.images]
    return environment.get_template("report.html.jinja").render(
        report=report,
        colours=colours,
        drawn=drawn if report.prompts else [],
        pixelated=bool(drawn) and max(drawn[0].images[0].size) <= LOSSLESS,
        metrics=metric_names(variants),
        say=say_metric,
        rows=[row for variant in variants for row in variant.latency],
        figures=key_figures(report),
        qualities=[_quality(variants, name) for name in metric_names(variants)],
        costs=_costs(report),
        pareto=report_plots.pareto_plots(report, colours),
        errors=report_plots.error_plot(variants, colours),
    )


def metric_names(variants: Sequence[Variant]) -> list[str]:
    """The metrics that some variant has a value of, the main one first."""
    found = {name for v in variants for name, metric in v.metrics.items() if metric.value is not None}
    return [*(name for name in METRICS if name in found), *sorted(found - METRICS.keys())]


def say_metric(variants: Sequence[Variant], name: str) -> dict[str, str]:
    """A metric's `title`, the same within a sentence (`short`), its `meaning` and which side is `better`."""
    title, meaning = METRICS.get(name, (name.replace("_", " "), ""))
    better = next(v.metrics[name].better for v in variants if name in v.metrics)
    short = title[0].lower() + title[1:] if title[1:2].islower() else title
    meaning = f"{meaning}; {better} is better".lstrip("; ")
    return {"title": title, "short": short, "meaning": meaning, "better": better}


def key_figures(report: Report) -> list[tuple[str, str]]:
    """Numbers for the head of the page, each with what it is; the best of the pruned variants."""
    reference = report.variants[0] if report.reference is not None else None
    pruned = report.variants[1:] if reference else report.variants
    found = []
    backends = {(row.group, row.backend) for row in reference.latency} if reference else set()
    speeds = [
        (ratio, v.name, row.group)
        for v in pruned
        for row, ratio in (speed_ups(v, reference) if reference else {}).items()
        if (row.group, row.backend) in backends
    ]
    if reference and speeds:
        ratio, name, group = max(speeds)
        found.append((f"{ratio:.2f} ×", f"as fast as {reference.name} at {group}: {name}"))
    for metric in metric_names(pruned)[:1]:
        better = say_metric(pruned, metric)
        choose, word = (min, "smallest") if better["better"] == "lower" else (max, "highest")
        best, name = choose((value, v.name) for v in pruned if (value := _value(v, metric)) is not None)
        found.append((figure(best), f"{word} {better['short']} of the pruned: {name}"))
    for size, words in (("macs", "the MACs of dense"), ("nonzero", "the nonzero parameters of dense")):
        shares = [(share, v.name) for v in pruned if (share := _share(v, size)) is not None]
        if shares:
            found.append((f"{min(shares)[0]:.2f} ×", f"{words}: {min(shares)[1]}"))
    receipts = [(v.receipt.summary, v.name) for v in pruned if v.receipt]
    if runs := [(s.sparse, s.eligible, name) for s, name in receipts if s.sparse is not None and s.eligible]:
        sparse, eligible, name = max(runs)
        found.append((f"{sparse} of {eligible}", f"layers that could run sparse do: {name}"))
    if report.gates:
        found.append((f"{sum(gate.met for gate in report.gates)} of {len(report.gates)}", "gates met"))
    return found


def speed_ups(variant: Variant, reference: Variant) -> dict[Latency, float]:
    """How many times as fast as the reference's row of the same group each row of a variant is: the row of the same
    backend where there is one."""
    found = {}
    for row in variant.latency:
        rows = [other for other in reference.latency if other.group == row.group]
        rows.sort(key=lambda other: other.backend != row.backend)
        if rows:
            found[row] = rows[0].median_ms / row.median_ms
    return found


def human(number: float, unit: str = "") -> str:
    """4683552 as "4.68 M"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


def figure(value: float) -> str:
    """Three digits, zeros at the end kept: 0.9 as "0.900", so that a column of them lines up."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def data_uri(image: Image.Image) -> str:
    """The picture as a data URI: exact where it is small, at most 512 pixels a side and WEBP where it is not."""
    buffer = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        fit(image).save(buffer, format="WEBP", quality=85)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _value(variant: Variant, metric: str) -> float | None:
    return variant.metrics[metric].value if metric in variant.metrics else None


def _share(variant: Variant, size: str) -> float | None:
    """What is left of the dense denoiser's MACs or parameters; None where either is not known."""
    dense = getattr(variant.dense, size) if variant.dense else 0
    return getattr(variant.totals, size) / dense if variant.totals and dense else None


def _chart(title: str, meaning: str, rows: list[tuple[str, str, float, str]]) -> dict[str, Any]:
    """Bars: each a variant, its label, its value and what is said of it."""
    top = max((value for _, _, value, _ in rows), default=0) or 1
    bars = [{"name": n, "label": label, "text": text, "share": max(0, v) / top} for n, label, v, text in rows]
    return {"title": title, "meaning": meaning, "rows": bars}


def _quality(variants: Sequence[Variant], name: str) -> dict[str, Any]:
    about = say_metric(variants, name)
    rows = [(v.name, v.name, value, figure(value)) for v in variants if (value := _value(v, name)) is not None]
    return _chart(about["title"], about["meaning"], rows)


def _costs(report: Report) -> list[dict[str, Any]]:
    """Bars of latency in each group, then of size, each row with its ratio to the reference."""
    charts, reference = [], report.variants[0] if report.reference is not None else None
    for group in dict.fromkeys(row.group for v in report.variants for row in v.latency):
        timed = [(v, row) for v in report.variants for row in v.latency if row.group == group]
        several = len({row.backend for _, row in timed}) > 1
        rows = []
        for variant, row in timed:
            ratio = speed_ups(variant, reference).get(row) if reference and variant is not reference else None
            text = milliseconds(row.median_ms) + (f"  {ratio:.2f} × as fast" if ratio else "")
            rows.append((variant.name, variant.name + f", {row.backend}" * several, row.median_ms, text))
        meaning = "median" if several else f"median, {timed[0][1].backend}"
        charts.append(_chart(f"Latency, {group}", meaning, rows))
    for size, title in (("macs", "MACs of a denoiser call"), ("nonzero", "Nonzero parameters")):
        rows = []
        for v in report.variants:
            if v.totals and (count := getattr(v.totals, size)):
                share = _share(v, size) if v.name != report.reference else None
                rows.append((v.name, v.name, count, human(count) + (f"  {share:.2f} × of dense" if share else "")))
        if rows:
            charts.append(_chart(title, "denoiser", rows))
    return charts
