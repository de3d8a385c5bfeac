"""Hooks: what was called with which arguments, and a sampler that is watched draws what it draws unwatched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from obsdiff.hooks import after_steps, defaults, named_arguments
from obsdiff.models.source import find_source, load_pipeline
from obsdiff.prune.calibration import encode_prompts, sample_latents, sampler_of
from obsdiff.prune.recipe import make_recipe


def test_arguments_are_named_whichever_way_they_were_given() -> None:
    def called(first: int, second: int = 2, *, third: int = 3) -> None: ...

    assert named_arguments(called, (1,), {"third": 4}) == {"first": 1, "third": 4}
    assert named_arguments(called, (1, 5), {}) == {"first": 1, "second": 5}
    assert defaults(called) == {"second": 2, "third": 3}


def test_a_step_is_told_of_after_it_and_the_scheduler_is_left_as_it_was() -> None:
    class Scheduler:
        done = 0

        def step(self, by: int) -> int:
            self.done += by
            return self.done

    scheduler, seen = Scheduler(), []

    def twice() -> None:
        with after_steps(scheduler, lambda: seen.append(scheduler.done)):
            assert [scheduler.step(2), scheduler.step(3)] == [2, 5]
            raise KeyError

    with pytest.raises(KeyError):
        twice()
    assert seen == [2, 5]
    assert "step" not in vars(scheduler)


def test_calibration_hands_its_own_noise_to_a_sampler_that_draws_more_of_it(tiny_model: Any, tmp_path: Path) -> None:
    """An ancestral sampler adds noise at every step: a pipeline asks its signature whether it takes a generator."""
    source = find_source(tiny_model("unet"))
    pipe = load_pipeline(source, torch.float32)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    recipe = make_recipe(source, {"num_prompts": 2, "steps": 3, "batch_size": 2, "device": "cpu"})
    (batch,) = encode_prompts(pipe, source.spec, recipe, "cpu")
    sampler, call = sampler_of(pipe, "cpu"), {**recipe.call_options, **source.spec.call}
    torch.manual_seed(1)
    first = sample_latents(sampler, batch, call, 0)
    torch.manual_seed(2)
    assert torch.equal(sample_latents(sampler, batch, call, 0), first)
