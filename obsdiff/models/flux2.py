"""FLUX.2 dev and klein: as FLUX.1, with gated MLPs and one projection into and one out of each single block.

Its single blocks take text and image as one tensor, its double blocks as two: they form no chain.
"""

from obsdiff.models.flux import ADDED_QKV, HEADS, QKV, ExactTime, out_channels
from obsdiff.models.spec import Blocks, Config, Group, Input, ModelSpec, Span


def _position_axes(config: Config) -> int:
    return len(config["axes_dims_rope"])


def _feed_forward(name: str) -> Group:
    return Group(name, "neurons", (Span(f"{name}.linear_in", copies=2),), (Span(f"{name}.linear_out"),))


DOUBLE = Blocks(
    "transformer_blocks",
    layers=(
        (QKV, ADDED_QKV),
        (("attn.to_out.0",), ("attn.to_add_out",)),
        (("ff.linear_in",), ("ff_context.linear_in",)),
        (("ff.linear_out",), ("ff_context.linear_out",)),
    ),
    groups=(HEADS, _feed_forward("ff"), _feed_forward("ff_context")),
)
# In: the rows of queries, keys and values, then of the MLP's gate and value. Out: the columns of attention, then MLP.
HEADS_WIDTH, MLP_WIDTH = "attn.inner_dim", "attn.mlp_hidden_dim"
SINGLE = Blocks(
    "single_transformer_blocks",
    layers=((("attn.to_qkv_mlp_proj",),), (("attn.to_out",),)),
    groups=(
        Group(
            "attn",
            "heads",
            (Span("attn.to_qkv_mlp_proj", copies=3, before=(MLP_WIDTH,) * 2),),
            (Span("attn.to_out", before=(MLP_WIDTH,)),),
            "attn.heads",
            (HEADS_WIDTH,),
        ),
        Group(
            "mlp",
            "neurons",
            (Span("attn.to_qkv_mlp_proj", copies=2, after=(HEADS_WIDTH,) * 3),),
            (Span("attn.to_out", after=(HEADS_WIDTH,)),),
            scaled=(MLP_WIDTH,),
        ),
    ),
)

FLUX2 = ModelSpec(
    family="flux2",
    title="FLUX.2 dev, klein",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    denoiser="Flux2Transformer2DModel",
    component="transformer",
    blocks=(DOUBLE, SINGLE),
    inputs=(
        Input("hidden_states", ("batch", "image", "in_channels")),
        Input("encoder_hidden_states", ("batch", "tokens", "joint_attention_dim")),
        Input("timestep", ("batch",), "float32", draw=1),
        Input("img_ids", ("batch", "image", _position_axes), "int64", draw=64),
        Input("txt_ids", ("batch", "tokens", _position_axes), "int64", draw=64),
        # The configs of the first checkpoints do not say that they have it.
        Input("guidance", ("batch",), "float32", draw=5, when=lambda config: config.get("guidance_embeds", True)),
    ),
    output=Input("sample", ("batch", "image", out_channels)),
    tokens=(1, 512, 512),
    patch=2,  # of the latents, which come packed
    embeds=("prompt_embeds", None),
    negative_embeds=("negative_prompt_embeds", None),  # of klein before its distillation
    passes=1,
    sample_size=128,
    graph=ExactTime,
)
