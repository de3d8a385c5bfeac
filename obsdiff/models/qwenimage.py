"""Qwen-Image: joint attention over image and text tokens, both streams to the end (arXiv 2508.02324)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsdiff.errors import InputError
from obsdiff.models.flux import ADDED_QKV, HEADS, QKV, out_channels
from obsdiff.models.rotary import rotary_table, rotate
from obsdiff.models.spec import Blocks, Group, Input, ModelSpec, spans

LAYERS = (
    (QKV, ADDED_QKV),
    (("attn.to_out.0",), ("attn.to_add_out",)),
    (("img_mlp.net.0.proj",), ("txt_mlp.net.0.proj",)),
    (("img_mlp.net.2",), ("txt_mlp.net.2",)),
)
GROUPS = (
    HEADS,
    Group("img_mlp", "neurons", spans("img_mlp.net.0.proj"), spans("img_mlp.net.2")),
    Group("txt_mlp", "neurons", spans("txt_mlp.net.0.proj"), spans("txt_mlp.net.2")),
)
THETA = 10000.0
OTHERS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # of the editing and layered models


class JointAttention:
    """The blocks' attention processor with positions from tables of real numbers; it takes complex ones as well.

    The mask of the text is one of bool, or a bias: zero for a token that counts, minus infinity for one that does not.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: None = None,
        *,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        image_table, text_table = image_rotary_emb
        tokens, heads = encoder_hidden_states.shape[1], (attn.heads, -1)
        image = [linear(hidden_states).unflatten(-1, heads) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [linear(encoder_hidden_states).unflatten(-1, heads) for linear in added]
        query = torch.cat(
            (rotate(attn.norm_added_q(text[0]), text_table), rotate(attn.norm_q(image[0]), image_table)), 1
        )
        key = torch.cat((rotate(attn.norm_added_k(text[1]), text_table), rotate(attn.norm_k(image[1]), image_table)), 1)
        value = torch.cat((text[2], image[2]), 1)
        mask = encoder_hidden_states_mask
        if mask is not None:
            image_mask = torch.full_like(hidden_states[..., 0], mask.dtype == torch.bool, dtype=mask.dtype)
            mask = torch.cat((mask, image_mask), 1)[:, None, None]
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed[:, tokens:]), attn.to_add_out(mixed[:, :tokens])


class RealPositions(nn.Module):
    """The denoiser with the positions of its tokens as inputs; its layers are the denoiser's own."""

    def __init__(self, denoiser: Any):
        super().__init__()
        if odd := [name for name in OTHERS if denoiser.config.get(name)]:
            raise InputError(f"a Qwen-Image with {odd[0]} is not for text to image: it can be pruned, but not exported")
        for block in denoiser.transformer_blocks:
            block.attn.set_processor(JointAttention())
        self.denoiser = denoiser

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        own = self.denoiser
        image, text = own.img_in(hidden_states), own.txt_in(own.txt_norm(encoder_hidden_states))
        time = own.time_text_embed(timestep, image)
        tables = tuple(rotary_table(ids, own.config.axes_dims_rope, THETA) for ids in (img_ids, txt_ids))
        bias = torch.zeros_like(text[..., 0]).masked_fill(encoder_hidden_states_mask == 0, float("-inf"))
        for block in own.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=bias,
                temb=time,
                image_rotary_emb=tables,
            )
        return (own.proj_out(own.norm_out(image, time)),)


def _feeds(_denoiser: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Positions for a picture's shape, and a mask where the pipeline leaves it out since all tokens count."""
    named = dict(arguments)
    text = named["encoder_hidden_states"]
    if named.get("encoder_hidden_states_mask") is None:
        named["encoder_hidden_states_mask"] = text.new_ones(text.shape[:2])
    _frames, height, width = named.pop("img_shapes")[0][0]
    rows, columns = (torch.arange(side) - (side - side // 2) for side in (height, width))  # 0 is in the middle
    image = torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())
    after = max(height // 2, width // 2) + torch.arange(text.shape[1])  # text lies on the diagonal behind the image
    named["img_ids"], named["txt_ids"] = image.to(text.device), after[:, None].expand(-1, 3).float().to(text.device)
    named.pop("attention_kwargs", None)
    return named


QWENIMAGE = ModelSpec(
    family="qwenimage",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    denoiser="QwenImageTransformer2DModel",
    component="transformer",
    blocks=(Blocks("transformer_blocks", LAYERS, GROUPS),),
    inputs=(
        Input("hidden_states", ("batch", "image", "in_channels")),
        Input("encoder_hidden_states", ("batch", "tokens", "joint_attention_dim")),
        Input("encoder_hidden_states_mask", ("batch", "tokens"), "int64", draw=2),
        Input("timestep", ("batch",), "float32", draw=1),
        Input("img_ids", ("image", 3), "float32", draw=64),
        Input("txt_ids", ("tokens", 3), "float32", draw=64),
    ),
    output=Input("sample", ("batch", "image", out_channels)),
    tokens=(1, 128, 1024),
    patch=2,  # of the latents, which come packed
    embeds=("prompt_embeds", "prompt_embeds_mask"),
    negative_embeds=("negative_prompt_embeds", "negative_prompt_embeds_mask"),
    negative_prompt=" ",
    guidance="true_cfg_scale",
    passes=1,
    sample_size=128,
    carried=("encoder_hidden_states", "hidden_states"),
    graph=RealPositions,
    feeds=_feeds,
)
