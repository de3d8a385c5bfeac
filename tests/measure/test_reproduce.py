"""The commands of a report: what they make is what they were made from."""

import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import written
from cli import call
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.export.bundle import read_manifest
from obsdiff.export.ranges import make_axes
from obsdiff.measure.reproduce import bench_command, eval_command, export_command, prune_command
from obsdiff.measure.results import read_result
from obsdiff.models.source import find_source
from obsdiff.prune.recipe import make_recipe

FASHION = find_source("fashion")
ONE = st.sampled_from(
    [
        {},
        {"pattern": "unstructured", "sparsity": 0.625},
        {"pattern": "unstructured", "allocation": "uniform"},
        {"pattern": "unstructured", "allocation": "owl"},
        {"pattern": "structured", "heads": 0.25, "neurons": 0.4, "round_to": 8},
        {"pattern": "structured", "sparsity": 0.2, "allocation": "uniform"},
        {"pattern": "structured+2:4", "solver": "obs"},
        {"target_size": 0.8},
        {"target_speedup": 1.3, "batch_size": 2},
        {"pattern": "1:4", "solver": "alps", "damping": 0.03},
        {"calibration": "stream", "target": "asymmetric", "call_share": 0.5, "offload": True, "cache_gb": 0.5},
        {"solver": "magnitude", "packages": 3, "timestep_weighting": "uniform", "seed": 7},
        {"include": r"attn\.to_q$", "exclude": "a b'c", "blocks": "1:-2", "dtype": "bfloat16"},
    ]
)
TWO = st.fixed_dictionaries(
    {"num_prompts": st.integers(2, 40)},
    optional={
        "steps": st.integers(1, 30),
        "height": st.sampled_from([32, 64]),
        "guidance_scale": st.sampled_from([0.0, 1.5, 7.0]),
        "token_share": st.sampled_from([0.25, 1.0]),
    },
)


@given(ONE, TWO)
def test_a_prune_command_gives_the_recipe_that_it_was_made_from(one: dict[str, Any], two: dict[str, Any]) -> None:
    recipe = make_recipe(FASHION, {"device": "cpu", **one, **two})
    command = shlex.split(prune_command(recipe.model_dump(mode="json"), {"name": "fashion"}, "my out"))
    with mock.patch("obsdiff.prune.stage.prune", side_effect=KeyboardInterrupt) as prune:
        assert call(*command[1:]).code == 130
    (model, out), options = prune.call_args
    assert (model, out) == ("fashion", Path("my out"))
    asked = {name: value for name, value in options.items() if name not in ("progress", "restart")}
    assert make_recipe(FASHION, asked) == recipe


def test_prompts_of_ones_own_and_loras_are_named() -> None:
    lora = {"name": "style.safetensors", "scale": 0.5, "sha256": "0"}
    command = prune_command({**written.RECIPE, "lora": [lora]}, {"name": "m.safetensors", "config": "sd3"}, "out")
    assert command.startswith("obsdiff prune m.safetensors out --config sd3 ")
    assert "--lora style.safetensors:0.5" in command
    assert command.endswith("--prompts prompts.txt --num-prompts 2")


def test_an_export_command_gives_the_ranges_of_the_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(written.bundle(tmp_path / "bundle"))
    command = shlex.split(export_command(manifest, "pruned", "bundle"))
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options == {"--format": "onnx", "--precision": "fp16", "--batch": "1:1:8", "--size": "16:32:48"}
    axes = make_axes(FASHION, options["--batch"], options["--size"])
    for name in ("batch", "height", "width"):
        assert [getattr(axes[name], end) for end in ("min", "opt", "max")] == [
            getattr(manifest.axes[name], end) for end in ("min", "opt", "max")
        ]


def test_what_was_measured_can_be_measured_again(tmp_path: Path) -> None:
    bench = read_result(written.bench(tmp_path / "b.json", {"dense": 2, "a b": 1}, batch_size=4, guidance_scale=4.5))
    assert bench_command(bench) == (  # type: ignore[arg-type]
        "obsdiff bench dense 'a b' --batch-size 4 --runs 5 --steps 8 --guidance-scale 4.5"
    )
    found = read_result(written.evaluation(tmp_path / "q", {"half": 0.1, "x": 0.2}) / "eval.json")
    assert eval_command(found) == (  # type: ignore[arg-type]
        "obsdiff eval half x --reference dense --num-images 3 --seed 5 --steps 8 --guidance-scale 4"
    )


@pytest.mark.parametrize("name", ["$(reboot)", "; rm -rf /", "a'b"])
def test_names_stay_one_word_for_a_shell(tmp_path: Path, name: str) -> None:
    bench = read_result(written.bench(tmp_path / "b.json", {name: 1}))
    assert shlex.split(bench_command(bench))[2] == name  # type: ignore[arg-type]
    assert shlex.split(prune_command(written.RECIPE, {"name": name}, name))[2:4] == [name, name]
