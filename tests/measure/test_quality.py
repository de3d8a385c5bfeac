"""Quality: pictures and latents of two pipelines, prompt by prompt."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff.measure.quality import Drawn, as_tensor, draw, latent_error
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

PROMPTS = ["a red ankle boot", "teal trousers", "a yellow dress"]
SEEDS = range(10, 13)


@pytest.fixture(scope="module")
def pipe(graphless: Path) -> Any:
    return load(graphless)


@pytest.fixture(scope="module")
def options(pipe: Any, graphless: Path) -> dict[str, Any]:
    return call_options(pipe, graphless, {"num_inference_steps": 2})


@pytest.fixture(scope="module")
def drawn(pipe: Any, options: dict[str, Any]) -> Drawn:
    return draw(pipe, PROMPTS, SEEDS, options)


def test_a_drawing_differs_from_itself_by_nothing(drawn: Drawn) -> None:
    assert latent_error(drawn, drawn) == 0


def test_pictures_and_latents_belong_together(drawn: Drawn, pipe: Any, options: dict[str, Any]) -> None:
    latents = generate(pipe, PROMPTS, SEEDS, options, "latent")
    images = generate(pipe, PROMPTS, SEEDS, options)
    assert torch.equal(drawn.latents, latents)
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in images]
    assert (drawn.latents.dtype, tuple(drawn.latents.shape)) == (torch.float32, (3, 8, 8, 8))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_batch_size_does_not_matter(pipe: Any, options: dict[str, Any], drawn: Drawn, batch_size: int) -> None:
    other = draw(pipe, PROMPTS, SEEDS, options, batch_size=batch_size)
    assert latent_error(other, drawn) < 1e-8
    assert len(other.images) == 3


def test_other_seeds_are_other_pictures(pipe: Any, options: dict[str, Any], drawn: Drawn) -> None:
    assert latent_error(draw(pipe, PROMPTS, range(3), options), drawn) > 0.1


def test_latent_error_is_the_squared_difference_over_the_variance() -> None:
    reference = Drawn([], torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 3)
    shifted = Drawn([], reference.latents + 1.5)
    assert latent_error(shifted, reference) == pytest.approx(1.5**2 / reference.latents.var().item())
    assert latent_error(Drawn([], torch.zeros_like(reference.latents)), reference) == pytest.approx(1, abs=0.01)


def test_pictures_become_tensors() -> None:
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3) * 10
    tensor = as_tensor([Image.fromarray(pixels), Image.new("L", (4, 2), 255)])
    assert (tuple(tensor.shape), tensor.dtype) == ((2, 3, 2, 4), torch.float32)
    torch.testing.assert_close((tensor[0] + 1) * 127.5, torch.from_numpy(pixels).permute(2, 0, 1).float())
    assert torch.equal(tensor[1], torch.ones(3, 2, 4))
