"""Convolutions are pruned as well as linears: their masks hold, and what stays makes up for what went."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from obsdiff.checkpoint import CheckpointInfo, read_info, read_masks, verify
from obsdiff.errors import InputError
from obsdiff.export.inspect import inspect
from obsdiff.models import layers, walk
from obsdiff.models.source import find_source, meta_denoiser
from obsdiff.prune import memory, plan
from obsdiff.prune.calibration import Calibration, Collector, inputs_of, run_batches
from obsdiff.prune.hessian import mean
from obsdiff.prune.packages import cut
from obsdiff.prune.recipe import make_recipe
from obsdiff.prune.stage import prune

from .runs import Noting, make_run

OPTIONS: dict[str, Any] = {
    "num_prompts": 4,
    "steps": 2,
    "batch_size": 2,
    "packages": 1,
    "allocation": "uniform",
    "timestep_weighting": "uniform",
    "device": "cpu",
}
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "unstructured": {"pattern": "unstructured", "sparsity": 0.6},
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("unet")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """The calibration of the prunes below, whose denoiser is not changed."""
    return make_run(model, tmp_path_factory.mktemp("run"), **OPTIONS, solver="obs")


@pytest.fixture(scope="module")
def convolutions(run: Calibration) -> dict[str, nn.Conv2d]:
    stages = walk.linear_stages(run.denoiser, run.spec)
    found = {name: walk.linear(run.denoiser, name) for shared in inputs_of(stages) for name in shared}
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Conv2d)}


@pytest.fixture(scope="module")
def inputs(run: Calibration, convolutions: dict[str, nn.Conv2d]) -> dict[str, list[Tensor]]:
    """What each convolution of the dense model reads during the calibration."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        layer.register_forward_pre_hook(lambda _layer, args, name=name: seen[name].append(args[0].clone()))
        for name, layer in convolutions.items()
    ]
    run_batches(run, Collector(run, []))
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module", params=PATTERNS)
def pruned(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, CheckpointInfo]]:
    """The checkpoints by solver."""
    folder = tmp_path_factory.mktemp("pruned")
    for solver in ("obs", "magnitude"):
        prune(model, folder / solver, **OPTIONS, **PATTERNS[request.param], solver=solver)
    infos = {solver: read_info(folder / solver) for solver in ("obs", "magnitude")}
    return {solver: (folder / solver, info) for solver, info in infos.items() if info}


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


def test_every_kind_of_convolution_is_pruned(convolutions: dict[str, nn.Conv2d]) -> None:
    kinds = {name.rpartition(".")[2] for name in convolutions}
    assert kinds == {"conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"}
    assert {layer.stride for layer in convolutions.values()} == {(1, 1), (2, 2)}


def test_masks_hold(pruned: dict[str, tuple[Path, CheckpointInfo]], convolutions: dict[str, nn.Conv2d]) -> None:
    for path, info in pruned.values():
        verify(find_source(path), info)
        weights, masks = weights_of(path), read_masks(path, info)
        for name in convolutions:
            kept = weights[f"{name}.weight"] != 0
            assert not (layers.as_matrix(kept) & ~masks[name]).any()
            if info.recipe["pattern"] == "2:4":
                assert kept.unflatten(1, (-1, 4)).sum(2).eq(2).all(), "two of four input channels at every tap"
        rows = {layer["name"]: layer for layer in inspect(path)["layers"]}
        for name, layer in convolutions.items():
            assert rows[name]["shape"] == layers.matrix_shape(layer)
            assert rows[name]["nm"] == ("2:4" if info.recipe["pattern"] == "2:4" else None)


def lost(layer: nn.Conv2d, weight: Tensor, inputs: list[Tensor]) -> float:
    """The relative error of what the convolution puts out with that weight in the place of its own."""
    settings = (None, layer.stride, layer.padding, layer.dilation)
    difference = sum(
        float(nn.functional.conv2d(x, weight - layer.weight, *settings).square().sum().double()) for x in inputs
    )
    own = sum(float(nn.functional.conv2d(x, layer.weight, *settings).square().sum().double()) for x in inputs)
    return (difference / own) ** 0.5


