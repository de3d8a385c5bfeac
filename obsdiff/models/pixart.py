"""PixArt-α and PixArt-Σ: self attention over image tokens, cross attention to a T5's (arXiv 2310.00426, 2403.04692)."""

import copy
from typing import Any

from torch import nn

from obsdiff.models.spec import Blocks, Config, Group, Input, ModelSpec, Span


def _heads(name: str) -> Group:
    rows = tuple(Span(f"{name}.{linear}") for linear in ("to_q", "to_k", "to_v"))
    return Group(name, "heads", rows, (Span(f"{name}.to_out.0"),), f"{name}.heads", (f"{name}.inner_dim",))


def out_channels(config: Config) -> int:
    """As many as come in where the config names none."""
    return int(config.get("out_channels") or config["in_channels"])


def knows_size(config: Config) -> bool:
    """Whether the denoiser is told resolution and aspect ratio: α at 1024 pixels, unless the config says otherwise."""
    said = config.get("use_additional_conditions")
    return bool(config.get("sample_size", 128) == 128 if said is None else said)


def any_size(name: str, denoiser: nn.Module) -> nn.Module:
    """The denoiser, with position embeddings that its patch embedding `name` computes for every picture.

    Those that it keeps for the size it was trained at would make a graph for that size alone.
    """
    embed: Any = copy.copy(denoiser.get_submodule(name))
    embed.height = embed.width = -1
    twin = copy.copy(denoiser)
    twin._modules = {**denoiser._modules, name: embed}
    return twin


ATTENTION = (("attn1.to_q", "attn1.to_k", "attn1.to_v"),), (("attn1.to_out.0",),)
CROSS = (("attn2.to_q",), ("attn2.to_k", "attn2.to_v")), (("attn2.to_out.0",),)
FEED_FORWARD = (("ff.net.0.proj",),), (("ff.net.2",),)
SELF_HEADS, CROSS_HEADS = _heads("attn1"), _heads("attn2")
NEURONS = Group("ff", "neurons", (Span("ff.net.0.proj"),), (Span("ff.net.2"),))
EMBEDS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)

PIXART = ModelSpec(
    family="pixart",
    title="PixArt-α, PixArt-Σ",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    denoiser="PixArtTransformer2DModel",
    component="transformer",
    blocks=(Blocks("transformer_blocks", (*ATTENTION, *CROSS, *FEED_FORWARD), (SELF_HEADS, CROSS_HEADS, NEURONS)),),
    inputs=(
        Input("hidden_states", ("batch", "in_channels", "height", "width")),
        Input("encoder_hidden_states", ("batch", "tokens", "caption_channels")),
        Input("timestep", ("batch",), "float32", draw=1000),
        Input("encoder_attention_mask", ("batch", "tokens"), "int64", draw=2),
        Input("resolution", ("batch", 2), "float32", draw=1024, inside="added_cond_kwargs", when=knows_size),
        Input("aspect_ratio", ("batch", 1), "float32", draw=2, inside="added_cond_kwargs", when=knows_size),
    ),
    output=Input("sample", ("batch", out_channels, "height", "width")),
    tokens=(1, 300, 512),
    patch="patch_size",
    embeds=EMBEDS,
    call={"use_resolution_binning": False},  # draws what was asked for, not the nearest size of a list
    carried=("hidden_states",),
    aliases={"Transformer2DModel": {"norm_type": "ada_norm_single"}},
    graph=lambda denoiser: any_size("pos_embed", denoiser),
)
