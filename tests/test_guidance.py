"""Guidance by other names than guidance_scale, from other scales on, and with negative prompts of a second encoding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.models.source import find_source, load_pipeline
from obsdiff.prune.calibration import encode_prompts, sample_latents, sampler_of
from obsdiff.prune.recipe import make_recipe
from obsdiff.runtime.generate import call_options, generate


def calls(pipe: Any, run: Callable[[], Any]) -> tuple[int, Any]:
    """How many pictures the denoiser was given in all, and what came out."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    result = run()
    hook.remove()
    return sum(seen), result


@pytest.mark.parametrize(
    ("family", "scale", "passes"),
    [("qwenimage", 4.0, 2), ("qwenimage", 1.0, 1), ("zimage", 4.0, 2), ("zimage", 0.5, 2), ("zimage", 0.0, 1)],
)
def test_calibration_guides_as_the_pipeline_does(
    tiny_model: Callable[[str], Path], family: str, scale: float, passes: int
) -> None:
    model, prompts = tiny_model(family), ["a red bag", "a coat of blue"]
    source = find_source(model)
    pipe: Any = load_pipeline(source, torch.float32)
    options = call_options(pipe, model, {"num_inference_steps": 2, "guidance_scale": scale})
    number, drawn = calls(pipe, lambda: generate(pipe, prompts, [3, 4], options, "latent"))
    assert number == 2 * len(prompts) * passes

    recipe = make_recipe(source, {"prompts": prompts, "steps": 2, "guidance_scale": scale, "device": "cpu"})
    (batch,) = encode_prompts(pipe, source.spec, recipe, "cpu")
    sampler = sampler_of(pipe, "cpu")
    call = source.spec.options(recipe.call_options)
    number, latents = calls(sampler, lambda: sample_latents(sampler, batch, call, 3))
    assert number == 2 * len(prompts) * passes
    assert torch.allclose(latents, drawn, atol=1e-5)


def test_guidance_without_a_negative_prompt_has_one_where_the_pipeline_needs_it(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = load_pipeline(find_source(tiny_model("qwenimage")))
    assert call_options(pipe, tmp_path) == {"negative_prompt": " "}  # the pipeline's own scale is 4
    assert call_options(pipe, tmp_path, {"guidance_scale": 1.0}) == {"true_cfg_scale": 1.0}
    own = {"guidance_scale": 3.0, "negative_prompt": "a hat"}
    assert call_options(pipe, tmp_path, own) == {"true_cfg_scale": 3.0, "negative_prompt": "a hat"}