@torch.no_grad()
def test_what_stays_makes_up_for_what_went(
    pruned: dict[str, tuple[Path, CheckpointInfo]],
    convolutions: dict[str, nn.Conv2d],
    inputs: dict[str, list[Tensor]],
) -> None:
    """Measured with the convolutions themselves; for OBS it is what the Hessian of the patches said."""
    (path, info), (plain, _) = pruned["obs"], pruned["magnitude"]
    compensated, cut_off, said = weights_of(path), weights_of(plain), {layer.name: layer.error for layer in info.layers}
    for name, layer in convolutions.items():
        error = lost(layer, compensated[f"{name}.weight"], inputs[name])
        assert error < lost(layer, cut_off[f"{name}.weight"], inputs[name]), name
        assert error == pytest.approx(said[name], rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("options", [{}, {"solver": "auto"}, {"token_share": 0.5}], ids=str)
def test_pieces_give_the_hessians_that_whole_batches_give(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def collected() -> Iterator[Any]:
        run = make_run(model, tmp_path, **{**OPTIONS, "solver": "obs", **options})
        collector = Collector(run, inputs_of(walk.linear_stages(run.denoiser, run.spec, include="conv1|conv$")))
        with collector.listening():
            run_batches(run, collector)
        yield from (hessian for parts in collector.hessians.values() for hessian in parts)

    whole = list(collected())
    monkeypatch.setattr(layers, "PIECE", 1)
    for one, other in zip(whole, collected(), strict=True):
        assert other.weight == one.weight
        if "token_share" not in options:  # which tokens are drawn depends on the pieces
            found, expected = mean([other]).hessian, mean([one]).hessian
            assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_progress_is_what_was_promised_though_pndm_takes_a_step_more(model: Path, tmp_path: Path) -> None:
    progress = Noting()
    prune(model, tmp_path / "out", **OPTIONS, solver="magnitude", include="mid_block", progress=progress)
    assert progress.done == progress.total


def test_memory_counts_patches_and_what_each_level_sees(
    model: Path, inputs: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(model)
    recipe, denoiser = make_recipe(source, {**OPTIONS, "solver": "obs"}), meta_denoiser(source)
    packages = cut(walk.linear_stages(denoiser, source.spec), 1)
    shapes = memory.input_shapes(source, packages, recipe)
    for name, seen in inputs.items():
        if name in shapes:  # the first of those that share an input
            assert {tuple(value.shape) for value in seen} == {tuple(shapes[name])}, name

    def need() -> dict[str, float]:
        return memory.predict(denoiser, source.spec, packages, recipe, 100, shapes)

    largest = max(value[0].numel() * layers.taps(walk.linear(denoiser, n)) for n, (value, *_) in inputs.items())
    assert need()["activations"] == 8 * 4 * max(shape.numel() for shape in shapes.values())
    assert need()["patches"] == 3 * 4 * 4 * largest  # four samples in a call: two prompts, with guidance
    monkeypatch.setattr(layers, "PIECE", 1)
    assert need()["patches"] == 3 * 4 * largest
    linears = [[stage for stage in packages[0] if "attn" in stage.name]]
    assert memory.input_shapes(source, linears, recipe) == {}


def test_a_depthwise_convolution_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser: Any = meta_denoiser(find_source(model))
    own = denoiser.mid_block.resnets[0].conv1
    denoiser.mid_block.resnets[0].conv1 = nn.Conv2d(own.in_channels, own.out_channels, 3, groups=8, device="meta")
    monkeypatch.setattr(plan, "meta_denoiser", lambda _source: denoiser)
    with pytest.raises(InputError, match=r"mid_block\.resnets\.0\.conv1: a convolution in 8 groups .* --exclude"):
        plan.plan(find_source(model), make_recipe(find_source(model), OPTIONS))


def test_channels_that_no_four_divide_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of two taps of six channels are 24 columns, but groups of four would reach over the taps."""
    denoiser: Any = meta_denoiser(find_source(model))
    denoiser.mid_block.resnets[0].conv1 = nn.Conv2d(6, 8, 2, device="meta")
    monkeypatch.setattr(plan, "meta_denoiser", lambda _source: denoiser)
    with pytest.raises(InputError, match=r"the input dimension 6 is not a multiple of 4, so 2:4 does not fit"):
        plan.plan(find_source(model), make_recipe(find_source(model), OPTIONS))


def test_a_refusal_for_want_of_memory_advises_what_a_u_net_can_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e8))
    advice = (
        "try a smaller --batch-size, more --packages, --exclude for the convolutions, whose hessians are the largest"
    )
    with pytest.raises(InputError, match=rf"patches 0\.\d, .* are free: {advice}$"):
        prune(model, tmp_path / "out", **OPTIONS, solver="obs")
