"""What commands print: progress on standard error, results on standard output, errors as one sentence."""

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from obsdiff import progress as base

err = Console(stderr=True, highlight=False)


def fail(message: str, code: int) -> NoReturn:
    """Prints the sentence and exits."""
    err.print(Text.assemble(("error:", "bold red"), " ", " ".join(message.split())), soft_wrap=True)
    sys.exit(code)


def print_json(value: Any) -> None:
    """One JSON document on standard output; numbers that JSON has no word for are null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table on standard output: the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # verbatim: no markup, no emoji
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width).print(table)


def human(number: float, unit: str = "") -> str:
    """4683552 as 4.68 M."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


class ShownProgress(base.Progress):
    """A live bar with what is being done and the time left; a line for each new step where there is no terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._depth = 0
        self._last = ""

    def start(self, title: str, total: int) -> None:
        self._depth += 1
        if self._depth > 1:
            return self.advance(0, title)
        self._say(title)
        if err.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=err,
                transient=True,
            )
            self._bar.add_task(title, total=total)
            self._bar.start()
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        if self._bar and self._depth == 1:
            self._bar.advance(self._bar.task_ids[0], count)
        if note and self._bar:
            self._bar.update(self._bar.task_ids[0], description=note)
        elif note:
            self._say(note)

    def message(self, text: str) -> None:
        err.print(Text(text), soft_wrap=True)

    def finish(self) -> None:
        self._depth -= 1
        if self._bar and not self._depth:
            self._bar.stop()
            self._bar = None

    def _say(self, note: str) -> None:
        """Without a terminal: what is new about the step, up to its colon, and nothing twice."""
        step = re.sub(r"(: solving) .*| \(\d+ of \d+\)$", r"\1", note)
        if not err.is_terminal and step != self._last:
            err.print(Text(step), soft_wrap=True)
            self._last = step
