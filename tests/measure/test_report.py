"""The report: one page that needs nothing else, says what it was given, and lets no prompt become markup."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from obsdiff.measure.report import (
    Latency,
    Layer,
    Report,
    Variant,
    data_uri,
    error_plot,
    human,
    key_figures,
    render,
    write,
)

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "formaction", "background", "style"}
EVIL = '<script>alert("&amp;")</script><img src=x onerror=alert(1)>\'"`{{ 7 * 7 }}'


class Page(HTMLParser):
    """Elements with their attributes, and a check that what is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice on {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def make_variant(name: str, factor: float = 1.0, **changes: Any) -> Variant:
    timing = Latency("onnxruntime", 20 * factor, 25 * factor, 2 * factor, 50 / factor)
    layers = [
        Layer(f"transformer_blocks.{block}.{part}", 0.1 * factor, 0.5)
        for block in (0, 10, 2)
        for part in ("attn.to_q", "ff.net.2")
    ]
    values: dict[str, Any] = {
        "note": f"obsdiff prune fashion {name}",
        "images": [Image.new("RGB", (4, 4), (int(50 * factor), k, 0)) for k in range(2)],
        "parameters": 4_683_552,
        "nonzero": int(4_000_000 * factor),
        "macs": int(9e7 * factor),
        "bytes": int(1.8e7 * factor),
        "quality": {"latent_error": 0.1 * factor, "item_accuracy": 0.9},
        "latency": {"batch 1": timing, "batch 32": timing},
        "layers": layers,
    }
    return Variant(name=name, **values | changes)


@pytest.fixture
def report() -> Report:
    return Report(
        title="Pruned three ways",
        summary="What it draws, what it costs.",
        prompts=["a red ankle boot", "teal trousers"],
        seed=1000,
        variants=[make_variant("dense", layers=[]), make_variant("2:4", 0.9), make_variant("structured", 0.5)],
        environment={"processor": "a fast one", "torch": "2.9"},
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
                assert value.startswith("data:image/png;base64,")
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
    styles = "".join(page.text["style"])
    assert not re.search(r"@import|url\((?!#)", styles)
    assert not {"link", "iframe", "object", "embed", "base", "audio", "video"} & {tag for tag, _ in page.found}
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket", "".join(page.text["script"]))


def test_every_variant_shows_every_prompt(report: Report) -> None:
    pictures = Page(render(report)).all("img")
    assert len(pictures) == 6
    wanted = [(prompt, variant) for prompt in report.prompts for variant in report.variants]
    for k, (attributes, (prompt, variant)) in enumerate(zip(pictures, wanted, strict=True)):
        assert attributes["alt"] == f"{prompt}, drawn by {variant.name}"
        data = base64.b64decode(str(attributes["src"]).removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == variant.images[k // 3].tobytes()


def test_the_page_says_the_numbers(report: Report) -> None:
    text = " ".join("".join(Page(render(report)).text[tag]) for tag in ("td", "span", "b", "dd", "li", "pre", "p"))
    for wanted in ("4.68 M", "45 M", "20 ms", "10 ms", "0.050", "0.90", "2.00 × as fast", "0.50 × of dense"):
        assert wanted in text
    assert "a fast one" in text
    assert "One thing to know." in text
    assert "Seeds 1000 to 1001" in text
    assert "echo <done>" in text


def test_nothing_that_is_given_becomes_markup(report: Report) -> None:
    evil = replace(
        report,
        title=EVIL,
        summary=EVIL,
        prompts=[EVIL, "b"],
        variants=[make_variant("dense"), make_variant(EVIL, 0.5, note=EVIL)],
        environment={EVIL: EVIL},
        commands=[(EVIL, EVIL)],
        notes=[EVIL],
    )
    page = Page(render(evil))
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == 4
    assert not any("onerror" in attributes for _, attributes in page.found)
    assert page.all("img")[0]["alt"] == f"{EVIL}, drawn by dense"
    assert EVIL in "".join(page.text["pre"])
    assert EVIL in "".join(page.text["li"])


def test_the_plot_has_a_line_a_variant(report: Report) -> None:
    plot = error_plot(report.variants)
    Page(plot)
    lines = re.findall(r'<g id="line2d_\d+">\s*<path d="[^"]*"[^>]*style="fill: none; stroke: (#\w+)', plot)
    coloured = [colour for colour in lines if colour in ("#0072b2", "#d55e00")]
    assert {colour: coloured.count(colour) for colour in coloured} == {"#0072b2": 2, "#d55e00": 2}  # line and legend
    labels = re.findall(r"<text [^>]*>([^<]*)</text>", plot)
    assert [label for label in labels if label in ("dense", "2:4", "structured")] == ["2:4", "structured"]
    assert [label for label in labels if label.startswith("block")] == ["block 0", "block 2", "block 10"]


@pytest.mark.parametrize("name", ["_hidden", "a $x$ b", "$\\frac$", "100 %", "<b>", "größe"])
def test_names_are_no_markup_for_the_plot_either(name: str) -> None:
    plot = error_plot([make_variant(name)])
    assert name in "".join(Page(plot).text["text"])


def test_the_page_works_with_less(report: Report) -> None:
    dense, *others = report.variants
    bare = [replace(variant, layers=[], latency={}, quality={}) for variant in report.variants]
    assert error_plot(bare) == ""
    text = render(replace(report, variants=bare))
    Page(text)
    assert "Error per layer" not in text
    assert "as fast" not in text
    Page(render(replace(report, variants=[dense])))
    Page(render(replace(report, variants=[dense, replace(others[0], latency={}, quality={}, layers=[])])))
    Page(render(replace(report, prompts=[], variants=[replace(variant, images=[]) for variant in report.variants])))
    nan = replace(dense, quality={"latent_error": 0.0, "item_accuracy": float("nan")})
    assert "width: nan" not in render(replace(report, variants=[nan]))


def test_a_missing_picture_is_an_error(report: Report) -> None:
    with pytest.raises(ValueError, match="one picture a prompt"):
        render(replace(report, prompts=["a", "b", "c"]))


def test_the_best_of_the_pruned_are_the_key_figures(report: Report) -> None:
    assert key_figures(report.variants) == [
        ("0.050", "smallest latent error of the pruned: structured"),
        ("0.50 ×", "the MACs of dense: structured"),
        ("0.50 ×", "the nonzero parameters of dense: structured"),
        ("2.00 ×", "as fast as dense at batch 32: structured"),
    ]
    assert key_figures(report.variants[:1]) == []


def test_the_same_report_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    write(report, tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()
    write(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    with pytest.raises(ValueError, match="one picture a prompt"):
        write(replace(report, prompts=[]), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (4683552, "4.68 M"), (2.5e9, "2.5 G"), (-1500, "-1.5 k")],
)
def test_numbers_for_people(number: float, text: str) -> None:
    assert human(number) == text
    assert human(number, "B").rstrip("B").rstrip() == text


def test_pictures_become_data(tmp_path: Path) -> None:
    assert data_uri(Image.new("RGB", (2, 2))).startswith("data:image/png;base64,iVBOR")
