"""Real sizes: the public configurations have the public parameter counts, and one real block goes the whole way.

A block is as wide as the real model's, with random weights, alone in its denoiser: one layer is solved for 2:4 from the
inputs of a few tokens, every group loses a quarter, and the ONNX graph agrees with PyTorch in ONNX Runtime.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from obsdiff.export import onnx, parity
from obsdiff.export.schema import Axis
from obsdiff.models import walk
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, meta_denoiser
from obsdiff.models.walk import Stage
from obsdiff.prune.hessian import Hessian
from obsdiff.prune.recipe import make_recipe
from obsdiff.prune.solve import Problem, solve_stage
from obsdiff.prune.solvers.patterns import NM, is_nm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARE = 0.25
AXES = {"batch": 1, "height": 8, "width": 8, "tokens": 8}
UNET_BLOCK: dict[str, Any] = {
    "block_out_channels": [1280],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "mid_block_type": None,
    "attention_head_dim": [20],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1],
}
BLOCKS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "SD3-medium (1536 wide)": ("sd3", "sd3-medium", {"num_layers": 1}, "ff.net.0.proj"),
    "SD3.5-large (2432 wide)": ("sd3", "sd3.5-large", {"num_layers": 1}, "attn.to_out.0"),
    "FLUX.1 double (3072 wide)": ("flux", "flux.1-dev", {"num_layers": 1, "num_single_layers": 0}, "attn.to_out.0"),
    "FLUX.1 single (3072 wide)": ("flux", "flux.1-dev", {"num_layers": 0, "num_single_layers": 1}, "attn.to_q"),
    "SDXL (1280 wide)": ("unet", "sdxl", UNET_BLOCK, "attn1.to_out.0"),
}
"""By its name: the family, the configuration in benchmarks/configs, what makes it one block, what is solved."""


@pytest.fixture
def real_sizes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_sizes

    return real_sizes


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_configurations_have_the_public_parameter_counts(path: Path, real_sizes: Any) -> None:
    source = real_sizes.read_source(path.stem)
    count = real_sizes.count(meta_denoiser(source))
    assert count / 1e9 == pytest.approx(json.loads(path.read_text())["billions"], abs=0.006)


def test_structured_sizes_are_near_the_papers_and_never_below(real_sizes: Any) -> None:
    source = real_sizes.read_source("sd3.5-large")
    for share, (paper, _work) in real_sizes.PAPER.items():
        size, _macs, records = real_sizes.structured_size(source, share)
        assert paper - 0.005 <= size / 1e9 <= paper + 0.07
        assert {record.block for record in records} == set(range(1, 37))


@torch.no_grad()
def random_denoiser(source: Source) -> nn.Module:
    """The denoiser with small random weights, drawn once: as diffusers initialises it takes several times as long."""
    import diffusers

    generator = torch.Generator().manual_seed(0)
    with no_init():
        denoiser = getattr(diffusers, source.spec.denoiser).from_config(dict(source.config)).eval()
    for parameter in denoiser.parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1, generator=generator).mul_(parameter[0].numel() ** -0.5)
    return denoiser


@contextlib.contextmanager
def no_init() -> Iterator[None]:
    """Layers are made without drawing their weights; biases and norms get what they are multiplied or added with."""
    kept = [(kind, kind.reset_parameters) for kind in (nn.Linear, nn.Conv2d)]

    def reset(layer: Any) -> None:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    for kind, _ in kept:
        kind.reset_parameters = reset  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, method in kept:
            kind.reset_parameters = method  # type: ignore[method-assign]


def solve_one(denoiser: nn.Module, source: Source, stage: Stage) -> float:
    """The stage's one layer at 2:4 by OBS, in place; returns the relative output error."""
    ((name,),) = stage.linears
    layer, recipe = walk.linear(denoiser, name), make_recipe(source, {"solver": "obs", "device": "cpu"})
    hessian = Hessian(layer.weight.shape[1], "cpu")
    handle = layer.register_forward_pre_hook(lambda _layer, args: hessian.add(args[0].flatten(0, -2), 1.0))
    parity.reference_outputs(denoiser, source.spec, source.config, [AXES])
    handle.remove()
    solved = solve_stage(
        stage, {(name,): [hessian]}, Problem(denoiser, source.spec, recipe, dict(denoiser.state_dict()))
    )
    with torch.no_grad():
        layer.weight.copy_(solved.tensors[f"{name}.weight"])
    assert is_nm(layer.weight != 0, NM(2, 4))
    assert solved.layers[0].error is not None
    return solved.layers[0].error


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", BLOCKS)
def test_one_real_block_is_pruned_shrunk_and_exported(name: str, real_sizes: Any, tmp_path: Path) -> None:
    _family, config, changes, wanted = BLOCKS[name]
    source = real_sizes.read_source(config, **changes)
    denoiser = random_denoiser(source)
    (full, *_) = (
        x for s in walk.linear_stages(denoiser, source.spec) for y in s.linears for x in y if x.endswith(wanted)
    )
    block = next(s for s in walk.linear_stages(denoiser, source.spec) if any(full in y for y in s.linears))
    assert 0 < solve_one(denoiser, source, Stage(block.block, ((full,),), parent=block.parent)) < 0.5
    recipe = make_recipe(source, {"pattern": "structured", "sparsity": SHARE, "blocks": ":", "device": "cpu"})
    records, before = real_sizes.group_records(denoiser, source.spec, recipe), real_sizes.count(denoiser)
    shrink(denoiser, source.spec, records)
    assert {len(record.kept) / record.of for record in records if record.kind == "neurons"} == {1 - SHARE}
    assert real_sizes.count(denoiser) < before
    dims = {"batch": Axis(min=1, opt=1, max=2), "tokens": Axis(min=1, opt=8, max=16)}
    dims |= {side: Axis(min=4, opt=8, max=16, multiple=2) for side in ("height", "width")}
    dims |= {"image": Axis(min=4, opt=16, max=64)}
    axes = {axis: dims[axis] for axis in source.spec.axes(source.config)}
    shapes = [AXES]
    expected = parity.reference_outputs(denoiser, source.spec, source.config, shapes)
    assert all(output.isfinite().all() and output.std() > 0 for output in expected)
    onnx.export_onnx(denoiser, source.spec, source.config, axes, tmp_path / "model.onnx")
    check = onnx.check_onnx(expected, source.spec, source.config, shapes, tmp_path / "model.onnx", "fp32")
    assert check.relative_error < 1e-4
    for file in tmp_path.iterdir():
        file.unlink()  # a gigabyte or two
