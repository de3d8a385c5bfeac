"""Interrupted at any moment, by whatever: the same call goes on and ends in the same bytes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import full_disk

from obsdiff.errors import ObsdiffError
from obsdiff.progress import Progress
from obsdiff.prune.stage import prune

from .folders import hashes
from .options import QUICK

LONG: dict[str, Any] = {**QUICK, "packages": 6, "steps": 4}
PATTERNS = ["2:4", "structured"]


@pytest.fixture(scope="module")
def reference(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The hashes of checkpoints that were made without an interruption, by pattern, and `long`."""
    folder = tmp_path_factory.mktemp("reference")
    for pattern in PATTERNS:
        prune(tiny_sd3, folder / pattern, **QUICK, pattern=pattern, blocks=":")
    prune(tiny_sd3, folder / "long", **LONG)
    return {name: hashes(folder / name) for name in (*PATTERNS, "long")}


class Interrupting(Progress):
    """Raises KeyboardInterrupt when it is told of progress for the n-th time."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Counting(Progress):
    """Keeps how much it was promised and told of."""

    total = done = 0

    def start(self, title: str, total: int) -> None:
        self.total += total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


def command(model: Path, out: Path, options: dict[str, Any]) -> list[str]:
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "obsdiff", "prune", str(model), str(out), *flags]


def start(model: Path, out: Path, **options: Any) -> "subprocess.Popen[str]":
    """The command in a process of its own, with as many threads as this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(model, out, LONG), env=environment, **pipes, **options)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_command_goes_on_where_it_was(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(tiny_sd3, out)
    while not (tmp_path / "out.partial" / "package-000").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "Traceback" not in said
    assert leftovers(tmp_path) == ["out.partial"], "what is not finished does not look finished"
    progress = Counting()
    prune(tiny_sd3, out, progress=progress, **LONG)
    assert progress.done == progress.total < LONG["packages"] * LONG["steps"] * 2 + 12, "less than a whole prune"
    assert hashes(out) == reference["long"]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("after", [0, 3, 5, 8, 13])
def test_an_interrupted_call_goes_on_where_it_was(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]], pattern: str, after: int
) -> None:
    options = {**QUICK, "pattern": pattern, "blocks": ":"}
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_sd3, tmp_path / "out", progress=Interrupting(after), **options)
    assert leftovers(tmp_path) == ["out.partial"]
    prune(tiny_sd3, tmp_path / "out", **options)
    assert hashes(tmp_path / "out") == reference[pattern]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 4, -3, -2, -1])
def test_an_interruption_while_a_file_is_written_loses_nothing(
    tiny_sd3: Path,
    tmp_path: Path,
    reference: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    after: int,
) -> None:
    """Files count as they are synchronised to the disk; negative numbers count from the last one."""
    sync, calls = os.fsync, 0
    stages = 12
    last = 1 + stages + len(["weights", "config", "sparsity_config", "masks", "info"])

    def failing(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == (after + 1 if after >= 0 else last + after):
            raise error
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(type(error)):
            prune(tiny_sd3, tmp_path / "out", **QUICK, blocks=":")
    assert leftovers(tmp_path) == ["out.partial"]
    prune(tiny_sd3, tmp_path / "out", **QUICK, blocks=":")
    assert hashes(tmp_path / "out") == reference["2:4"]
    assert leftovers(tmp_path) == ["out"]


def test_a_restart_that_is_interrupted_at_the_end_leaves_a_whole_checkpoint(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of every folder that is being deleted is gone: what is at the checkpoint's place is whole all the same."""
    out = tmp_path / "out"
    prune(tiny_sd3, out, **{**QUICK, "seed": 1})
    before = hashes(out)

    def half_way(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            for path in sorted(folder.rglob("*.json")):
                path.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_way)
        with pytest.raises(KeyboardInterrupt):
            prune(tiny_sd3, out, restart=True, **QUICK)
    assert hashes(out) in (before, reference["2:4"])


def test_a_finished_prune_is_not_done_again(tiny_sd3: Path, tmp_path: Path) -> None:
    info = prune(tiny_sd3, tmp_path / "out", **QUICK)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "out.partial" / "result").mkdir(parents=True)  # killed between the last two steps
    progress = Counting()
    assert prune(tiny_sd3, tmp_path / "out", progress=progress, **QUICK) == info
    assert progress.total == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    assert leftovers(tmp_path) == ["out"]


def test_the_display_is_told_of_all_the_work_it_was_promised(tiny_sd3: Path, tmp_path: Path) -> None:
    progress = Counting()
    prune(tiny_sd3, tmp_path / "out", progress=progress, **QUICK)
    assert progress.done == progress.total > 0


def test_work_of_another_recipe_is_kept_unless_told_otherwise(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_sd3, tmp_path / "out", progress=Interrupting(12), **{**QUICK, "seed": 1})
    before = hashes(tmp_path)
    assert any("package-000/" in name for name in before)
    with pytest.raises(
        ObsdiffError, match=r"out\.partial is left from a prune with another recipe: remove it, or pass"
    ):
        prune(tiny_sd3, tmp_path / "out", **QUICK)
    assert hashes(tmp_path) == before
    prune(tiny_sd3, tmp_path / "out", restart=True, **QUICK, blocks=":")
    assert hashes(tmp_path / "out") == reference["2:4"]


@pytest.mark.parametrize("content", [[], [".state.json.part"]], ids=str)
def test_killed_before_it_wrote_whose_work_it_is_a_prune_starts_anew(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]], content: list[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in content:
        (tmp_path / "out.partial" / name).write_text("{")
    prune(tiny_sd3, tmp_path / "out", **QUICK)
    assert hashes(tmp_path / "out") == reference["2:4"]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("limit", [100, 8_000, 60_000, 600_000])
def test_a_full_disk_is_one_sentence_and_the_prune_goes_on_later(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]], limit: int
) -> None:
    with full_disk(limit), pytest.raises((ObsdiffError, OSError), match="too large") as caught:
        prune(tiny_sd3, tmp_path / "out", **QUICK)
    assert str(tmp_path / "out.partial") in str(caught.value)
    assert leftovers(tmp_path) in ([], ["out.partial"])
    prune(tiny_sd3, tmp_path / "out", **QUICK)
    assert hashes(tmp_path / "out") == reference["2:4"]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.slow
def test_the_command_says_that_the_disk_is_full(
    tiny_sd3: Path, tmp_path: Path, reference: dict[str, dict[str, str]]
) -> None:
    with full_disk(60_000):  # a process that is started here inherits the limit
        process = start(tiny_sd3, tmp_path / "out")
        _, said = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in said
    [sentence] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "out.partial") in sentence
    assert "too large" in sentence
    assert leftovers(tmp_path) == ["out.partial"]
    prune(tiny_sd3, tmp_path / "out", **LONG)
    assert hashes(tmp_path / "out") == reference["long"]
