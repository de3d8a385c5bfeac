"""The demo: the whole path on a small model, made once and used again."""

import json
from pathlib import Path

import pytest
from page import Page

from obsdiff import demo
from obsdiff.checkpoint import read_info
from obsdiff.demo import Plan
from obsdiff.errors import InputError
from obsdiff.export.bundle import open_bundle
from obsdiff.files import folder_files
from obsdiff.progress import Progress

PLANS = (
    Plan("dense", "dense", None, True),
    Plan("half", "50 % magnitude", {"pattern": "unstructured", "sparsity": 0.5, "solver": "magnitude"}),
    Plan("structured", "structured <30 %>", {"pattern": "structured", "sparsity": 0.3, "blocks": ":"}, True),
)


class Listening(Progress):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture
def small(one_block_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a model of one block, three variants, two prompts to show and little calibration."""
    monkeypatch.setattr(demo, "MODEL", str(one_block_sd3))
    monkeypatch.setattr(demo, "PLANS", PLANS)
    monkeypatch.setattr(demo, "CALIBRATION", {"num_prompts": 2, "steps": 1, "batch_size": 2, "device": "cpu"})
    monkeypatch.setattr(demo, "BATCHES", {1: 1, 16: 1})
    monkeypatch.setattr(demo, "SHOWN", demo.SHOWN[:2])


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_demo_makes_a_report_and_uses_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first, again = Listening(), Listening()
    assert demo.demo(out, first) == out / "report.html"
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.pictures()) == 2 * len(PLANS)
    assert {plan.name for plan in PLANS} <= set(page.text["th"])
    assert all(prompt in page.text["option"] for prompt in demo.SHOWN)
    assert "--solver magnitude" in page.words("pre", "span")
    assert "Latent error, batch 16" in page.text["option"]
    assert len(page.all("svg")) == 3 * 2 + 1  # each metric at each batch, and the errors
    assert "24 pictures" in page.words("small")
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"half", "structured"}
    assert {path.name for path in (out / "bundles").iterdir()} == {"dense", "structured"}
    for path in (out / "bundles").iterdir():
        assert open_bundle(path).axes["batch"].max == 32
    info = read_info(out / "checkpoints" / "structured")
    assert info is not None
    assert info.recipe["steps"] == 1
    assert [text for text in first.heard if text.startswith(("pruning", "exporting"))] == [
        "pruning 50 % magnitude",
        "pruning structured <30 %>",
        "exporting dense",
        "exporting structured <30 %>",
    ]

    times = {name: path.stat().st_mtime_ns for name, path in folder_files(out).items() if name != "report.html"}
    (out / "report.html").unlink()
    assert demo.demo(str(out), again) == out / "report.html"
    assert {name: path.stat().st_mtime_ns for name, path in folder_files(out).items() if name != "report.html"} == times
    assert not [text for text in again.heard if text.startswith("exporting")]


@pytest.mark.usefixtures("small")
def test_the_demo_keeps_out_of_other_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="has other things in it: choose another name"):
        demo.demo(tmp_path)
    with pytest.raises(InputError, match="is a file: choose another name"):
        demo.demo(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_plans_cover_what_the_report_compares() -> None:
    assert demo.PLANS[0].options is None
    assert len({plan.folder for plan in demo.PLANS}) == len({plan.name for plan in demo.PLANS}) == len(demo.PLANS)
    pruned = [plan.options for plan in demo.PLANS if plan.options]
    assert {options["pattern"] for options in pruned} == {"2:4", "unstructured", "structured"}
    magnitude = {options["pattern"] for options in pruned if options.get("solver") == "magnitude"}
    assert magnitude == {"2:4", "unstructured"}
    assert json.dumps(demo.CALIBRATION)
