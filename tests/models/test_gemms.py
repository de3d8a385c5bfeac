"""The products of a call: every linear and convolution, with the rows that it is really given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from obsdiff.models import graph
from obsdiff.models.gemms import find_gemms
from obsdiff.models.source import find_source, load_denoiser, meta_denoiser

AXES = {"batch": 2, "height": 8, "width": 4, "tokens": 5}


@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_rows_are_what_the_layers_of_a_real_call_are_given(tiny_model: Callable[[str], Path], family: str) -> None:
    source = find_source(tiny_model(family))
    denoiser = load_denoiser(source, torch.float32)
    seen: dict[str, int] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: object, output: torch.Tensor) -> None:
            out = output.shape[-1] if isinstance(denoiser.get_submodule(name), nn.Linear) else output.shape[1]
            seen[name] = seen.get(name, 0) + output.numel() // out

        return hook

    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        graph.TensorDenoiser(denoiser, source.spec)(*graph.random_inputs(source.spec, source.config, AXES).values())
    gemms = find_gemms(meta_denoiser(source), source.spec, source.config, AXES)
    assert {gemm.name: gemm.rows for gemm in gemms} == seen
    for gemm in gemms:
        weight = denoiser.get_parameter(f"{gemm.name}.weight")
        assert gemm.shape == (len(weight), weight[0].numel())
    macs = graph.count_macs(meta_denoiser(source), source.spec, source.config, AXES)
    assert 0.5 * macs < sum(gemm.macs for gemm in gemms) < macs, "the rest is attention"


def test_a_depthwise_convolution_is_no_matrix(tiny_model: Callable[[str], Path]) -> None:
    source = find_source(tiny_model("sana"))
    denoiser = meta_denoiser(source)
    apart = {n for n, m in denoiser.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert apart
    names = {gemm.name for gemm in find_gemms(denoiser, source.spec, source.config, AXES)}
    assert names
    assert not names & apart


def test_names_are_the_denoisers_own_where_the_graph_wraps_it(tiny_model: Callable[[str], Path]) -> None:
    source = find_source(tiny_model("flux"))
    denoiser = meta_denoiser(source)
    linears = {name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    gemms = find_gemms(denoiser, source.spec, source.config, AXES)
    assert {gemm.name for gemm in gemms} <= linears
    assert all(gemm.scope.endswith(gemm.name) and gemm.scope != gemm.name for gemm in gemms)
