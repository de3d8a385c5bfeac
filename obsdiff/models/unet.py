"""Stable Diffusion 1.x, 2.x (arXiv 2112.10752) and SDXL (arXiv 2307.01952): convolutional U-Nets with cross-attention.

A U-Net is no chain of blocks: what a level of the way down gives is read again on the way up. Its blocks are listed
here path by path, in the order in which they run; what a U-Net lacks is skipped. Convolutions are pruned as matrices
(models/layers.py). The ResNet blocks' projections of the time embedding stay dense: they are small and run once a call.
Their hidden channels are no group, because a GroupNorm between the two convolutions mixes them.
"""

from obsdiff.models.spec import Blocks, Config, Group, Input, ModelSpec, Span

LEVELS = 4
RESNETS = 5  # of a level: one more on the way up than on the way down

RESNET = ((("conv1",), ("conv_shortcut",)), (("conv2",),))  # the shortcut reads what comes in, before the first norm
TRANSFORMER = (
    (("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    (("attn1.to_out.0",),),
    (("attn2.to_q",), ("attn2.to_k", "attn2.to_v")),  # keys and values of the prompt
    (("attn2.to_out.0",),),
    (("ff.net.0.proj",),),
    (("ff.net.2",),),
)


def _heads(attention: str) -> Group:
    rows = tuple(Span(f"{attention}.{name}") for name in ("to_q", "to_k", "to_v"))
    return Group(attention, "heads", rows, (Span(f"{attention}.to_out.0"),), f"{attention}.heads")


GROUPS = (
    _heads("attn1"),
    _heads("attn2"),
    Group("ff", "neurons", (Span("ff.net.0.proj", copies=2),), (Span("ff.net.2"),)),  # GEGLU
)


def _attention(path: str) -> tuple[Blocks, ...]:
    return (
        Blocks(path, ((("proj_in",),),)),
        Blocks(f"{path}.transformer_blocks", TRANSFORMER, GROUPS),
        Blocks(path, ((("proj_out",),),)),
    )


def _level(path: str) -> tuple[Blocks, ...]:
    """ResNet and attention in turn, then the way to the next level."""
    pairs = ((Blocks(f"{path}.resnets.{k}", RESNET), *_attention(f"{path}.attentions.{k}")) for k in range(RESNETS))
    samplers = (Blocks(f"{path}.{name}", ((("conv",),),)) for name in ("downsamplers", "upsamplers"))
    return (*(blocks for pair in pairs for blocks in pair), *samplers)


PATHS = (
    *(f"down_blocks.{k}" for k in range(LEVELS)),
    "mid_block",
    *(f"up_blocks.{k}" for k in range(LEVELS)),
)


def _pooled_width(config: Config) -> int:
    """Of SDXL's pooled prompt, which goes beside six embedded numbers: original size, crop, target size."""
    return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])


UNET = ModelSpec(
    family="unet",
    title="Stable Diffusion 1, 2, XL",
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    denoiser="UNet2DConditionModel",
    component="unet",
    blocks=tuple(blocks for path in PATHS for blocks in _level(path)),
    inputs=(
        Input("sample", ("batch", "in_channels", "height", "width")),
        Input("timestep", ("batch",), "float32", draw=1000),
        Input("encoder_hidden_states", ("batch", "tokens", "cross_attention_dim")),
        Input("timestep_cond", ("batch", "time_cond_proj_dim"), when="time_cond_proj_dim"),  # LCM: the guidance scale
        # Both in float32, as the sizes are once embedded: ONNX cannot join two kinds of numbers.
        Input(
            "text_embeds",
            ("batch", _pooled_width),
            "float32",
            inside="added_cond_kwargs",
            when="addition_embed_type",
        ),
        Input("time_ids", ("batch", 6), "float32", draw=1024, inside="added_cond_kwargs", when="addition_embed_type"),
    ),
    output=Input("out_sample", ("batch", "out_channels", "height", "width")),
    tokens=(1, 77, 231),  # a prompt in up to three pieces, as long-prompt tools make them
    patch=lambda config: 2 ** (len(config["block_out_channels"]) - 1),  # each level halves the sides
    embeds=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    encode={"num_images_per_prompt": 1},
    attributes={
        "add_embedding.linear_1.in_features": lambda config: config.get("projection_class_embeddings_input_dim") or 0
    },
)
