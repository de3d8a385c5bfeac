"""A random Wan 2.1 pipeline: three-dimensional patches and rotary positions, norms of queries and keys across heads,
a norm before the cross attention, a text encoder of its own kind (UMT5) padded with zeros."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from obsdiff.models.source import find_source, load_pipeline
from tiny import louder, save


def make(folder: Path) -> Path:
    tokenizer = load_pipeline(find_source("fashion")).tokenizer
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=3,
        rope_max_seq_len=32,
    )
    louder(transformer.blocks)
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer, encoder, vae, scheduler, transformer).to(torch.float32)
    defaults = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "prompt_tokens": 16,
    }
    return save(pipe, folder, defaults)
