"""obsdiff prune: what it prints, what it saves, and what is left when it is stopped."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import FEW, assert_sentence, call, tree
from obsdiff.checkpoint import read_info

from .conftest import Journey

QUICKEST = ("--solver", "magnitude", "--num-prompts", 1, "--steps", 1, "--packages", 1, "--device", "cpu")


def test_the_path_of_the_issue_prunes(journey: Journey) -> None:
    assert journey.prune.code == 0, journey.prune.err
    lines = [line.split() for line in journey.prune.out.splitlines()]
    assert ["checkpoint", str(journey.checkpoint)] in lines
    assert ["pattern,", "solver", "2:4,", "obs"] in lines
    assert ["zeros", "in", "them", "50.0%"] in lines
    info = read_info(journey.checkpoint)
    assert info
    assert f"{len(info.layers)} with" in journey.prune.out
    errors = [layer.error for layer in info.layers if layer.error is not None]
    assert f"mean {sum(errors) / len(errors):.4f}, worst {max(errors):.4f}" in journey.prune.out


def test_progress_goes_to_standard_error_step_by_step(journey: Journey) -> None:
    steps = journey.prune.err.splitlines()
    assert steps == list(dict.fromkeys(steps)), "each step once"
    assert any("package 1/2" in step for step in steps)
    assert any("package 2/2" in step for step in steps)
    assert not any("package" in line for line in journey.prune.out.splitlines())


def test_nothing_is_left_beside_the_checkpoint(journey: Journey) -> None:
    beside = {path.name for path in journey.checkpoint.parent.iterdir()}
    assert beside == {"out", "bundle", "boot.png"}
    assert not [name for name in tree(journey.checkpoint) if name.endswith(".part")]


def test_the_same_command_again_finds_it_finished_and_says_it_as_json(journey: Journey) -> None:
    again = call(
        "prune", "fashion", journey.checkpoint, "--pattern", "2:4", "--sparsity", 0.5, "--solver", "obs", *FEW, "--json"
    )
    assert again.code == 0
    assert f"{journey.checkpoint} is finished already" in again.err
    assert again.json == json.loads((journey.checkpoint / "obsdiff.json").read_text())


def test_options_reach_the_recipe_and_the_rest_is_what_the_model_says(one_block_sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red bag\n\na blue coat\na third one\n")
    given: dict[str, Any] = {
        "pattern": "unstructured",
        "sparsity": 0.25,
        "solver": "wanda",
        "steps": 1,
        "height": 16,
        "width": 32,
        "guidance_scale": 1.5,
        "batch_size": 1,
        "packages": 1,
        "timestep_weighting": "linear-increase",
        "blocks": "0:1",
        "include": r"\.attn\.",
        "exclude": "to_q",
        "seed": 5,
        "device": "cpu",
        "dtype": "float32",
    }
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = call(
        "prune", one_block_sd3, tmp_path / "out", *flags, "--prompts", tmp_path / "prompts.txt",
        "--num-prompts", 2, "--json",
    )  # fmt: skip
    recipe = result.json["recipe"]
    assert recipe["prompts"] == ["a red bag", "a blue coat"]
    assert given.items() <= recipe.items()
    assert recipe["call"] == {"max_sequence_length": 0, "prompt_tokens": 12}
    names = [layer["name"].removeprefix("transformer_blocks.0.") for layer in result.json["layers"]]
    assert names
    assert all(name.startswith("attn.") and "to_q" not in name for name in names)
    assert all(layer["sparsity"] == pytest.approx(0.25, abs=1e-3) for layer in result.json["layers"])


def test_solvers_without_a_hessian_still_report(one_block_sd3: Path, tmp_path: Path) -> None:
    result = call("prune", one_block_sd3, tmp_path / "out", *QUICKEST)
    assert result.code == 0, result.err
    assert "2:4, magnitude" in result.out


def test_another_recipe_needs_restart_and_then_replaces(one_block_sd3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("prune", one_block_sd3, out, *QUICKEST).code == 0
    before = tree(out)
    other = ("prune", one_block_sd3, out, *QUICKEST, "--pattern", "1:4")
    assert_sentence(call(*other), 2, "another recipe", "--restart")
    assert tree(out) == before
    assert call(*other, "--restart").code == 0
    info = read_info(out)
    assert info
    assert info.recipe["pattern"] == "1:4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_says_how_many_units_stay_and_whether_the_target_was_reached(one_block_sd3: Path, tmp_path: Path) -> None:
    quick = ("--num-prompts", 2, "--steps", 1, "--packages", 1, "--device", "cpu", "--blocks", ":")
    for number, (options, row) in enumerate(
        [
            (("--target-size", 0.9), r"parameters that stay +\d\d\.\d% of the denoiser's, 90\.0% asked"),
            (("--pattern", "structured"), r"their work that goes +3\d\.\d% of the MACs, 30\.0% asked"),
            (("--pattern", "structured", "--heads", 0.5), r"zeros in them"),
        ]
    ):
        result = call("prune", one_block_sd3, tmp_path / f"{number}", *quick, *options)
        assert result.code == 0, result.err
        assert re.search(row, result.out)
        info = read_info(tmp_path / f"{number}")
        assert info
        heads = next(group for group in info.groups if group.kind == "heads")
        neurons = [group for group in info.groups if group.kind == "neurons"]
        kept, of = (sum(counts) for counts in ([len(g.kept) for g in neurons], [g.of for g in neurons]))
        assert re.search(
            f"heads and neurons that stay +{len(heads.kept)} of {heads.of} heads, {kept} of {of} neurons", result.out
        )
        assert ("asked" in result.out) == bool(info.allocation)


def test_a_path_with_dots_is_the_folder_that_it_leads_to(one_block_sd3: Path, tmp_path: Path) -> None:
    assert call("prune", one_block_sd3, tmp_path / "nothing" / ".." / "out", *QUICKEST).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = call("prune", one_block_sd3, tmp_path / "other" / ".." / "out", *QUICKEST)
    assert "finished already" in again.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_goes_on_leading_to_the_checkpoint(one_block_sd3: Path, tmp_path: Path) -> None:
    """Big checkpoints live on another disk: what is there is replaced there, through a link that leads nowhere too."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for options in ((), ("--pattern", "1:4", "--restart")):
        assert call("prune", one_block_sd3, tmp_path / "out", *QUICKEST, *options).code == 0
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
        assert (tmp_path / "out").is_symlink()
    info = read_info(tmp_path / "disk" / "out")
    assert info
    assert info.recipe["pattern"] == "1:4"


