"""A report gathered from disk: what comes from where, and what cannot stand on one page."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import written
from page import Page

from obsdiff.errors import InputError
from obsdiff.measure.collect import collect
from obsdiff.measure.report import render


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that can be given: pruned and its bundle, half alone, a dense bundle, a bench and an eval."""
    monkeypatch.chdir(tmp_path)
    written.checkpoint(tmp_path / "pruned", errors=(0.1, None, 0.3))
    written.checkpoint(tmp_path / "half", {**written.RECIPE, "pattern": "unstructured", "sparsity": 0.5})
    written.bundle(tmp_path / "bundle")
    written.receipt(tmp_path / "bundle")
    written.bundle(tmp_path / "dense", None, macs=100)
    written.bench(tmp_path / "bench.json", {"dense": 20, "bundle": 10})
    written.evaluation(tmp_path / "quality", {"pruned": 0.05, "half": 0.2})
    return tmp_path


ALL = ("half", "bundle", "bench.json", "quality", "pruned", "dense")


def test_everything_finds_its_variant(here: Path) -> None:
    report = collect(ALL)
    dense, pruned, half = report.variants
    assert (report.reference, dense.name, pruned.name, half.name) == ("dense", "dense", "pruned", "half")
    assert report.title == "2 variants of fashion"
    assert [layer.error for layer in pruned.layers] == [0.1, 0.3]
    assert (pruned.metrics["latent_mse"].value, half.metrics["latent_mse"].value) == (0.05, 0.2)
    assert [(row.group, row.median_ms, row.denoiser_ms) for row in pruned.latency] == [("batch 1", 10, 1.25)]
    assert pruned.totals
    assert (pruned.totals.macs, half.totals, half.latency) == (50, None, [])
    assert pruned.receipt
    assert pruned.receipt.summary.sparse == 1
    assert len(pruned.commands) == 2
    assert pruned.commands[1].startswith("obsdiff export pruned bundle ")
    assert dense.commands == [
        "obsdiff export fashion dense --format onnx --precision fp16 --batch 1:1:8 --size 16:32:48"
    ]
    assert "3 linears pruned, 50.0% of their weights zero." in pruned.note
    assert "onnx differs from PyTorch by 3.0e-07" in pruned.note
    assert (report.prompts, report.seeds) == (list(written.PROMPTS), [5, 6, 7])
    assert [variant.images[2].getpixel((0, 0)) for variant in report.variants] == [
        (0, 120, 0),
        (40, 120, 0),
        (80, 120, 0),
    ]
    assert [(gate.path, gate.met) for gate in report.gates] == [("pruned", True), ("half", True)]
    assert report.skipped == {"fid": "3 pictures are too few"}
    assert report.environments == [("bench.json, quality/eval.json", {"processor": "a fast one"})]
    assert [line.split()[:3] for _, line in report.commands] == [
        ["obsdiff", "bench", "dense"],
        ["obsdiff", "eval", "pruned"],
    ]


def test_the_order_of_the_paths_does_not_matter_to_what_is_found(here: Path) -> None:
    first, second = collect(ALL), collect(["quality/eval.json", *reversed(ALL)])
    assert {variant.name: variant for variant in first.variants} == {v.name: v for v in second.variants}


def test_every_part_alone_makes_a_page(here: Path) -> None:
    headings = {path: Page(render(collect([path]))).words("h2") for path in ALL}
    assert headings["half"].startswith("Error per layer How each was made")
    assert headings["bundle"].startswith("Size Does the sparsity run? How each was made")
    assert headings["bench.json"].startswith("Latency and size Do it again")
    assert headings["quality"].startswith("Drawn with the same prompts and seeds Quality Do it again")
    assert collect(["pruned"]).reference is None
    assert collect(["pruned"]).title == "pruned, made of fashion"
    assert collect(["bench.json"]).title == "bundle, made of dense"


def test_prompts_are_shown_at_equal_distances(here: Path) -> None:
    report = collect(["quality"], pictures=2)
    assert (report.prompts, report.seeds) == ([written.PROMPTS[0], written.PROMPTS[1]], [5, 6])
    assert report.pictures == "2 of 3 pictures, taken at equal distances."
    assert collect(["quality"], pictures=3).pictures == ""
    images = collect(["quality"], pictures=1).variants[1].images
    assert [image.getpixel((0, 0)) for image in images] == [(40, 0, 0)]


