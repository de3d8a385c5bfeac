"""obsdiff report: one page from what is on disk, and one sentence where it cannot be."""

from pathlib import Path

import pytest
import written
from page import Page

from cli import assert_sentence, call

from .conftest import Journey


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    written.bench(tmp_path / "bench.json", {"fashion": 20, "bundle": 10})
    written.evaluation(tmp_path / "quality", {"out": 0.1}, reference="fashion")
    return tmp_path


def test_a_real_checkpoint_its_bundle_and_what_was_measured_of_them(here: Path, journey: Journey) -> None:
    result = call("report", journey.checkpoint, journey.bundle, "bench.json", "quality", "--json")
    assert result.code == 0, result.err
    page = Path("report.html")
    assert result.json == {
        "report": "report.html",
        "bytes": page.stat().st_size,
        "reference": "fashion",
        "variants": ["fashion", "out"],
    }
    read = Page(page.read_text(encoding="utf-8"))
    assert read.words("h1") == "out, made of fashion"
    assert "2.00 ×" in read.words("b")
    for heading in (
        "Drawn with",
        "Quality against latency",
        "Latency and size",
        "Error per layer",
        "How each was made",
    ):
        assert heading in read.words("h2")
    commands = " ".join(read.words("pre", "span").split())
    assert "obsdiff prune fashion" in commands
    assert "--solver obs" in commands
    assert len(read.pictures()) == 6


def test_the_size_is_said_and_the_same_input_gives_the_same_bytes(here: Path) -> None:
    result = call("report", "bench.json", "quality", "--out", "pages/a.html", "--title", "Two <b>", "--pictures", 1)
    assert result.code == 0
    first = Path("pages/a.html").read_bytes()
    assert f"fashion, out, bundle: open pages/a.html in a browser ({len(first) / 1000:.3g} kB)" in result.out
    assert b"<h1>Two &lt;b&gt;</h1>" in first
    again = call("report", "bench.json", "quality", "--out", "pages/a.html", "--title", "Two <b>", "--pictures", 1)
    assert (again.code, Path("pages/a.html").read_bytes()) == (0, first)


def test_large_pictures_leave_the_page_small(here: Path) -> None:
    written.evaluation(here / "large", {"out": 0.1}, size=1024)
    assert call("report", "large").code == 0
    text = Path("report.html").read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert {str(image["src"])[:16] for image in Page(text).pictures()} == {"data:image/webp;"}


@pytest.mark.parametrize("out", ["bench.json", "quality", ".", "page", "page.pdf"])
def test_only_a_page_is_written_over(here: Path, out: str) -> None:
    before = Path("bench.json").read_bytes()
    assert_sentence(call("report", "bench.json", "--out", out), 2, f"--out {out}", "report.html")
    assert Path("bench.json").read_bytes() == before


def test_what_is_wrong_is_one_sentence_and_the_old_page_stays(here: Path) -> None:
    assert call("report", "bench.json").code == 0
    before = Path("report.html").read_bytes()
    written.write(here / "load.json", {"kind": "load"})
    (here / "cut.json").write_text('{"kind": "bench", ')
    (here / "quality" / "images" / "out" / "00001.png").unlink()
    for path, words in (
        ("load.json", "load.json is JSON of another kind"),
        ("cut.json", "cut.json cannot be read as JSON"),
        ("quality", "00001.png is missing"),
        ("nowhere", "nowhere does not exist"),
    ):
        assert_sentence(call("report", "bench.json", path), 2, words)
    assert Path("report.html").read_bytes() == before
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    assert call("report").code == 2
