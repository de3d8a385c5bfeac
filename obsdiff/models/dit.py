"""DiT: pictures of an ImageNet class, without text (arXiv 2212.09748).

Height and width are those it was trained at: the pipeline draws no other, and the denoiser takes pictures for square.
"""

from collections.abc import Sequence
from typing import Any

from obsdiff.errors import InputError
from obsdiff.models.pixart import ATTENTION, FEED_FORWARD, NEURONS, SELF_HEADS, out_channels
from obsdiff.models.spec import Blocks, Input, ModelSpec


def class_labels(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Prompts as numbers of classes: each is such a number, or a label that the pipeline knows (id2label)."""
    count, labels = int(pipe.transformer.config["num_embeds_ada_norm"]), pipe.labels

    def number(prompt: str) -> int:
        text = prompt.strip()
        if text in labels:
            return int(labels[text])
        if text.isdecimal() and int(text) < count:
            return int(text)
        known = f", or a label, such as {', '.join(list(labels)[:3])}" if labels else ""
        raise InputError(f"{prompt!r} is no class of this model: write a number from 0 to {count - 1}{known}")

    return {"class_labels": [number(prompt) for prompt in prompts]}


DIT = ModelSpec(
    family="dit",
    title="DiT (ImageNet classes)",
    pipelines=("DiTPipeline",),
    denoiser="DiTTransformer2DModel",
    component="transformer",
    blocks=(Blocks("transformer_blocks", (*ATTENTION, *FEED_FORWARD), (SELF_HEADS, NEURONS)),),
    inputs=(
        Input("hidden_states", ("batch", "in_channels", "sample_size", "sample_size")),
        Input("timestep", ("batch",), "float32", draw=1000),
        Input("class_labels", ("batch",), "int64", draw=1000),
    ),
    output=Input("sample", ("batch", out_channels, "sample_size", "sample_size")),
    tokens=(1, 1, 1),
    patch="patch_size",
    embeds=(),
    carried=("hidden_states",),
    aliases={"Transformer2DModel": {"norm_type": "ada_norm_zero"}},
    prompts=tuple(str(number) for number in range(5, 1000, 10)),
    arguments=class_labels,
)
