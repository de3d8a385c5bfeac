"""How far a pruned model's pictures are from the dense model's, drawn with the same prompts and seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from obsdiff.hooks import step_results
from obsdiff.runtime.generate import generate


@dataclass(frozen=True)
class Drawn:
    """images: one PIL picture a prompt; latents: float32 [n, ...], what the sampler ended at."""

    images: list[Image.Image]
    latents: Tensor


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: Mapping[str, Any],
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> Drawn:
    """Draws every prompt with its own seed; pictures do not depend on the batch size but for round-off.

    `advance` is told how many pictures each batch had.
    """
    images: list[Image.Image] = []
    latents: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        ended: list[Tensor] = []

        def keep(result: Any, ended: list[Tensor] = ended) -> None:
            ended[:] = [result[0]]

        with step_results(pipe.scheduler, keep):
            images += generate(pipe, prompts[part], seeds[part], options)
        # A pipeline that steps with the guided and the unguided half together (DiT) keeps the first.
        latents.append(ended[0][: len(prompts[part])].float().cpu())
        advance(len(prompts[part]))
    return Drawn(images, torch.cat(latents))


def latent_errors(drawn: Drawn, reference: Drawn) -> Tensor:
    """Float32 [n]: each picture's mean squared difference of the final latents to the reference's."""
    return (drawn.latents - reference.latents).square().flatten(1).mean(1)


def latent_error(drawn: Drawn, reference: Drawn) -> float:
    """Mean squared difference of the final latents over the variance of the reference's; 0 is the same picture."""
    return float(latent_errors(drawn, reference).mean() / reference.latents.var())


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as float32 [n, 3, height, width] in [-1, 1]."""
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
