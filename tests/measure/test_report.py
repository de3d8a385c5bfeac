"""The report: one page that needs nothing else, says what it was given, and lets no prompt become markup."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page import Page
from PIL import Image
from written import make_receipt

from obsdiff.export.schema import Totals
from obsdiff.measure.report import (
    Latency,
    Layer,
    Report,
    Variant,
    data_uri,
    figure,
    human,
    key_figures,
    render,
    speed_ups,
    write,
)
from obsdiff.measure.results import Gate, Metric

LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "formaction", "background", "style"}
EVIL = '<script>alert("&amp;")</script><img src=x onerror=alert(1)>\'"`{{ 7 * 7 }}]]>-->'
DENSE = Totals(parameters=4_683_552, nonzero=4_000_000, macs=90_000_000, bytes=18_000_000)


def metric(value: float | None, better: Any = "lower", spread: float = 0.01) -> Metric:
    return Metric(value=value, low=(value or 0) - spread, high=(value or 0) + spread, images=32, better=better)


def make_variant(name: str, factor: float = 1.0, **changes: Any) -> Variant:
    latency = [
        Latency(group, "onnxruntime", 20 * factor, 25 * factor, 50 / factor, 2 * factor, 500_000_000)
        for group in ("batch 1", "batch 32")
    ]
    values: dict[str, Any] = {
        "note": f"Made of fashion: {name}.",
        "images": [Image.new("RGB", (4, 4), (int(50 * factor), k, 0)) for k in range(2)],
        "metrics": {"latent_error": metric(0.1 * factor), "item_accuracy": metric(0.9, "higher")},
        "latency": latency,
        "layers": [Layer(f"blocks.{block}.to_q", 0.1 * factor, 0.5) for block in range(3)],
        "totals": DENSE.model_copy(update={"macs": int(9e7 * factor), "nonzero": int(4e6 * factor)}),
        "dense": DENSE,
        "commands": [f"obsdiff prune fashion {name}"],
    }
    return Variant(name=name, **values | changes)


@pytest.fixture
def report() -> Report:
    return Report(
        title="Pruned three ways",
        summary="What it draws, what it costs.",
        variants=[
            make_variant("dense", layers=[], metrics={"item_accuracy": metric(0.95, "higher")}),
            make_variant("2:4", 0.9, receipt=make_receipt()),
            make_variant("structured", 0.5),
        ],
        reference="dense",
        prompts=["a red ankle boot", "teal trousers"],
        seeds=[1000, 1001],
        gates=[Gate(metric="item_accuracy", path="2:4", limit=0.8, value=0.9, met=True)],
        skipped={"fid": "too few pictures"},
        environments=[("bench.json", {"processor": "a fast one", "torch": "2.9"})],
        commands=[("Prune", "obsdiff prune MODEL pruned"), ("Run", 'obsdiff run bundle "a boot" && echo <done>')],
        notes=["One thing to know."],
    )


def test_the_page_is_well_formed_and_needs_nothing_else(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert text.startswith("<!doctype html>")
    for tag, attributes in page.found:
        for name in LOADS & set(attributes):
            value = attributes[name] or ""
            assert "//" not in value.split("base64,")[0], (tag, name, value)
            if name in ("src", "srcset", "poster", "data"):
                assert value.startswith("data:image/png;base64,") or value == "data:,"
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", "".join(page.text["style"]))
    assert not {"link", "iframe", "object", "embed", "base", "audio", "video"} & {tag for tag, _ in page.found}
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket", "".join(page.text["script"]))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert str(policy).startswith("default-src 'none'; img-src data:;")


def test_no_id_is_there_twice_and_every_reference_leads_somewhere(report: Report) -> None:
    text = render(report)
    ids = [attributes["id"] for _, attributes in Page(text).found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_every_variant_shows_every_prompt(report: Report) -> None:
    pictures = Page(render(report)).pictures()
    wanted = [(prompt, variant) for prompt in report.prompts for variant in report.variants]
    for k, (attributes, (prompt, variant)) in enumerate(zip(pictures, wanted, strict=True)):
        assert attributes["alt"] == f"{prompt}, drawn by {variant.name}"
        assert attributes["class"] == "exact"
        data = base64.b64decode(str(attributes["src"]).removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == variant.images[k // 3].tobytes()


def test_two_pictures_are_compared_with_a_slider_that_keys_move(report: Report) -> None:
    page = Page(render(report))
    (slider,) = (entry for entry in page.all("input") if entry["type"] == "range")
    assert slider["aria-label"]
    assert "tabindex" not in slider
    radios = [entry["value"] for entry in page.all("input") if entry["type"] == "radio"]
    assert radios == ["1", "2"]
    buttons = [entry for entry in page.all("button") if "data-row" in entry]
    assert {(entry["data-row"], entry["data-column"]) for entry in buttons} == {
        (str(row), str(column)) for row in range(2) for column in range(3)
    }
    alone = replace(report, variants=report.variants[:1])
    assert not [entry for entry in Page(render(alone)).all("input") if entry["type"] == "range"]


def test_the_page_says_the_numbers(report: Report) -> None:
    text = Page(render(report)).words("td", "span", "b", "dd", "li", "p", "small", "th", "h3")
    for wanted in (
        *("4.68 M", "45 M", "20 ms", "10 ms", "0.0500", "0.900", "2.00 × as fast", "0.50 × of dense", "500 MB"),
        *("0.0400 to 0.0600, 32 pictures", "✓ met", "too few pictures", "a fast one", "bench.json"),
        *("One thing to know.", "echo <done>", "1 can run on sparse tensor cores", "64 × 32"),
    ):
        assert wanted in text, wanted


def test_nothing_that_is_given_becomes_markup(report: Report) -> None:
    plain = Page(render(report))
    evil = replace(
        report,
        title=EVIL,
        summary=EVIL,
        variants=[
            replace(report.variants[0], name=f"{EVIL} 0"),
            make_variant(
                EVIL,
                0.9,
                note=EVIL,
                commands=[EVIL],
                receipt=make_receipt(EVIL, evidence=EVIL),
                metrics={EVIL: metric(0.5)},
                latency=[Latency(EVIL, EVIL, 1, 1, 1)],
                layers=[Layer(EVIL, 0.1, 0.5)],
            ),
            make_variant(f"{EVIL} 2", 0.5),
        ],
        reference=f"{EVIL} 0",
        prompts=[EVIL, "b"],
        pictures=EVIL,
        gates=[Gate(metric=EVIL, path=EVIL, limit=None, value=None, met=False)],
        skipped={EVIL: EVIL},
        environments=[(EVIL, {EVIL: EVIL})],
        commands=[(EVIL, EVIL)],
        what_for=EVIL,
        notes=[EVIL],
    )
    page = Page(render(evil))
    assert len(page.all("script")) == len(plain.all("script")) == 1
    assert len(page.all("img")) == len(plain.all("img"))
    assert not any("onerror" in attributes for _, attributes in page.found)
    assert page.pictures()[0]["alt"] == f"{EVIL}, drawn by {EVIL} 0"
    assert EVIL in page.words("li")
    assert EVIL in page.words("dd")
    assert EVIL in page.words("td")
    assert EVIL in "".join(page.text["span"])
    assert "49" not in page.words("h1", "li", "title")


def test_a_part_that_nothing_is_known_of_is_not_there(report: Report) -> None:
    bare = [Variant(variant.name) for variant in report.variants]
    page = Page(render(Report(title="Bare", summary="", variants=bare)))
    assert page.words("h2") == ""
    assert not {"table", "figure", "svg", "select", "details", "dl", "ul"} & {tag for tag, _ in page.found}
    assert not [entry for entry in page.all("div") if "card" in str(entry.get("class"))]
    for part, heading in (
        ({"images": report.variants[0].images}, "Drawn with"),
        ({"metrics": {"ssim": metric(0.9, "higher")}}, "Quality"),
        ({"latency": report.variants[0].latency}, "Latency and size"),
        ({"totals": DENSE}, "Size"),
        ({"layers": report.variants[1].layers}, "Error per layer"),
        ({"receipt": make_receipt()}, "Does the sparsity run?"),
        ({"commands": ["obsdiff prune"]}, "How each was made"),
    ):
        variants = [bare[0], replace(bare[1], **part)]
        drawn: dict[str, Any] = {"prompts": report.prompts, "seeds": report.seeds} if "images" in part else {}
        headings = Page(render(Report(title="One", summary="", variants=variants, **drawn))).text["h2"]
        assert len(headings) == 1
        assert headings[0].startswith(heading)


def test_a_value_that_is_not_known_is_left_open(report: Report) -> None:
    variants = [report.variants[0], make_variant("x", metrics={"latent_error": metric(None), "ssim": metric(0.0)})]
    page = Page(render(replace(report, variants=variants)))
    assert not {"nan", "none"} & set(page.words("td", "span", "b", "small").lower().split())
    assert "Latent error" not in page.words("h3", "th", "option")
    assert key_figures(replace(report, variants=variants))[1] == ("0.00", "smallest SSIM of the pruned: x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": ["a"], "seeds": [1]}, "one picture a prompt"),
        ({"seeds": [1]}, "every prompt needs a seed"),
        ({"reference": "2:4"}, "the reference comes first"),
        ({"variants": [make_variant("dense"), make_variant("dense")]}, "a name of its own"),
    ],
)
def test_a_report_that_is_not_whole_is_an_error(report: Report, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(replace(report, **changes))


def test_the_best_of_the_pruned_are_the_key_figures(report: Report) -> None:
    assert key_figures(report) == [
        ("2.00 ×", "as fast as dense at batch 32: structured"),
        ("0.0500", "smallest latent error of the pruned: structured"),
        ("0.50 ×", "the MACs of dense: structured"),
        ("0.50 ×", "the nonzero parameters of dense: structured"),
        ("1 of 1", "layers that could run sparse do: 2:4"),
        ("1 of 1", "gates met"),
    ]
    assert key_figures(Report(title="", summary="", variants=report.variants[:1], reference="dense")) == []


def test_only_what_ran_on_the_same_backend_makes_a_key_figure() -> None:
    dense = make_variant("dense", latency=[Latency("batch 1", "torch", 100, 100, 10)], metrics={})
    mixed = [Latency("batch 1", "onnxruntime", 10, 10, 100), Latency("batch 1", "torch", 80, 80, 12)]
    other = make_variant("other", latency=[*mixed, Latency("batch 2", "torch", 1, 1, 1)], metrics={})
    assert speed_ups(other, dense) == {mixed[0]: 10, mixed[1]: 1.25}
    found = key_figures(Report(title="", summary="", variants=[dense, other], reference="dense"))
    assert found[0] == ("1.25 ×", "as fast as dense at batch 1: other")


def test_the_same_report_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    size = write(report, tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()
    assert len(before) == size
    write(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    with pytest.raises(ValueError, match="one picture a prompt"):
        write(replace(report, prompts=[], seeds=[]), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_text_that_no_file_can_hold_does_not_stop_the_page(report: Report, tmp_path: Path) -> None:
    write(replace(report, title="a\ud800b"), tmp_path / "report.html")
    assert "a?b" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (4683552, "4.68 M"), (2.5e9, "2.5 G"), (-1500, "-1.5 k"), (4e12, "4 T")],
)
def test_numbers_for_people(number: float, text: str) -> None:
    assert human(number) == text
    assert human(number, "B").rstrip("B").rstrip() == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.9, "0.900"), (0.001594, "0.00159"), (12, "12.0"), (100, "100"), (12345, "12345")],
)
def test_figures_line_up(value: float, text: str) -> None:
    assert figure(value) == text


def test_small_pictures_are_exact_and_large_ones_small() -> None:
    assert data_uri(Image.new("RGB", (2, 2))).startswith("data:image/png;base64,iVBOR")
    noise = Image.effect_noise((1024, 2048), 80).convert("RGB")
    kind, data = data_uri(noise).split(";base64,")
    assert kind == "data:image/webp"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 512)
    assert len(data) < 150_000