def test_a_variant_without_pictures_is_left_out_of_the_grid(here: Path) -> None:
    written.evaluation(here / "quality", {"pruned": 0.05, "half": 0.2})
    value = written.read_json(here / "quality" / "eval.json")
    value["results"][0]["images"] = []
    value["results"][1]["images"] = value["results"][1]["images"][:2]
    written.write(here / "quality" / "eval.json", value)
    report = collect(["quality"])
    assert [len(variant.images) for variant in report.variants] == [2, 0, 2]
    assert len(Page(render(report)).pictures()) == 4
    for side in (value["reference"], *value["results"]):
        side["images"] = []
    written.write(here / "quality" / "eval.json", value)
    assert Page(render(collect(["quality"]))).pictures() == []


def test_two_benches_of_one_batch_size_stay_apart(here: Path) -> None:
    written.bench(here / "other.json", {"dense": 40, "bundle": 30})
    written.bench(here / "many.json", {"dense": 99}, batch_size=8)
    report = collect(["bench.json", "other.json", "many.json"])
    assert [row.group for row in report.variants[0].latency] == [
        "batch 1, bench.json",
        "batch 1, other.json",
        "batch 8",
    ]


def test_evals_of_the_same_prompts_are_put_together(here: Path) -> None:
    more = written.evaluation(here / "more", {"third": 0.3}) / "eval.json"
    value = written.read_json(more)
    written.write(more, {**value, "settings": {**value["settings"], "batch_size": 3, "device": "cuda"}})
    report = collect(["quality", "more"])
    assert [variant.name for variant in report.variants] == ["dense", "pruned", "half", "third"]
    assert all(len(variant.images) == 3 for variant in report.variants)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"prompts": ["x", "y", "z"], "seeds": [5, 6, 7]}}, "cannot be compared: they differ in their"),
        ({"reference": "other"}, "cannot be compared: they differ in their"),
        ({}, "quality/eval.json and more/eval.json both have latent_mse of half"),
    ],
)
def test_evals_that_cannot_be_compared_are_refused(here: Path, changes: dict[str, Any], words: str) -> None:
    written.evaluation(here / "more", {"half": 0.3}, **changes)
    with pytest.raises(InputError, match=words):
        collect(["quality", "more"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone", "gone does not exist: give pruned checkpoints"),
        ("empty", "empty has neither of their files: give pruned checkpoints"),
        ("fashion", "a dense model comes in through them"),
    ],
)
def test_a_path_that_is_none_of_them_is_refused(here: Path, path: str, words: str) -> None:
    (here / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        collect(["pruned", path])
    with pytest.raises(InputError, match="at least one path"):
        collect([])


def test_what_is_damaged_is_named(here: Path) -> None:
    shutil.rmtree(here / "quality" / "images" / "half")
    with pytest.raises(InputError, match=r"quality/eval\.json: the picture quality/images/half/00000\.png is missing"):
        collect(["quality"])
    for path in ("pruned/obsdiff.json", "bundle/manifest.json", "bundle/receipt.json", "bench.json"):
        before = Path(path).read_bytes()
        Path(path).write_bytes(before[:-20])
        with pytest.raises(InputError, match=path.replace(".", r"\.")):
            collect(["pruned", "bundle", "bench.json"])
        Path(path).write_bytes(before)


def test_hostile_names_reach_the_page_as_text(here: Path) -> None:
    evil = "<script>alert(1)</script>"
    value = written.read_json(written.bench(here / "evil.json", {"dense": 2, f"x/{evil[:8]}": 1, "c": 3}))
    value["results"][2]["path"] = "a\u0000\ud800b"
    written.write(here / "evil.json", value)
    value = written.read_json(here / "quality" / "eval.json")
    value["settings"]["prompts"][0] = evil
    value["results"][0]["path"] = f"y/{evil[:8]}"
    written.write(here / "quality" / "eval.json", value)
    page = Page(render(collect(["evil.json", "quality"])))
    assert len(page.all("script")) == 1
    assert page.pictures()[0]["alt"] == f"{evil}, drawn by dense"
    assert evil in page.words("div")
    assert "a\ufffd\ufffdb" in page.words("th")
