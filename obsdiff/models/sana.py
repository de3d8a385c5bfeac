"""Sana: linear attention over image tokens, cross attention to a Gemma's, gated convolutions (arXiv 2410.10629).

Sana 1.5 and Sprint normalise queries and keys across all heads: there no head can go without the others.
"""

from dataclasses import replace

from torch import nn

from obsdiff.models.pixart import ATTENTION, CROSS, CROSS_HEADS, EMBEDS, SELF_HEADS, any_size, out_channels
from obsdiff.models.spec import Blocks, Group, Input, ModelSpec, Span


def _traceable(denoiser: nn.Module) -> nn.Module:
    """The 4K model has position embeddings, the others have none."""
    return any_size("patch_embed", denoiser) if denoiser.patch_embed.pos_embed is not None else denoiser  # type: ignore[union-attr]


# A neuron is a channel and its gate through two convolutions: the second, 3x3 of each channel alone, mixes none.
NEURONS = Group(
    "ff",
    "neurons",
    (Span("ff.conv_inverted", copies=2), Span("ff.conv_depth", copies=2)),
    (Span("ff.conv_point"),),
)
LAYERS = (*ATTENTION, *CROSS, (("ff.conv_inverted",),), (("ff.conv_point",),))
HEADS = (replace(SELF_HEADS, unless="attn1.norm_q"), replace(CROSS_HEADS, unless="attn2.norm_q"))

SANA = ModelSpec(
    family="sana",
    title="Sana 1.0, 1.5, Sprint",
    pipelines=("SanaPipeline", "SanaSprintPipeline"),
    denoiser="SanaTransformer2DModel",
    component="transformer",
    blocks=(Blocks("transformer_blocks", LAYERS, (*HEADS, NEURONS)),),
    inputs=(
        Input("hidden_states", ("batch", "in_channels", "height", "width")),
        Input("encoder_hidden_states", ("batch", "tokens", "caption_channels")),
        Input("timestep", ("batch",), "float32", draw=1000),
        Input("guidance", ("batch",), "float32", draw=1, when="guidance_embeds"),  # Sprint: a tenth of the scale
        Input("encoder_attention_mask", ("batch", "tokens"), "int64", draw=2),
    ),
    output=Input("sample", ("batch", out_channels, "height", "width")),
    tokens=(1, 300, 512),
    patch="patch_size",
    embeds=EMBEDS,
    call={"use_resolution_binning": False},  # draws what was asked for, not the nearest size of a list
    carried=("hidden_states",),
    graph=_traceable,
)
