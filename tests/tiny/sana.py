"""A random Sana as the 4K model: position embeddings, linear attention without biases, convolutions for feed-forward,
an autoencoder of 32 pixels a latent, an instruction before every prompt. `sprint`: two steps, embedded guidance, norms
of queries and keys across heads (as Sana 1.5 has), no position embeddings."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save


def make(folder: Path, sprint: bool = False) -> Path:
    tokenizer = load_pipeline(find_source("fashion")).tokenizer
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=32 if sprint else 128,
        interpolation_scale=None if sprint else 2,
        qk_norm="rms_norm_across_heads" if sprint else None,
        guidance_embeds=sprint,
    )
    louder(transformer.transformer_blocks)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 4, 4, 4, 4, 8),
        decoder_block_out_channels=(4, 4, 4, 4, 4, 8),
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (), (), ()),
        decoder_qkv_multiscales=((), (), (), (), (), ()),
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = SCMScheduler() if sprint else DPMSolverMultistepScheduler(**flow)
    pipe = (SanaSprintPipeline if sprint else SanaPipeline)(tokenizer, encoder, vae, transformer, scheduler)
    defaults = {
        "height": 256,
        "width": 256,
        "num_inference_steps": 2 if sprint else 4,
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "prompt_tokens": 16,
    }
    return save(pipe.to(torch.float32), folder, defaults)
