"""A random Z-Image pipeline: a block that refines the image, one without modulation that refines the text, three over
both; gated MLPs, rotary positions, captions of different lengths, filled up to 32 tokens as the picture is.

The denoiser's embedding of the timestep has a fixed width: most of the parameters are there.
"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save
from tiny.qwen import make_tokenizer


def make(folder: Path) -> Path:
    vae = load_pipeline(find_source("fashion"), torch.float32).vae
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=vae.config.latent_channels,
        dim=48,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=32,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )
    with torch.no_grad():  # zero as they are made
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    for blocks in (transformer.noise_refiner, transformer.context_refiner, transformer.layers):
        louder(blocks)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = ZImagePipeline(scheduler, vae, Qwen3Model(config), tokenizer, transformer)
    defaults = {"height": 40, "width": 40, "num_inference_steps": 4, "guidance_scale": 4.0, "prompt_tokens": 32}
    return save(pipe.to(torch.float32), folder, defaults)
