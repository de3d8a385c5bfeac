"""SDXL in small: linear projections around the attentions, several transformer blocks in each, heads that differ by
level, two text encoders side by side, and sizes and the pooled prompt added to the time embedding."""

from pathlib import Path

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from tiny import louder, save
from tiny.unet import encoders_and_vae

DEFAULTS = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 4.0, "prompt_tokens": 12}


def make(folder: Path) -> Path:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=128,  # both encoders' hidden states beside each other
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    louder(unet)
    pipe = StableDiffusionXLPipeline(
        **encoders_and_vae(2),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    return save(pipe, folder, DEFAULTS)
