"""structured+N:M: heads and neurons first, then N:M on what is left, in one command and one checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from obsdiff.checkpoint import CheckpointInfo, read_info, read_masks, verify
from obsdiff.errors import InputError
from obsdiff.export.inspect import inspect
from obsdiff.models import walk
from obsdiff.models.graph import TensorDenoiser, random_inputs
from obsdiff.models.shrink import shrink
from obsdiff.models.source import find_source, load_denoiser
from obsdiff.prune.solvers import NM, is_nm
from obsdiff.prune.stage import prune

from .folders import weights_of
from .options import QUICK

MIXED: dict[str, Any] = {**QUICK, "pattern": "structured+2:4", "blocks": ":", "heads": 0.25, "neurons": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "sampler": {},
    "auto": {"solver": "auto"},
    "stream": {"calibration": "stream", "packages": None},
    "inner blocks": {"blocks": "1:2"},
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(
    request: pytest.FixtureRequest, tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CheckpointInfo]:
    path = tmp_path_factory.mktemp("mixed") / "out"
    prune(tiny_sd3, path, **{**MIXED, **KINDS[request.param]})
    info = read_info(path)
    assert info
    return path, info


def shrunk(path: Path, info: CheckpointInfo) -> nn.Module:
    source = find_source(path)
    denoiser = load_denoiser(source, torch.float32)
    shrink(denoiser, source.spec, info.groups)
    return denoiser


def test_what_is_left_after_shrinking_is_2_4_along_the_input(checkpoint: tuple[Path, CheckpointInfo]) -> None:
    path, info = checkpoint
    denoiser = shrunk(path, info)
    for layer in info.layers:
        weight = walk.linear(denoiser, layer.name).weight
        assert is_nm(weight != 0, NM(2, 4)), layer.name
        assert (weight != 0).float().mean() > 0.49, "and no sparser than that"
        assert weight.numel() < layer.shape[0] * layer.shape[1], "a part of every layer is gone"


def test_masks_records_and_weights_agree(checkpoint: tuple[Path, CheckpointInfo]) -> None:
    path, info = checkpoint
    weights, masks = weights_of(path), read_masks(path, info)
    kept = walk.kept_entries(load_denoiser(find_source(path)), find_source(path).spec, info.groups)
    assert {layer.name for layer in info.layers} == set(masks)
    assert len({layer.name for layer in info.layers}) == len(info.layers)
    for layer in info.layers:
        mask, weight = masks[layer.name], weights[f"{layer.name}.weight"]
        rows, columns = kept[layer.name]
        inner = mask[rows][:, columns]
        assert inner.reshape(-1, 4).sum(1).eq(2).all(), layer.name
        assert mask.sum() == inner.sum(), "nothing is kept in rows and columns that went"
        assert not weight[~mask].any()
        assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())
        assert layer.error is not None
        assert 0 < layer.error < 1
    verify(find_source(path), info)


def test_shrinking_changes_no_output(checkpoint: tuple[Path, CheckpointInfo]) -> None:
    path, info = checkpoint
    source = find_source(path)
    inputs = random_inputs(source.spec, source.config, {"batch": 2, "height": 8, "width": 8, "tokens": 5})
    with torch.no_grad():
        full, narrow = (
            TensorDenoiser(denoiser, source.spec)(*inputs.values())
            for denoiser in (load_denoiser(source, torch.float32), shrunk(path, info))
        )
    assert full.std() > 0
    torch.testing.assert_close(narrow, full, rtol=1e-3, atol=1e-4 * float(full.std()))


def test_plain_diffusers_loads_it(checkpoint: tuple[Path, CheckpointInfo]) -> None:
    from diffusers import DiffusionPipeline

    path, _ = checkpoint
    pipe = DiffusionPipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    stored = weights_of(path)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_inspect_says_2_4_and_how_many_units_stay(checkpoint: tuple[Path, CheckpointInfo]) -> None:
    path, info = checkpoint
    found = inspect(path)
    assert len(found["layers"]) == len(info.layers)
    assert {layer["nm"] for layer in found["layers"]} == {"2:4"}
    assert all(layer["units"] for layer in found["layers"])
    dense, here = found["totals"]["parameters"]
    assert here < dense


def test_2_4_on_what_is_left_sees_the_units_that_went(tiny_sd3: Path, tmp_path: Path) -> None:
    """The structured package is applied before the inputs of the next one are collected."""
    alone = prune(tiny_sd3, tmp_path / "alone", **{**MIXED, "pattern": "structured", "packages": 1})
    both = prune(tiny_sd3, tmp_path / "both", **{**MIXED, "packages": 1})
    assert both.groups == alone.groups
    assert both.recipe["pattern"] == "structured+2:4"
    masks, units = read_masks(tmp_path / "both", both), read_masks(tmp_path / "alone", alone)
    assert not any((masks[name] & ~units[name]).any() for name in masks)
    before = {layer.name: layer.sparsity for layer in alone.layers}
    assert all(layer.sparsity > before[layer.name] for layer in both.layers)


@pytest.mark.parametrize("round_to", [16, 32])
def test_widths_are_rounded_as_asked(tiny_sd3: Path, tmp_path: Path, round_to: int) -> None:
    options = {**MIXED, "round_to": round_to, "packages": 1}
    info = prune(tiny_sd3, tmp_path / "out", **options)
    widths = {len(group.kept) for group in info.groups if group.kind == "neurons"}
    assert all(width % round_to == 0 for width in widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "structured+4:2"}, "N of N:M must be at least 1 and smaller than M"),
        ({"pattern": "structured+"}, r"'' is no N:M pattern such as 2:4 \(or write unstructured"),
        ({"pattern": "structured+2:5"}, "the input dimension 32 is not a multiple of 5"),
        ({"solver": "alps"}, "structured pruning knows auto, obs and magnitude"),
        ({"allocation": "error", "heads": None, "neurons": None}, "N:M is the same everywhere"),
        ({"round_to": 6}, "is not a multiple of 4, so 2:4 does not fit"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tiny_sd3: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, tmp_path / "out", **{**MIXED, **options})
    assert not list(tmp_path.iterdir()), "refused before anything began"
