"""Stable Diffusion 1.5 in small: 1x1 convolutions around the attentions, a number of heads that its config calls
attention_head_dim, a prompt as wide as no level, three levels of which the lowest has no attention, and a config.json
that leaves out what the first diffusers did not know."""

import json
from pathlib import Path
from typing import Any

from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from obsdiff.models.source import find_source, load_pipeline, quiet_libraries
from tiny import louder, save

DEFAULTS = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 4.0, "prompt_tokens": 12}
CONFIG = {
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [16, 16, 32],
    "center_input_sample": False,
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "out_channels": 8,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def make(folder: Path) -> Path:
    unet = UNet2DConditionModel.from_config(CONFIG)
    louder(unet)
    pipe = StableDiffusionPipeline(
        **encoders_and_vae(1),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipe, folder, DEFAULTS)
    path = folder / "unet" / "config.json"
    known = {name: value for name, value in json.loads(path.read_text()).items() if name in CONFIG or name[0] == "_"}
    path.write_text(json.dumps(known))
    return folder


def encoders_and_vae(encoders: int) -> dict[str, Any]:
    """The embedded model's VAE, tokenizers and text encoders, the first without the projection that SD3 has."""
    from transformers import CLIPTextModel

    source = find_source("fashion")
    own: Any = load_pipeline(source)
    vae = own.vae.float()
    vae.register_to_config(force_upcast=False)
    with quiet_libraries():  # it says that it leaves the projection out
        first = CLIPTextModel.from_pretrained(source.path / "text_encoder").float()
    parts = {"vae": vae, "tokenizer": own.tokenizer, "text_encoder": first}
    if encoders == 2:
        parts |= {"tokenizer_2": own.tokenizer_2, "text_encoder_2": own.text_encoder_2.float()}
    return parts
