"""The demo: the whole path on a small model, made once and used again."""

import json
import re
from pathlib import Path

import pytest

from obsdiff import demo
from obsdiff.checkpoint import read_info
from obsdiff.demo import Plan
from obsdiff.errors import InputError
from obsdiff.export.bundle import open_bundle
from obsdiff.files import folder_files
from obsdiff.measure import fashion
from obsdiff.progress import Progress
from obsdiff.prune.recipe import read_prompts

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
    page = (out / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 2 * len(PLANS)
    for name in ("dense", "50 % magnitude", "structured &lt;30 %&gt;"):
        assert f"</span>{name}</th>" in page
    assert all(prompt in page for prompt in demo.SHOWN)
    assert "--solver magnitude" in page
    assert "batch 16" in page
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


def test_unseen_prompts_are_in_no_calibration_and_name_both() -> None:
    prompts = demo.unseen_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    assert not set(prompts) & set(read_prompts(demo.DATA / "prompts" / "fashion.txt"))
    parsed = [fashion.parse_caption(prompt) for prompt in prompts]
    assert all(None not in pair for pair in parsed)
    assert len({item for item, _ in parsed}) == len({colour for _, colour in parsed}) == 10
    assert len(demo.unseen_prompts(5)) == 5
