"""The command line, called in this process as a shell would call it: importing torch costs seconds."""

import contextlib
import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from obsdiff.cli import main

FEW = ("--num-prompts", 4, "--steps", 2, "--packages", 2, "--batch-size", 4, "--device", "cpu")
"""Options of a prune that takes about a second."""


@dataclass(frozen=True)
class Result:
    """What a command left behind: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def call(*arguments: object) -> Result:
    """Runs `obsdiff` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Result(ended.value.code or 0, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden and temporary names included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def assert_sentence(result: Result, code: int, *words: str) -> None:
    """The command said one sentence about what is wrong and nothing else."""
    last = result.err.splitlines()[-1]
    assert result.code == code, result.err
    assert last.startswith("error: ")
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    assert result.out == ""
    for word in words:
        assert word in last
