"""A random DiT of 32 pixels: 1000 classes with labels, one more that stands for none, learned sigmas, no text encoder.

Published as a Transformer2DModel, the name its class had then.
"""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save

LABELS = {"3": "a red bag, handbag", "997": "a blue coat"}


def make(folder: Path) -> Path:
    vae = load_pipeline(find_source("fashion"), torch.float32).vae
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=vae.config.latent_channels,
        out_channels=2 * vae.config.latent_channels,
        num_layers=2,
        sample_size=8,
    )
    louder(transformer.transformer_blocks)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    save(pipe.to(torch.float32), folder, {"num_inference_steps": 4, "guidance_scale": 4.0})
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"id2label": LABELS, "transformer": ["diffusers", "Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