def test_fewer_prompts_than_asked_for_are_told(one_block_sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red bag\na blue coat\n")
    rest = ("--solver", "magnitude", "--steps", 1, "--device", "cpu", "--prompts", tmp_path / "prompts.txt")
    asked = call("prune", one_block_sd3, tmp_path / "out", *rest, "--num-prompts", 100000)
    assert "--num-prompts 100000: there are 2, and all of them are used" in asked.err.splitlines()
    for number, options in enumerate(((), ("--num-prompts", 2), ("--num-prompts", 1))):
        result = call("prune", one_block_sd3, tmp_path / f"{number}", *rest, *options)
        assert (result.code, "--num-prompts" in result.err) == (0, False)


def test_a_checkpoint_cannot_be_pruned_again(journey: Journey, tmp_path: Path) -> None:
    assert_sentence(call("prune", journey.checkpoint, tmp_path / "out"), 2, "pruned already")
    assert not tree(tmp_path)


@pytest.mark.slow
def test_a_signal_ends_it_with_130_and_one_sentence(tmp_path: Path) -> None:
    """Two processes of their own, one interrupted and one terminated, with minutes of calibration before them."""
    command = [sys.executable, "-m", "obsdiff", "prune", "fashion"]
    options = [*map(str, FEW), "--steps", "1000", "--packages", "30"]
    processes = {
        sent: subprocess.Popen(
            [*command, str(tmp_path / sent.name), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for sent in (signal.SIGINT, signal.SIGTERM)
    }
    for sent, process in processes.items():
        assert process.stderr
        seen = ""
        while "package 1/" not in seen:
            line = process.stderr.readline()
            assert line, f"it ended before it was stopped: {seen}"
            seen += line
        process.send_signal(sent)
        out, err = process.communicate()
        assert process.returncode == 130
        assert (seen + err).splitlines()[-1] == "error: interrupted; the same command goes on where it can"
        assert "Traceback" not in seen + err
        assert out == ""
        assert not (tmp_path / sent.name).exists()
