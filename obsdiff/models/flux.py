"""FLUX.1: joint attention over image and text tokens, then blocks that run attention and MLP side by side."""

from typing import Any

from torch import Tensor, nn

from obsdiff.models.spec import Blocks, Config, Group, Input, ModelSpec, Span, spans


def out_channels(config: Config) -> int:
    """Numbers for each token: a patch of each channel, where out_channels is null as many channels as come in."""
    return int(config.get("out_channels") or config["in_channels"]) * int(config["patch_size"]) ** 2


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
HEADS = Group(
    "attn",
    "heads",
    spans(*QKV, *ADDED_QKV),
    spans("attn.to_out.0", "attn.to_add_out"),
    "attn.heads",
    ("attn.inner_dim",),
)

DOUBLE = Blocks(
    "transformer_blocks",
    layers=(
        (QKV, ADDED_QKV),
        (("attn.to_out.0",), ("attn.to_add_out",)),
        (("ff.net.0.proj",), ("ff_context.net.0.proj",)),
        (("ff.net.2",), ("ff_context.net.2",)),
    ),
    groups=(
        HEADS,
        Group("ff", "neurons", spans("ff.net.0.proj"), spans("ff.net.2")),
        Group("ff_context", "neurons", spans("ff_context.net.0.proj"), spans("ff_context.net.2")),
    ),
)
# The columns of a single block's proj_out read the attention first, then the MLP.
SINGLE = Blocks(
    "single_transformer_blocks",
    layers=(((*QKV, "proj_mlp"),), (("proj_out",),)),
    groups=(
        Group(
            "attn",
            "heads",
            spans(*QKV),
            (Span("proj_out", before=("mlp_hidden_dim",)),),
            "attn.heads",
            ("attn.inner_dim",),
        ),
        Group(
            "mlp",
            "neurons",
            spans("proj_mlp"),
            (Span("proj_out", after=("attn.inner_dim",)),),
            scaled=("mlp_hidden_dim",),
        ),
    ),
)


class ExactTime(nn.Module):
    """The denoiser with timestep and guidance embedded as the float32 that they are.

    It casts them to the weights' precision first and multiplies them by 1000 then: in half precision a timestep can be
    off by a quarter, in bf16 by two, and the fastest of the sines that embed it turn by a radian in one.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, timestep: Tensor, guidance: Tensor | None = None, **others: Any) -> Any:
        exact = [value * 1000 for value in (timestep, guidance) if value is not None]  # in the order of their embedding
        names = ("time_text_embed", "time_guidance_embed")
        embedding = next(part for name, part in self.denoiser.named_children() if name in names)
        sines = embedding.get_submodule("time_proj")
        handle = sines.register_forward_pre_hook(lambda _module, _args: (exact.pop(0),))
        try:
            return self.denoiser(timestep=timestep, guidance=guidance, **others)
        finally:
            handle.remove()


FLUX = ModelSpec(
    family="flux",
    title="FLUX.1 dev, schnell",
    pipelines=("FluxPipeline",),
    denoiser="FluxTransformer2DModel",
    component="transformer",
    blocks=(DOUBLE, SINGLE),
    inputs=(
        Input("hidden_states", ("batch", "image", "in_channels")),
        Input("encoder_hidden_states", ("batch", "tokens", "joint_attention_dim")),
        Input("pooled_projections", ("batch", "pooled_projection_dim")),
        Input("timestep", ("batch",), "float32", draw=1),
        Input("img_ids", ("image", 3), "float32", draw=64),
        Input("txt_ids", ("tokens", 3), "float32", draw=64),
        Input("guidance", ("batch",), "float32", draw=5, when="guidance_embeds"),
    ),
    output=Input("sample", ("batch", "image", out_channels)),
    tokens=(1, 512, 512),
    patch=2,  # of the latents, which come packed
    embeds=("prompt_embeds", "pooled_prompt_embeds", None),
    passes=1,
    sample_size=128,
    carried=("encoder_hidden_states", "hidden_states"),
    graph=ExactTime,
)
