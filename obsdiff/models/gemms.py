"""The products of matrices in one call of a denoiser: which there are, how large, and how often."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obsdiff.models import graph, layers
from obsdiff.models.spec import Config, ModelSpec


@dataclass(frozen=True)
class Gemm:
    """One linear, or convolution as a matrix: weight `shape` [out, in] times `rows` inputs, over all its calls.

    `scope` is its name in the graph, where the denoiser may lie inside of another module.
    """

    name: str
    scope: str
    shape: tuple[int, int]
    rows: int

    @property
    def macs(self) -> int:
        return self.rows * self.shape[0] * self.shape[1]


def find_gemms(denoiser: nn.Module, spec: ModelSpec, config: Config, axes: Mapping[str, int]) -> list[Gemm]:
    """What one call at these values of the dynamic axes multiplies, in forward order.

    The denoiser must live on the meta device: nothing is computed. Convolutions in groups are no single matrix and
    are left out; so are linears that the call does not reach.
    """
    names = {module: name for name, module in denoiser.named_modules()}
    whole = graph.TensorDenoiser(denoiser, spec)
    scopes = {module: name for name, module in whole.named_modules()}
    rows: dict[layers.Layer, int] = {}

    def count(layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        rows[layer] = rows.get(layer, 0) + output.numel() // len(layer.weight)

    for module in whole.modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            module.register_forward_hook(count)
    with torch.no_grad():
        whole(*graph.random_inputs(spec, config, axes, device="meta").values())
    return [
        Gemm(names.get(layer, scopes[layer]), scopes[layer], layers.matrix_shape(layer), n) for layer, n in rows.items()
    ]
