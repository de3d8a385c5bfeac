"""A denoiser as the function of tensors that its graph computes: inputs by shape, one output, what a call costs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.spec import AXES, Config, Input, ModelSpec, size_of


def with_image(axes: Mapping[str, int], spec: ModelSpec, config: Config) -> dict[str, int]:
    """The axes with the image's tokens counted, which latents packed into patches have."""
    if "height" not in axes:
        return dict(axes)
    patch = size_of(spec.patch, config)
    return {**axes, "image": axes["height"] * axes["width"] // patch**2}


def shape_of(entry: Input, config: Config, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a graph input or output for values of the dynamic axes."""
    return tuple(axes[axis] if axis in AXES else size_of(axis, config) for axis in entry.axes)


def random_inputs(
    spec: ModelSpec,
    config: Config,
    axes: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of one denoiser call at values of batch, height, width and tokens, drawn as the spec says."""
    generator = None if device == "meta" else torch.Generator().manual_seed(seed)
    where, axes = "meta" if device == "meta" else "cpu", with_image(axes, spec, config)
    inputs = {}
    for entry in spec.graph_inputs(config):
        shape, kind = shape_of(entry, config, axes), getattr(torch, entry.dtype) if entry.dtype else dtype
        if entry.draw is None:
            value = torch.randn(shape, generator=generator, device=where)
        else:
            value = torch.rand(shape, generator=generator, device=where) * entry.draw
        inputs[entry.name] = value.to(device, kind)
    return inputs


class TensorDenoiser(nn.Module):
    """A diffusers denoiser as a function of the spec's inputs, in their order, that returns one tensor."""

    def __init__(self, denoiser: nn.Module, spec: ModelSpec):
        super().__init__()
        self.entries = spec.graph_inputs(denoiser.config)  # type: ignore[arg-type]
        self.denoiser = spec.graph(denoiser) if spec.graph else denoiser

    def forward(self, *inputs: Tensor) -> Tensor:
        named: dict[str, Any] = {}
        sizes: dict[Any, int] = {}
        for entry, value in zip(self.entries, inputs, strict=True):
            for axis, size in zip(entry.axes, value.shape, strict=True):
                # A trace has to be told that the batch of one input is the batch of all.
                torch._check(axis not in AXES or size == sizes.setdefault(axis, size))
            if entry.inside:
                named.setdefault(entry.inside, {})[entry.name] = value
            else:
                named[entry.name] = value
        return self.denoiser(**named, return_dict=False)[0]


def count_macs(denoiser: nn.Module, spec: ModelSpec, config: Config, axes: Mapping[str, int]) -> int:
    """Multiply-accumulates of one denoiser call (products and attention), by torch's flop counter.

    The denoiser must live on the meta device: nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    inputs = random_inputs(spec, config, axes, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        TensorDenoiser(denoiser, spec)(*inputs.values())
    return counter.get_total_flops() // 2
