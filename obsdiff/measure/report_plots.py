"""The report's plots, as inline SVG in the page's own text colour."""

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from obsdiff.measure.report import Latency, Report, Variant, metric_names, milliseconds, say_metric

MARKERS = "sovD^Pp"
LONGEST = 32  # characters of a name that a plot has room for
TICKS = 16  # the most blocks that are named below the errors
PLACES = (  # where a name may stand beside its point, in points: the first that is free; the frontier goes to the right
    (9, 9, "left", "center"),
    (9, -9, "left", "center"),
    (-9, 9, "right", "center"),
    (-9, -9, "right", "center"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (0, 24, "center", "bottom"),
    (0, -24, "center", "top"),
)


def frontier(points: Sequence[tuple[float, float]], better: str) -> list[int]:
    """Indices of the (milliseconds, quality) points that no other beats in one without losing in the other, fastest
    first; `better` is "lower" or "higher"."""
    sign = -1 if better == "higher" else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i))
    found: list[int] = []
    for i in order:
        if not found or sign * points[i][1] < sign * points[found[-1]][1]:
            found.append(i)
    return found


def pareto_plots(report: Report, colours: Mapping[str, str]) -> list[dict[str, str]]:
    """Quality against latency, as `label` and `svg`: each metric at each group that two variants have both of."""
    groups = list(dict.fromkeys(row.group for variant in report.variants for row in variant.latency))
    found: list[dict[str, str]] = []
    for metric in metric_names(report.variants):
        about = say_metric(report.variants, metric)
        for group in groups:
            rows = [(v, row) for v in report.variants for row in v.latency if row.group == group]
            shown = [(v, row) for v, row in rows if metric in v.metrics and v.metrics[metric].value is not None]
            dense = [row.median_ms for v, row in rows if v.name == report.reference and (v, row) not in shown][:1]
            if len(shown) + len(dense) > 1 and shown:
                svg = _pareto(shown, metric, about, group, dense, str(report.reference), colours, f"pareto{len(found)}")
                found.append({"label": f"{about['title']}, {group}", "svg": svg})
    return found


