"""Z-Image: one stream of image and text tokens, each refined on its own first (arXiv 2511.22699)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsdiff.models.rotary import rotary_table, rotate
from obsdiff.models.spec import Blocks, Group, Input, ModelSpec, Span

QKV = ("attention.to_q", "attention.to_k", "attention.to_v")
GATED = ("feed_forward.w1", "feed_forward.w3")
LAYERS = (
    (QKV,),
    (("attention.to_out.0",),),
    (GATED,),
    (("feed_forward.w2",),),
)
GROUPS = (
    Group(
        "attention",
        "heads",
        tuple(Span(linear) for linear in QKV),
        (Span("attention.to_out.0"),),
        "attention.heads",
        ("attention.inner_dim",),
    ),
    Group("feed_forward", "neurons", tuple(Span(linear) for linear in GATED), (Span("feed_forward.w2"),)),
)
PATCH = 2
KIND = f"{PATCH}-1"  # the patches of pictures, among those that a denoiser may have layers for
MULTIPLE = 32  # a caption, and a picture's tokens, are filled up to a multiple of it with a learned token


class Attention:
    """The blocks' attention processor with positions from tables of real numbers; it takes complex ones as well."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        linears, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
        heads = [linear(hidden_states).unflatten(-1, (attn.heads, -1)) for linear in linears]
        heads = [norm(part) if norm else part for norm, part in zip(norms, heads, strict=True)]
        if freqs_cis is not None:
            heads[:2] = [rotate(part, freqs_cis) for part in heads[:2]]
        mask = None if attention_mask is None else attention_mask[:, None, None]
        query, key, value = (part.transpose(1, 2) for part in heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, mask)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class Batched(nn.Module):
    """The denoiser on tensors in the place of lists: pictures of one size, captions filled up to one length.

    The tokens that fill a picture up are all alike and stay so. They are one token here, whose weight in the attention
    is their number: the graph needs no axis of a rounded length.
    """

    def __init__(self, denoiser: Any):
        super().__init__()
        self.denoiser = denoiser
        for blocks in (denoiser.noise_refiner, denoiser.context_refiner, denoiser.layers):
            for block in blocks:
                block.attention.set_processor(Attention())

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        caption_lengths: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        own, dtype = self.denoiser, hidden_states.dtype
        time = own.t_embedder(timestep * own.t_scale).to(dtype)
        patches = hidden_states[:, :, 0].unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        height, width = patches.shape[2], patches.shape[4]
        image = own.all_x_embedder[KIND](patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        image = torch.cat((image, own.x_pad_token.expand(image.shape[0], 1, -1)), dim=1)
        place = torch.arange(encoder_hidden_states.shape[1], device=image.device)
        filled = ((caption_lengths.clamp(min=1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE)[:, None]
        caption = own.cap_embedder(encoder_hidden_states)
        caption = torch.where((place < caption_lengths[:, None])[..., None], caption, own.cap_pad_token)

        image_table, caption_table = self._tables(filled, place, height, width)
        image_bias = _count_fillers(image[..., 0]).to(dtype)
        caption_bias = torch.zeros_like(caption[..., 0]).masked_fill(place >= filled, float("-inf"))
        for block in own.noise_refiner:
            image = block(image, image_bias, image_table, time)
        for block in own.context_refiner:
            caption = block(caption, caption_bias, caption_table)
        tokens = torch.cat((image, caption), dim=1)
        bias = torch.cat((image_bias, caption_bias), dim=1)
        table = torch.cat((image_table, caption_table), dim=1)
        for block in own.layers:
            tokens = block(tokens, bias, table, time)
        sample = own.all_final_layer[KIND](tokens[:, : height * width], c=time)
        sample = sample.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (height, width))
        return (sample.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).unsqueeze(2),)

    def _tables(self, filled: Tensor, place: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """A caption's tokens are numbered along the first axis, from 1; its picture comes after them, as a plane."""
        own, batch = self.denoiser, filled.shape[0]
        rows, columns = (torch.arange(side, device=place.device) for side in (height, width))
        plane = torch.stack((rows[:, None].expand(-1, width), columns.expand(height, -1)), dim=-1).flatten(0, 1)
        first = (filled + 1)[:, None].expand(-1, height * width, -1)
        image = torch.cat((first, plane.expand(batch, -1, -1)), dim=-1)
        image = functional.pad(image, (0, 0, 0, 1)).float()  # the filling token is at 0, 0, 0
        caption = functional.pad((place + 1)[:, None], (0, 2)).float().expand(batch, -1, -1)
        return rotary_table(image, own.axes_dims, own.rope_theta), rotary_table(caption, own.axes_dims, own.rope_theta)


def _count_fillers(tokens: Tensor) -> Tensor:
    """What the attention adds for each of a picture's tokens [batch, n], the last of which stands for all fillers.

    A key that is there m times counts as one whose score is higher by log(m); by minus infinity where there is none.
    """
    zeros = torch.zeros_like(tokens[:, :-1], dtype=torch.float32)
    fillers = torch.remainder(-(zeros + 1).sum(dim=1, keepdim=True), MULTIPLE)
    return torch.cat((zeros, fillers.log()), dim=1)


def _feeds(_denoiser: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One tensor for the pictures and one for the captions, which come as lists."""
    named = dict(arguments)
    pictures, timestep, captions = (named.pop(name) for name in ("x", "t", "cap_feats"))
    lengths = [len(caption) for caption in captions]
    longest = -(-max(lengths) // MULTIPLE) * MULTIPLE
    padded = [functional.pad(caption, (0, 0, 0, longest - len(caption))) for caption in captions]
    return {
        **named,
        "hidden_states": torch.stack(list(pictures)),
        "timestep": timestep,
        "encoder_hidden_states": torch.stack(padded),
        "caption_lengths": torch.tensor(lengths, device=timestep.device),
    }


ZIMAGE = ModelSpec(
    family="zimage",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    denoiser="ZImageTransformer2DModel",
    component="transformer",
    blocks=tuple(Blocks(path, LAYERS, GROUPS) for path in ("noise_refiner", "context_refiner", "layers")),
    inputs=(
        Input("hidden_states", ("batch", "in_channels", 1, "height", "width")),
        Input("timestep", ("batch",), "float32", draw=1),
        Input("encoder_hidden_states", ("batch", "tokens", "cap_feat_dim")),
        Input("caption_lengths", ("batch",), "int64", draw=64),
    ),
    output=Input("sample", ("batch", "in_channels", 1, "height", "width")),
    tokens=(1, 64, 512),
    patch=PATCH,
    embeds=("prompt_embeds", "negative_prompt_embeds"),
    guided_above=0,
    sample_size=128,
    attributes={"in_channels": "in_channels"},
    graph=Batched,
    feeds=_feeds,
)
