"""A pipeline of classes and no text: what a prompt is, one size of picture, an older name of the denoiser's class."""

from collections.abc import Callable
from pathlib import Path

import pytest

from obsdiff.errors import InputError
from obsdiff.export.ranges import make_axes
from obsdiff.models import find_spec
from obsdiff.models.source import Source, find_source, load_pipeline
from obsdiff.prune.recipe import make_recipe
from obsdiff.runtime.generate import generate


@pytest.fixture(scope="module")
def source(tiny_model: Callable[[str], Path]) -> Source:
    return find_source(tiny_model("dit"))


def test_a_prompt_is_a_label_or_a_number(source: Source) -> None:
    assert source.spec.arguments
    prompts = ["a blue coat", " handbag", "42", "999"]
    assert source.spec.arguments(load_pipeline(source), prompts) == {"class_labels": [997, 3, 42, 999]}


@pytest.mark.parametrize("prompt", ["a green hat", "1000", "-1", ""])
def test_what_is_no_class_is_refused(source: Source, prompt: str) -> None:
    with pytest.raises(InputError, match="is no class of this model: write a number from 0 to 999, or a label"):
        generate(load_pipeline(source), [prompt], [0], {"num_inference_steps": 1})


def test_calibration_goes_over_the_classes_unless_told_otherwise(source: Source) -> None:
    assert source.spec.arguments
    pipe = load_pipeline(source)
    found = source.spec.arguments(pipe, make_recipe(source, {}).prompts)["class_labels"]
    assert len(set(found)) == 100
    assert make_recipe(source, {"prompts": ["a blue coat"], "solver": "obs"}).prompts == ("a blue coat",)


def test_there_is_one_size(source: Source) -> None:
    assert list(make_axes(source, "1:1:4", None)) == ["batch"]
    with pytest.raises(InputError, match="this model draws pictures of one size"):
        make_axes(source, "1:1:4", "32:32:64")


def test_an_older_name_of_the_class_is_told_by_the_config() -> None:
    assert find_spec("Transformer2DModel", {"norm_type": "ada_norm_zero"}).family == "dit"
    assert find_spec("Transformer2DModel", {"norm_type": "ada_norm_single"}).family == "pixart"
    with pytest.raises(InputError, match="Transformer2DModel"):
        find_spec("Transformer2DModel", {"norm_type": "layer_norm"})
