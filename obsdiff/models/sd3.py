"""Stable Diffusion 3 and 3.5: joint attention over image and text tokens (arXiv 2403.03206)."""

from obsdiff.models.spec import Blocks, Group, Input, ModelSpec, spans

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
QKV2 = ("attn2.to_q", "attn2.to_k", "attn2.to_v")  # SD3.5-medium's second, image-only attention

LAYERS = (
    (QKV, ADDED_QKV, QKV2),
    (("attn.to_out.0",), ("attn.to_add_out",), ("attn2.to_out.0",)),
    (("ff.net.0.proj",), ("ff_context.net.0.proj",)),
    (("ff.net.2",), ("ff_context.net.2",)),
)
GROUPS = (
    Group(
        "attn",
        "heads",
        spans(*QKV, *ADDED_QKV),
        spans("attn.to_out.0", "attn.to_add_out"),
        "attn.heads",
    ),
    Group("attn2", "heads", spans(*QKV2), spans("attn2.to_out.0"), "attn2.heads"),
    Group("ff", "neurons", spans("ff.net.0.proj"), spans("ff.net.2")),
    Group("ff_context", "neurons", spans("ff_context.net.0.proj"), spans("ff_context.net.2")),
)

SD3 = ModelSpec(
    family="sd3",
    title="Stable Diffusion 3, 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    denoiser="SD3Transformer2DModel",
    component="transformer",
    blocks=(Blocks("transformer_blocks", LAYERS, GROUPS),),
    inputs=(
        Input("hidden_states", ("batch", "in_channels", "height", "width")),
        Input("encoder_hidden_states", ("batch", "tokens", "joint_attention_dim")),
        Input("pooled_projections", ("batch", "pooled_projection_dim")),
        Input("timestep", ("batch",), "float32", draw=1000),
    ),
    output=Input("sample", ("batch", "out_channels", "height", "width")),
    tokens=(1, 333, 589),
    patch="patch_size",
    embeds=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    encode={"prompt_2": None, "prompt_3": None},
    carried=("encoder_hidden_states", "hidden_states"),
)
