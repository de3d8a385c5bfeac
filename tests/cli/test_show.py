"""What commands print: progress, tables, numbers and errors, on a terminal and without one."""

import json
import math
import os
import pty
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from cli import call
from obsdiff.cli.show import ShownProgress, fail, human, print_json, print_table

WORK = """
from obsdiff.cli.show import ShownProgress
progress = ShownProgress()
with progress.task("loading the model", 4):
    for k in range(4):
        progress.advance(1, f"package {k}: solving [red]{k}[/red]")
    progress.message("half way")
print("done")
"""


def on_terminal(*arguments: str, columns: int = 40) -> str:
    """What a process shows on a terminal of that width."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, *arguments], stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    shown = b""
    while True:
        try:
            chunk = os.read(outer, 4096)
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(outer)
    assert process.wait() == 0, shown
    return shown.decode()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def work(progress: ShownProgress) -> None:
    with progress.task("loading", 6):
        for package in (1, 2):
            progress.advance(1, f"package {package}/2: calibrating")
            progress.advance(1, f"package {package}/2: calibrating")
            for block in range(3):
                progress.advance(1, f"package {package}/2: solving transformer_blocks.{block}.ff, error 0.{block}")


def test_without_a_terminal_each_step_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    work(ShownProgress())
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "loading",
        "package 1/2: calibrating",
        "package 1/2: solving",
        "package 2/2: calibrating",
        "package 2/2: solving",
    ]
    assert shown.out == ""


def test_the_count_of_a_step_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ShownProgress()
    for step in (1, 15, 30):
        progress.advance(0, f"building: optimizing graph ({step} of 30)")
    progress.advance(0, "building: timing (again)")
    assert capsys.readouterr().err.splitlines() == ["building: optimizing graph", "building: timing (again)"]


def test_a_task_within_a_task_is_a_step_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ShownProgress()
    with progress.task("demo", 2), progress.task("prune", 3):
        progress.advance(1, "solving")
    with progress.task("again", 1):
        progress.message("[done] :ok:")
    assert capsys.readouterr().err.splitlines() == ["demo", "prune", "solving", "again", "[done] :ok:"]


def test_progress_on_a_terminal_shows_notes_verbatim_and_clears_its_bar() -> None:
    shown = on_terminal("-c", WORK, columns=100)
    text = without_colours(shown)
    assert "solving [red]3[/red]" in text
    assert "4/4" in text
    assert "half way" in text
    assert text.rstrip().endswith("done")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is back"


@pytest.mark.parametrize("columns", [30, 60])
def test_a_table_fits_a_narrow_terminal_and_loses_nothing(columns: int) -> None:
    text = without_colours(on_terminal("-m", "obsdiff", "models", columns=columns))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    assert Counter("".join(text.split())) == Counter("".join(call("models").out.split()))


def test_a_table_that_is_piped_keeps_its_lines_whole(capsys: pytest.CaptureFixture[str]) -> None:
    name = "transformer_blocks.0." + "x" * 120
    print_table(("layer", "error"), [(name, "0.1"), ("[bold]b[/] :100:", "0.25")], title="layers")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["layers"],
        ["layer", "error"],
        [name, "0.1"],
        ["[bold]b[/]", ":100:", "0.25"],
    ]
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1, "numbers end in the same column"


def test_a_table_may_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [])
    assert capsys.readouterr().out.split() == ["a", "b"]


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1000, "", "1 k"),
        (4_683_552, "", "4.68 M"),
        (18_700_000, "B", "18.7 MB"),
        (2.5e9, "B", "2.5 GB"),
        (3e12, "", "3 T"),
        (12, "B", "12 B"),
        (-4_000, "", "-4 k"),
    ],
)
def test_numbers_for_people(number: float, unit: str, text: str) -> None:
    assert human(number, unit) == text


def test_json_has_null_where_it_has_no_word_for_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": float("nan"), "b": [math.inf, -math.inf, 1.5], "c": ({"d": math.nan},), "e": "botté", "f": None}
    print_json(value)
    text = capsys.readouterr().out

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": None, "b": [None, None, 1.5], "c": [{"d": None}], "e": "botté", "f": None}
    assert "botté" in text


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain", "plain"),
        ("[red]not markup[/red] \\", "[red]not markup[/red] \\"),
        ("--size 64:100:128 :heart:", "--size 64:100:128 :heart:"),
        ("two\nlines\t and  spaces", "two lines and spaces"),
        ("long " * 100, ("long " * 100).strip()),
    ],
    ids=["plain", "markup", "emoji", "lines", "long"],
)
def test_an_error_is_one_line_and_verbatim(capsys: pytest.CaptureFixture[str], message: str, shown: str) -> None:
    with pytest.raises(SystemExit) as ended:
        fail(message, 7)
    assert ended.value.code == 7
    assert capsys.readouterr().err == f"error: {shown}\n"


@pytest.mark.parametrize("read", [0, 1])
def test_a_reader_that_goes_away_is_no_traceback(read: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "obsdiff", "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.read(read)
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read().decode()
    assert process.wait() in (0, 1)
    assert said == ""


def test_the_models_are_listed_as_a_table_and_as_json() -> None:
    from obsdiff.models import FAMILIES

    table, document = call("models"), call("models", "--json")
    assert {row["denoiser"] for row in document.json} == set(FAMILIES)
    assert all(row["pipelines"] and "onnx" in row["formats"] for row in document.json)
    assert all(name in table.out for name in FAMILIES)
    assert (table.code, document.code, table.err, document.err) == (0, 0, "", "")


def test_progress_is_silent_unless_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from obsdiff.progress import Progress

    work_silently: Callable[[Any], None] = work
    work_silently(Progress())
    assert capsys.readouterr() == ("", "")
