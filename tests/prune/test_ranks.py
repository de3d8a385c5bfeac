"""Several processes on one prune: the result of one process, and one sentence when they cannot go on."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.checkpoint import CheckpointInfo, read_info, read_masks
from obsdiff.prune.stage import prune

from .folders import changed_model, hashes
from .runs import Noting, Rank, command, free_port

OPTIONS: dict[str, Any] = {"num_prompts": 4, "steps": 2, "batch_size": 1, "device": "cpu", "solver": "obs"}
LONG: dict[str, Any] = {**OPTIONS, "steps": 10, "packages": 8}
MODES: dict[str, dict[str, Any]] = {
    "stream": {"calibration": "stream"},
    "auto": {"solver": "auto", "packages": 1},
    "dsnot": {"solver": "dsnot", "packages": 1},
    "structured": {"pattern": "structured", "blocks": ":", "heads": 0.5, "neurons": 0.3, "packages": 1},
    "error": {"pattern": "unstructured", "allocation": "error", "packages": 1},
}


def info_of(path: Path) -> CheckpointInfo:
    info = read_info(path)
    assert info
    return info


def start(tmp_path: Path, *arguments: list[str]) -> list[Rank]:
    """A rank for each, in their order."""
    port = free_port()
    return [Rank(rank, port, given, tmp_path.parent) for rank, given in enumerate(arguments)]


def in_two(model: Path, out: Path, options: dict[str, Any]) -> None:
    given = command(model, out, options)
    for code, said in [rank.end() for rank in start(out.parent, given, given)]:
        assert code == 0, said


def assert_same(one: Path, two: Path) -> None:
    """The same up to float32 summation order."""
    mine, theirs = info_of(one), info_of(two)
    assert theirs.recipe == mine.recipe
    assert [layer.name for layer in theirs.layers] == [layer.name for layer in mine.layers]
    assert [group.kept for group in theirs.groups] == [group.kept for group in mine.groups]
    errors = [[-1 if layer.error is None else layer.error for layer in info.layers] for info in (mine, theirs)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    masks = [read_masks(path, info) for path, info in ((one, mine), (two, theirs))]
    same = torch.cat([(masks[0][name] == masks[1][name]).flatten() for name in masks[0]])
    assert same.float().mean() > 0.998


def sentences(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_torchrun_prunes_as_one_process_does(tiny_sd3: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "packages": 2}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = [sys.executable, *launch, "-m", "obsdiff", *command(tiny_sd3, tmp_path / "two", options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    prune(tiny_sd3, tmp_path / "one", **options)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("mode", ["auto", "dsnot", "structured"])
def test_two_ranks_prune_as_one_process_does(tiny_sd3: Path, tmp_path: Path, mode: str) -> None:
    options = {**OPTIONS, **MODES[mode]}
    in_two(tiny_sd3, tmp_path / "two", options)
    prune(tiny_sd3, tmp_path / "one", **options)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("changes", [MODES["stream"], MODES["error"]], ids=str)
def test_a_rank_without_prompts_of_its_own_helps_to_solve(
    tiny_sd3: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    options = {**OPTIONS, "num_prompts": 2, "batch_size": 2, **changes}
    in_two(tiny_sd3, tmp_path / "two", options)
    prune(tiny_sd3, tmp_path / "one", **options)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("different", ["options", "model", "prompts"])
def test_ranks_that_differ_all_stop_with_one_sentence_and_nothing_is_written(
    tiny_sd3: Path, one_block_sd3: Path, tmp_path: Path, different: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boot\na bag\n")
    other = {"options": {"seed": 1}, "model": {}, "prompts": {"prompts": prompts}}[different]
    model, out = one_block_sd3 if different == "model" else tiny_sd3, tmp_path / "out"
    ranks = start(tmp_path, command(tiny_sd3, out, OPTIONS), command(model, out, {**OPTIONS, **other}))
    for code, said in [rank.end() for rank in ranks]:
        assert code == 2
        assert sentences(said) == [
            "error: rank 1 has another model or recipe than rank 0: all ranks need the same model and options"
        ]
        assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_what_rank_0_refuses_every_rank_refuses(tiny_sd3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    given = command(tiny_sd3, out, OPTIONS)
    for code, said in [rank.end() for rank in start(tmp_path, given, given)]:
        assert code == 2
        assert sentences(said) == [f"error: {out} exists and is not a pruned checkpoint: choose another name"]
    assert hashes(tmp_path).keys() == {"out/mine.txt"}


@pytest.mark.parametrize("options", [{}, {"pattern": "structured", "target_size": 0.01, "blocks": ":"}], ids=str)
def test_what_cannot_be_solved_is_one_sentence_on_every_rank(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A layer's input that overflows, a target that cannot be reached: found by the rank that looks."""
    bias = "transformer_blocks.1.ff.net.0.proj.bias"
    model = tiny_sd3
    if not options:
        model = changed_model(tiny_sd3, tmp_path.with_name("bad"), lambda tensors: tensors[bias].fill_(1e38))
    given = command(model, tmp_path / "out", {**OPTIONS, "solver": "auto", "packages": 1, **options})
    for code, said in [rank.end() for rank in start(tmp_path, given, given)]:
        assert code == 2
        assert len(sentences(said)) == 1
        assert ("target-size" if options else "NaN or infinity as input") in said
        assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_and_the_prune_goes_on_later(
    tiny_sd3: Path, tmp_path: Path, victim: int
) -> None:
    out, given = tmp_path / "out", command(tiny_sd3, tmp_path / "out", LONG)
    ranks = start(tmp_path, given, given)
    first = tmp_path / "out.partial" / "package-000"
    while not first.exists():
        assert all(rank.process.is_alive() for rank in ranks), [rank.end() for rank in ranks]
        time.sleep(0.005)
    ranks[victim].process.kill()
    code, said = ranks[1 - victim].end()
    ranks[victim].end()
    assert code == 1
    assert sentences(said) == [f"error: rank {1 - victim} lost another rank; the same command goes on from there"]
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    progress = Noting()
    prune(tiny_sd3, out, progress=progress, **LONG)
    assert progress.done < LONG["packages"] * LONG["steps"] * LONG["num_prompts"], "less than a whole prune"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
