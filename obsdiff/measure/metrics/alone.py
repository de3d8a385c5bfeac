"""Metrics of a picture and its prompt alone: float [n] each, NaN where a prompt says nothing of it."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.measure import fashion
from obsdiff.measure.metrics.weights import find_file, find_hub_file, find_model, installed
from obsdiff.measure.quality import Drawn, as_tensor

Alone = Callable[[Drawn, Sequence[str]], Tensor]

BATCH = 16
CLIP = "openai/clip-vit-large-patch14"
HPS, HPS_FILE, HPS_MODEL = "xswu/HPSv2", "HPS_v2.1_compressed.pt", "ViT-H-14"
REWARD, REWARD_FILE, REWARD_CONFIG = "THUDM/ImageReward", "ImageReward.pt", "med_config.json"


def accuracy(which: int, held_out: bool) -> Callable[[Path | None, str], Alone]:
    """1 where the embedded model's classifier sees the item (0) or colour (1) of the caption, else 0."""

    def hits(drawn: Drawn, prompts: Sequence[str]) -> Tensor:
        guesses = fashion.classify(as_tensor(drawn.images))[which].argmax(1).tolist()
        return torch.tensor(
            [
                float("nan")
                if (wanted := fashion.parse_caption(prompt)[which]) is None
                or (held_out and not fashion.held_out(prompt))
                else float(guess == wanted)
                for guess, prompt in zip(guesses, prompts, strict=True)
            ]
        )

    return lambda _weights, _device: hits


def clip_score(weights: Path | None, device: str) -> Alone:
    """100 times the cosine of CLIP's embeddings of picture and prompt, at least 0 (arXiv 2104.08718).

    By transformers itself: torchmetrics 1.9 expects of transformers 5 what it no longer returns.
    """
    folder = find_model(weights, CLIP)
    loaded: list[Any] = []

    @torch.no_grad()
    def score(drawn: Drawn, prompts: Sequence[str]) -> Tensor:
        from transformers import CLIPModel, CLIPProcessor

        if not loaded:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
            loaded[:] = [model.eval().to(device), CLIPProcessor.from_pretrained(folder, local_files_only=True)]
        model, processor = loaded
        found = []
        for k in range(0, len(prompts), BATCH):
            part = slice(k, k + BATCH)
            inputs = processor(
                text=list(prompts[part]),
                images=drawn.images[part],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
            ).to(device)
            output = model(**inputs)  # its embeddings have length 1
            found.append((100 * (output.image_embeds * output.text_embeds).sum(1)).clamp(min=0).cpu())
        return torch.cat(found)

    return score


def hpsv2(weights: Path | None, device: str) -> Alone:
    """Human Preference Score v2.1 (arXiv 2306.09341): the cosine of its fine-tuned CLIP, by open_clip.

    The weights are published as a pickle only; open_clip reads it with weights_only, which lets it hold nothing but
    tensors. The authors' own package would fetch another 4 GB of weights first, only to overwrite them.
    """
    installed("open_clip", "open_clip_torch")
    path = find_hub_file(weights, HPS, HPS_FILE)
    loaded: list[Any] = []

    @torch.no_grad()
    def score(drawn: Drawn, prompts: Sequence[str]) -> Tensor:
        import open_clip

        if not loaded:
            model, _, prepare = open_clip.create_model_and_transforms(HPS_MODEL, pretrained=str(path), device=device)
            loaded[:] = [model.eval(), prepare, open_clip.get_tokenizer(HPS_MODEL)]
        model, prepare, tokenize = loaded
        found = []
        for k in range(0, len(prompts), BATCH):
            part = slice(k, k + BATCH)
            pixels = torch.stack([prepare(image) for image in drawn.images[part]]).to(device)
            seen = model.encode_image(pixels, normalize=True)
            read = model.encode_text(tokenize(list(prompts[part])).to(device), normalize=True)
            found.append((seen * read).sum(1).float().cpu())
        return torch.cat(found)

    return score


def image_reward(weights: Path | None, device: str) -> Alone:
    """ImageReward (arXiv 2304.05977) by its own package; weights: a folder with ImageReward.pt and med_config.json.

    The weights are published as a pickle only: weights_only lets it hold nothing but tensors.
    """
    installed("ImageReward", "image-reward")
    path = find_hub_file(weights, REWARD, REWARD_FILE)
    config = find_file(path.parent, REWARD_CONFIG, REWARD)
    loaded: list[Any] = []

    @torch.no_grad()
    def score(drawn: Drawn, prompts: Sequence[str]) -> Tensor:
        from ImageReward.ImageReward import ImageReward

        if not loaded:
            model = ImageReward(device=device, med_config=str(config)).to(device)
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
            loaded[:] = [model.eval()]
        found = []
        with tempfile.TemporaryDirectory() as folder:  # all of its versions take paths, not all take pictures
            for image, prompt in zip(drawn.images, prompts, strict=True):
                image.save(Path(folder) / "picture.png")
                found.append(float(loaded[0].score(prompt, str(Path(folder) / "picture.png"))))
        return torch.tensor(found)

    return score