def _pareto(
    shown: Sequence[tuple[Variant, Latency]],
    metric: str,
    about: Mapping[str, str],
    group: str,
    dense: Sequence[float],
    reference: str,
    colours: Mapping[str, str],
    salt: str,
) -> str:
    from matplotlib.figure import Figure

    with _style(salt):
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axes = figure.add_subplot()
        points = [(row.median_ms, float(variant.metrics[metric].value or 0)) for variant, row in shown]
        usual = Counter(row.backend for _, row in shown).most_common(1)[0][0]
        best = frontier(points, about["better"])
        axes.plot(
            *zip(*(points[i] for i in best), strict=True),
            drawstyle="steps-post", color="#000000", lw=1, ls=(0, (4, 3)), alpha=0.45, zorder=1,
        )  # fmt: skip
        for k, ((variant, _), (ms, value)) in enumerate(zip(shown, points, strict=True)):
            colour, found = colours[variant.name], variant.metrics[metric]
            if found.low is not None and found.high is not None:
                axes.vlines(ms, found.low, found.high, color=colour, lw=1.6, alpha=0.55, zorder=2)
                axes.plot([ms, ms], [found.low, found.high], ls="", marker="_", ms=7, color=colour, zorder=2)
            fill = colour if k in best else "none"
            marker = MARKERS[list(colours).index(variant.name) % len(MARKERS)]
            axes.plot(ms, value, marker=marker, ms=8, mfc=fill, mec=colour, mew=1.6, ls="", zorder=3)
        times, values = [ms for ms, _ in points], [value for _, value in points]
        for ms in dense:
            axes.axvline(ms, color=colours[reference], lw=1.2, ls=":", zorder=0)
            times.append(ms)
        room = 0.18 * (max(times) - min(times)) or 0.1 * max(times)
        axes.set_xlim(max(0, min(times) - room), max(times) + room)
        if min(values) >= 0 and about["better"] == "lower":
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.xaxis.set_major_formatter(lambda x, _: milliseconds(x) if x > 0 else "0")
        axes.set_xlabel(f"median of {_short(group)} on {_short(usual)} (faster is to the left)", parse_math=False)
        axes.set_ylabel(f"{_short(about['title'])} ({about['better']} is better)", parse_math=False)
        axes.grid(alpha=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        names = [f"{v.name}, {row.backend}" if row.backend != usual else v.name for v, row in shown]
        ends = [(variant.metrics[metric].low, variant.metrics[metric].high) for variant, _ in shown]
        spans = [
            (ms, min(value, low or value), max(value, high or value))
            for (ms, value), (low, high) in zip(points, ends, strict=True)
        ]
        _name_points(figure, axes, names, points, spans, [(ms, reference) for ms in dense])
        return _svg(figure, salt)


def _name_points(
    figure: Any,
    axes: Any,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    spans: Sequence[tuple[float, float, float]],
    lines: Sequence[tuple[float, str]],
) -> None:
    """Writes each name where it covers no other name, point or interval (`spans`), as far as there is such a place, and
    the names of vertical `lines` at their top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # so that the axes are where they will be
    renderer = canvas.get_renderer()
    place = axes.transData.transform
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in place(points)]
    for ms, low, high in spans:
        (x, bottom), (_, top) = place([(ms, low), (ms, high)])
        taken.append(Bbox.from_extents(x - 3, bottom, x + 3, top + 1))
    for ms, name in lines:
        text = axes.annotate(
            _short(name), (ms, 1), xycoords=("data", "axes fraction"), xytext=(5, -3), textcoords="offset points",
            va="top", parse_math=False, color="#000000", alpha=0.75,
        )  # fmt: skip
        taken.append(text.get_window_extent(renderer))
    frame = axes.get_window_extent(renderer)
    for name, point in zip(names, points, strict=True):
        text = axes.annotate("", point, (0, 0), textcoords="offset points", parse_math=False, color="#000000")
        text.set_text(_short(name))

        def crowding(where: tuple[int, int, str, str], text: Any = text) -> float:
            dx, dy, side, level = where
            text.set(position=(dx, dy), ha=side, va=level)
            box = text.get_window_extent(renderer)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            return 9 * outside + sum(box.overlaps(other) for other in taken)

        crowding(min(PLACES, key=crowding))  # leaves it there
        taken.append(text.get_window_extent(renderer))


def error_plot(variants: Sequence[Variant], colours: Mapping[str, str]) -> str:
    """Relative output error of each layer in forward order, a line a variant, empty when none has layers."""
    from matplotlib.figure import Figure

    order = _forward_order(variants)
    if not order:
        return ""
    position = {name: i for i, name in enumerate(order)}
    with _style("errors"):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        axes, lines = figure.add_subplot(), {}
        for variant in variants:
            points = sorted((position[layer.name], layer.error) for layer in variant.layers)
            if points:
                marker = "o" if len(points) < len(order) / 2 else ""
                (lines[variant.name],) = axes.plot(
                    *zip(*points, strict=True), color=colours[variant.name], marker=marker, ms=3, lw=1.4
                )
        groups = groupby(enumerate(order), lambda entry: _block(entry[1]))
        blocks = [(block, next(group)[0]) for found, group in groups for block in (found,) if block]
        step = -(-len(blocks) // TICKS) or 1
        axes.set_xticks(
            [start for _, start in blocks[::step]], [f"block {block[1]}" for block, _ in blocks[::step]], ha="left"
        )
        axes.set(ylabel="relative output error", xlim=(-1, len(order)))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        legend = axes.legend(lines.values(), [f"{k}" for k in range(len(lines))], frameon=False, ncols=3, fontsize=9)
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=_short(name), parse_math=False)  # afterwards: labels with _ in front would be left out
        return _svg(figure, "errors")


def _forward_order(variants: Sequence[Variant]) -> list[str]:
    """All layers, in the order of the variant that has most of them; what only others have goes beside its block."""
    order: list[str] = []
    for variant in sorted(variants, key=lambda v: -len(v.layers)):
        for layer in variant.layers:
            if layer.name not in order:
                mates = [i for i, name in enumerate(order) if _block(name) == _block(layer.name)]
                order.insert(mates[-1] + 1 if mates else len(order), layer.name)
    return order


def _block(name: str) -> tuple[str, str] | None:
    """The list and the number of the block that a layer is in: transformer_blocks, 3."""
    found = re.match(r"(.*?)\.(\d+)(\.|$)", name)
    return (found[1], found[2]) if found else None


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _style(salt: str) -> Any:
    import matplotlib as mpl

    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"obsdiff {salt}", "font.family": "sans-serif"})


def _svg(figure: Any, salt: str) -> str:
    """The figure as an element whose size is the page's affair, whose black is the page's ink, and whose ids are its
    own. Only inside of tags: a name that looks like any of it stays as it is."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r'\1role="img"', text, count=1)

    def own(tag: re.Match[str]) -> str:
        found = tag[0].replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
        return re.sub(r'(\bid="|\burl\(#|href="#)', rf"\g<1>{salt}-", found)

    return re.sub(r"<[a-zA-Z][^<>]*>", own, text)
