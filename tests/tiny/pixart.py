"""A random PixArt-α of 1024 pixels: the denoiser is told resolution and aspect ratio, and learned sigmas, so twice the
channels come out. `sigma`: PixArt-Σ, which is told neither."""

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save


def make(folder: Path, sigma: bool = False) -> Path:
    own = load_pipeline(find_source("fashion"), torch.float32)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(own.tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=own.vae.config.latent_channels,
        out_channels=2 * own.vae.config.latent_channels,
        num_layers=3,
        cross_attention_dim=48,
        caption_channels=32,
        use_additional_conditions=False if sigma else None,
    )
    louder(transformer.transformer_blocks)
    pipeline = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    pipe = pipeline(own.tokenizer, encoder, own.vae, transformer, DPMSolverMultistepScheduler())
    defaults = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "prompt_tokens": 16,
    }
    return save(pipe.to(torch.float32), folder, defaults)
