"""A random FLUX.1-dev pipeline: two double and two single blocks, embedded guidance, rotary positions, latents packed
in twos, a CLIP encoder that gives the pooled and a T5 encoder that gives the other embedding. `guidance=False`:
schnell."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save


def make(folder: Path, guidance: bool = True) -> Path:
    own = load_pipeline(find_source("fashion"), torch.float32)
    config = own.text_encoder.config.to_dict() | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    t5 = T5Config(
        vocab_size=len(own.tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * own.vae.config.latent_channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    louder(transformer.transformer_blocks)
    louder(transformer.single_transformer_blocks)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=own.vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**config)),
        tokenizer=own.tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=own.tokenizer_2,
        transformer=transformer,
    )
    defaults = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "max_sequence_length": 16,
        "prompt_tokens": 16,
    }
    return save(pipe.to(torch.float32), folder, defaults)
