"""How far a pruned model's pictures are from the dense model's, drawn with the same prompts and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from obsdiff.runtime.generate import generate


@dataclass(frozen=True)
class Drawn:
    """images: one PIL picture a prompt; latents: float32 [n, C, h, w], what the sampler ended at."""

    images: list[Image.Image]
    latents: Tensor


def draw(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], options: Mapping[str, Any], batch_size: int = 8
) -> Drawn:
    """Draws every prompt with its own seed; pictures do not depend on the batch size but for round-off."""
    images: list[Image.Image] = []
    latents: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        last: dict[str, Tensor] = {}

        def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Tensor], last: Any = last) -> Any:
            last.update(tensors)
            return {}

        images += generate(pipe, prompts[part], seeds[part], {**options, "callback_on_step_end": keep})
        latents.append(last["latents"].float().cpu())
    return Drawn(images, torch.cat(latents))


def latent_error(drawn: Drawn, reference: Drawn) -> float:
    """Mean squared difference of the final latents over the variance of the reference's; 0 is the same picture."""
    difference = (drawn.latents - reference.latents).square().mean()
    return float(difference / reference.latents.var())


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as float32 [n, 3, height, width] in [-1, 1]."""
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
