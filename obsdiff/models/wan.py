"""Wan 2.1 and 2.2: text to video with cross attention to the text (arXiv 2503.20314); here for pictures, one frame."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from obsdiff.models.spec import Blocks, Group, Input, ModelSpec, Span

LAYERS = (
    (("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    (("attn1.to_out.0",),),
    (("attn2.to_q",), ("attn2.to_k", "attn2.to_v")),
    (("attn2.to_out.0",),),
    (("ffn.net.0.proj",),),
    (("ffn.net.2",),),
)
GROUPS = (Group("ffn", "neurons", (Span("ffn.net.0.proj"),), (Span("ffn.net.2"),)),)


def _one_timestep(_denoiser: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Wan 2.2's 5B model is given a timestep for each token, all the same where no picture is given."""
    timestep = arguments["timestep"]
    return {**arguments, "timestep": timestep[:, 0] if timestep.ndim == 2 else timestep}


WAN = ModelSpec(
    family="wan",
    title="Wan 2.1, 2.2 (pictures)",
    pipelines=("WanPipeline",),
    denoiser="WanTransformer3DModel",
    component="transformer",
    blocks=(Blocks("blocks", LAYERS, GROUPS),),
    inputs=(
        Input("hidden_states", ("batch", "in_channels", 1, "height", "width")),
        Input("timestep", ("batch",), "float32", draw=1000),
        Input("encoder_hidden_states", ("batch", "tokens", "text_dim")),
    ),
    output=Input("sample", ("batch", "out_channels", 1, "height", "width")),
    tokens=(1, 512, 512),
    patch=lambda config: int(config["patch_size"][1]),
    embeds=("prompt_embeds", "negative_prompt_embeds"),
    passes=1,
    encode={"max_sequence_length": 512},  # what __call__ takes; encode_prompt alone would take 226
    call={"num_frames": 1},
    carried=("hidden_states",),
    heads_refused="its attention normalises queries and keys across all heads, so no head can go without the others",
    feeds=_one_timestep,
)
