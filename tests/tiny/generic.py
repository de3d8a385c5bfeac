"""A random AuraFlow pipeline, for denoisers without a spec: joint blocks and then single ones, positions looked up
by size, prompts that only the pipeline itself encodes, a denoiser that gets its latents by position."""

from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from transformers import UMT5Config, UMT5EncoderModel

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save


def make(folder: Path) -> Path:
    base = load_pipeline(find_source("fashion"), torch.float32)
    config = UMT5Config(vocab_size=len(base.tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    channels = base.vae.config.latent_channels
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=576,
    )
    louder(transformer.joint_transformer_blocks)
    louder(transformer.single_transformer_blocks)
    pipe = AuraFlowPipeline(base.tokenizer, UMT5EncoderModel(config), base.vae, transformer, base.scheduler)
    defaults = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "prompt_tokens": 16,
    }
    return save(pipe.to(torch.float32), folder, defaults)
