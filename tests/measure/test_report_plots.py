"""The plots: who is on the frontier, a line for each variant, and names that stay names."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page import Page

from obsdiff.measure.report import PALETTE, Latency, Layer, Report, Variant
from obsdiff.measure.report_plots import error_plot, frontier, pareto_plots
from obsdiff.measure.results import Metric

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12)


def beats(one: tuple[float, float], other: tuple[float, float], sign: int) -> bool:
    """Not worse in both, and better in one; `sign` is 1 where a lower quality is better."""
    a, b = (one[0], sign * one[1]), (other[0], sign * other[1])
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(POINTS, st.sampled_from(["lower", "higher"]))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[float, float]], better: str) -> None:
    sign = 1 if better == "lower" else -1
    found = frontier(points, better)
    assert found
    assert [points[i] for i in found] == sorted({points[i] for i in found})
    for i, point in enumerate(points):
        beaten = any(beats(other, point, sign) for other in points)
        assert (point in [points[j] for j in found]) != beaten, i


def colours(*variants: Variant) -> dict[str, str]:
    return {variant.name: PALETTE[k] for k, variant in enumerate(variants)}


def layered(name: str, *layers: str) -> Variant:
    return Variant(name, layers=[Layer(layer, 0.1, 0.5) for layer in layers])


def placed(name: str, ms: float, value: float | None, better: str = "lower", backend: str = "torch") -> Variant:
    metrics = {"ssim": Metric(value=value, low=0.1, high=0.4, images=9, better=better)}
    return Variant(name, metrics=metrics, latency=[Latency("batch 1", backend, ms, ms, 1)])


def labels(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_a_line_a_variant_over_the_blocks_in_forward_order() -> None:
    names = [f"blocks.{block}.{part}" for block in (0, 2, 10) for part in ("to_q", "net.2")]
    dense, two, few = layered("dense"), layered("2:4", *names), layered("few", names[2], "blocks.0.extra")
    plot = error_plot([dense, few, two], colours(dense, few, two))
    Page(plot)
    lines = re.findall(r'<g id="errors-line2d_\d+">\s*<path d="[^"]*"[^>]*style="fill: none; stroke: (#\w+)', plot)
    coloured = [colour for colour in lines if colour in PALETTE]
    assert sorted(coloured) == sorted([PALETTE[1], PALETTE[2]] * 2)  # line and legend
    assert [label for label in labels(plot) if label in ("dense", "2:4", "few")] == ["few", "2:4"]
    assert [label for label in labels(plot) if label.startswith("block")] == ["block 0", "block 2", "block 10"]


def test_of_many_blocks_some_are_named() -> None:
    deep = layered("deep", *(f"{kind}.{block}.to_q" for kind in ("double", "single") for block in range(40)))
    ticks = [label for label in labels(error_plot([deep], colours(deep))) if label.startswith("block")]
    assert len(ticks) <= 16
    assert ticks[:2] == ["block 0", "block 5"]
    flat = layered("flat", "proj_in", "proj_out")
    assert not [label for label in labels(error_plot([flat], colours(flat))) if label.startswith("block")]
    assert error_plot([Variant("none")], {"none": PALETTE[0]}) == ""


@pytest.mark.parametrize(
    "name", ["_hidden", "a $x$ b", "$\\frac$", "100 %", "<b>", "größe", '#000000 id="x" url(#y) <text ', "a\nb"]
)
def test_names_are_no_markup_for_the_plots(name: str) -> None:
    variant = layered(name, "blocks.0.to_q")
    flat = " ".join(name.split())
    assert flat in Page(error_plot([variant], colours(variant))).words("text")
    found = [placed(name, 10, 0.2), placed("other", 20, 0.1)]
    (plot,) = pareto_plots(Report(title="", summary="", variants=found), colours(*found))
    assert flat in Page(plot["svg"]).words("text")


def test_quality_stands_against_latency_where_both_are_known() -> None:
    dense = Variant("dense", latency=[Latency("batch 1", "torch", 30, 30, 1), Latency("batch 8", "torch", 99, 99, 1)])
    found = [dense, placed("a", 10, 0.2, "higher"), placed("b", 20, 0.3, "higher"), placed("c", 25, 0.1, "higher")]
    (plot,) = pareto_plots(Report(title="", summary="", variants=found, reference="dense"), colours(*found))
    assert plot["label"] == "SSIM, batch 1"
    text = labels(plot["svg"])
    assert {"dense", "a", "b", "c", "SSIM (higher is better)"} <= set(text)
    filled = set(re.findall(r"fill: (#\w{6}); stroke: #\w{6}; stroke-width: 1.6", plot["svg"]))
    assert filled == {PALETTE[1], PALETTE[2]}  # c is slower than b and worse
    alone = Report(title="", summary="", variants=[found[1]], reference=None)
    assert pareto_plots(alone, colours(found[1])) == []


def test_backends_are_named_where_they_differ() -> None:
    found = [placed("a", 10, 0.2, backend="tensorrt"), placed("b", 20, 0.1), placed("c", 30, 0.1)]
    (plot,) = pareto_plots(Report(title="", summary="", variants=found), colours(*found))
    wanted = {"a, tensorrt", "b", "c", "median of batch 1 on torch (faster is to the left)"}
    assert wanted <= set(labels(plot["svg"]))


def test_variants_at_one_place_still_have_a_plot() -> None:
    found = [placed(f"variant {k}", 10, 0.2) for k in range(7)]
    (plot,) = pareto_plots(Report(title="", summary="", variants=found), colours(*found))
    assert {variant.name for variant in found} <= set(labels(plot["svg"]))
