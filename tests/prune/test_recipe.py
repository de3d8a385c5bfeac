"""Recipes: where options come from, which are refused and how, and how prompts are read."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obsdiff.errors import InputError
from obsdiff.models.source import Source, find_source
from obsdiff.prune.recipe import Recipe, make_recipe, read_prompts
from obsdiff.prune.solvers import NM, SOLVERS, Unstructured


@pytest.fixture(scope="module")
def fashion() -> Source:
    return find_source("fashion")


def make(source: Source, **options: Any) -> Recipe:
    return make_recipe(source, {"device": "cpu", **options})


def test_what_the_model_says_of_itself_comes_before_the_settings_of_the_paper(fashion: Source) -> None:
    recipe = make(fashion)
    stated = json.loads((fashion.path / "generation_config.json").read_text())
    assert recipe.steps == stated["num_inference_steps"]
    assert (recipe.height, recipe.width, recipe.guidance_scale) == tuple(
        stated[name] for name in ("height", "width", "guidance_scale")
    )
    plain = make(replace(fashion, defaults={}))
    assert (plain.steps, plain.height, plain.width, plain.guidance_scale) == (25, 512, 512, 7.0)
    assert len(plain.prompts) == 100


def test_options_come_first_and_none_counts_as_not_given(fashion: Source) -> None:
    recipe = make(fashion, steps=3, height=32, width=64, guidance_scale=0, sparsity=None, packages=None)
    assert (recipe.steps, recipe.height, recipe.width, recipe.guidance_scale) == (3, 32, 64, 0)
    assert recipe.sparsity is None


def test_the_sampler_is_called_with_what_the_recipe_says(fashion: Source) -> None:
    call = make(fashion, steps=3, height=32, width=64, guidance_scale=2).call_options
    assert call.items() >= {"num_inference_steps": 3, "height": 32, "width": 64, "guidance_scale": 2}.items()
    others = set(fashion.defaults) - {"num_inference_steps", "height", "width", "guidance_scale"}
    assert all(call[name] == fashion.defaults[name] for name in others)


def test_defaults_go_by_the_pattern(fashion: Source) -> None:
    nm, unstructured, structured = (make(fashion, pattern=p) for p in ("2:4", "unstructured", "structured"))
    assert make(fashion).pattern == "2:4"
    assert nm.layer_pattern == NM(2, 4)
    assert (nm.sparsity, nm.blocks) == (None, ":")
    assert unstructured.layer_pattern == Unstructured(0.5)
    assert (unstructured.sparsity, unstructured.blocks) == (0.5, ":")
    assert structured.layer_pattern is None
    assert (structured.sparsity, structured.blocks) == (0.3, "1:-1")
    assert make(fashion, pattern="structured", blocks=":", sparsity=0.2).blocks == ":"


def test_sparsity_may_be_said_along_with_n_m_if_it_agrees(fashion: Source) -> None:
    assert make(fashion, pattern="2:4", sparsity=0.5).layer_pattern == NM(2, 4)
    assert make(fashion, pattern="1:4", sparsity=0.75).layer_pattern == NM(1, 4)
    assert make(fashion, pattern="unstructured", sparsity=0.6).layer_pattern == Unstructured(0.6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_can_be_asked_for(fashion: Source, solver: str) -> None:
    assert make(fashion, solver=solver).solver == solver


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"pattern": p, "sparsity": s}, r"^--sparsity must lie between 0 and 1 \(both excluded\)")
          for p in ("2:4", "unstructured", "structured") for s in (0, 1, -0.5, 1.5, math.nan)),
        ({"pattern": "2:4", "sparsity": 0.6}, "^--pattern 2:4 is a sparsity of 0.5, not --sparsity 0.6"),
        ({"pattern": "4:4"}, "^--pattern: 4:4: N of N:M must be at least 1 and smaller than M"),
        ({"pattern": "5:4"}, "pattern: 5:4: N of N:M"),
        ({"pattern": "0:4"}, "pattern: 0:4: N of N:M"),
        ({"pattern": "blocks"}, r"pattern: 'blocks' is no N:M pattern such as 2:4 \(or write unstructured, structured"),
        ({"pattern": "structured", "solver": "wanda"}, "^--solver wanda: structured pruning knows auto, obs"),
        ({"solver": "best"}, "^--solver: Input should be .*'obs'.*'wanda'.*'magnitude'"),
        ({"timestep_weighting": "cosine"}, "^--timestep-weighting: Input should be .*'log-decrease'"),
        *(({"pattern": p, name: value}, f"^--{name.replace('_', '-')} is an option of --pattern structured")
          for p in ("2:4", "unstructured") for name, value in (("heads", 0.2), ("neurons", 0.2), ("round_to", 8))),
        *(({"pattern": "structured", name: value}, name)
          for name in ("heads", "neurons") for value in (-0.1, 1, math.nan)),
        ({"pattern": "structured", "round_to": 0}, "round-to"),
        ({"solver": "obs", "damping": 0}, "damping"),
        ({"solver": "obs", "damping": math.nan}, "damping"),
        ({"solver": "magnitude", "damping": 0.1}, "^--damping is an option of --solver obs and alps, not of magnitude"),
        *(({name: value}, f"^--{name.replace('_', '-')}: ")
          for name in ("steps", "height", "width", "batch_size", "packages") for value in (0, -3, 2.5, "many")),
        ({"guidance_scale": -1}, "guidance-scale"),
        ({"guidance_scale": math.nan}, "guidance-scale"),
        ({"guidance_scale": math.inf}, "guidance-scale"),
        ({"solver": "obs", "damping": math.inf}, "damping"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"dtype": "float64"}, "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ({"num_prompts": 0}, "--num-prompts must be at least 1, not 0"),
        ({"prompts": []}, "^--prompts: "),
        ({"solver": "auto", "num_prompts": 1}, "^--solver auto holds half of the prompts out"),
        ({"prompts": [1, 2]}, "^--prompts: Input should be a valid string; "),
        ({"speed": 2}, "^--speed: no such option"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_refused_by_name(fashion: Source, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(fashion, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["target_size", "target_speedup"])
def test_a_target_is_met_by_measured_errors_whatever_the_solver(fashion: Source, target: str) -> None:
    for solver in ("auto", "obs", "magnitude"):
        recipe = make(fashion, solver=solver, **{target: 0.8 if target == "target_size" else 1.3})
        assert (recipe.pattern, recipe.allocation) == ("structured", "error")
    assert make(fashion, solver="magnitude", pattern="structured").allocation == "uniform"


def test_every_wrong_option_is_named_at_once(fashion: Source) -> None:
    with pytest.raises(InputError, match=r"--steps: .*; --batch-size: .*; --speed: no such option"):
        make(fashion, steps=0, batch_size=0, speed=2)


def test_a_recipe_written_and_read_is_the_same(fashion: Source) -> None:
    for options in ({}, {"pattern": "structured", "heads": 0.1, "neurons": 0.4, "round_to": 16, "seed": 7}):
        recipe = make(fashion, **options)
        assert Recipe(**json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_prompts_may_be_a_file_or_a_list_and_are_cut(fashion: Source, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red boot\n\n  a blue bag \nein grüner Hut\n", encoding="utf-8")
    wanted = ("a red boot", "a blue bag", "ein grüner Hut")
    assert make(fashion, prompts=path).prompts == wanted
    assert make(fashion, prompts=str(path)).prompts == wanted
    assert make(fashion, prompts=wanted).prompts == wanted
    assert make(fashion, prompts=wanted, num_prompts=2).prompts == wanted[:2]
    assert make(fashion, prompts=wanted, num_prompts=99).prompts == wanted


def test_the_prompts_that_ship_fit_the_model(fashion: Source, tiny_sd3: Path) -> None:
    own, general = make(fashion, num_prompts=100).prompts, make(find_source(tiny_sd3), num_prompts=100).prompts
    assert len(own) == len(general) == 100
    assert not set(own) & set(general)


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_json_lines_hold_strings_or_objects(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    lines = ['"a red boot"', '{"prompt": " a bag", "seed": 1}', "", '{"caption": "a hat"}', '{"text": "a \\"sock\\""}']
    path.write_text("\n".join(lines))
    assert read_prompts(path) == ["a red boot", "a bag", "a hat", 'a "sock"']


def test_a_text_file_is_not_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "a boot"}\n')
    assert read_prompts(path) == ['{"prompt": "a boot"}']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 3: not JSON"),
        ("a red boot", "line 3: not JSON"),
        ('{"title": "a boot"}', "line 3: needs a string, or an object with a prompt, caption or text"),
        ('{"prompt": 3}', "line 3: needs a string"),
        ('{"prompt": " "}', "line 3: needs a string"),
        ("[]", "line 3: needs a string"),
        ("null", "line 3: needs a string"),
        ('""', "line 3: needs a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n\n{line}\n')
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    path.write_text(content)
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    for path in (tmp_path / "missing.txt", tmp_path, tmp_path / "image.txt"):
        with pytest.raises(InputError, match=f"the prompts file {path} cannot be read"):
            read_prompts(path)


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path: Path) -> None:
    for name, content in (("prompts.txt", "a boot\r\na bag\r\n"), ("prompts.jsonl", '"a boot"\r\n"a bag"\r\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_prompts(tmp_path / name) == ["a boot", "a bag"]
