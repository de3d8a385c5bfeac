"""The prune stage: checkpoints that hold what they promise, and refusals that leave everything as it was."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from obsdiff.checkpoint import CheckpointInfo, read_info, read_masks, verify
from obsdiff.models.source import find_source, load_pipeline
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.solvers import NM, is_nm
from obsdiff.prune.stage import prune

from .folders import WEIGHTS, hashes, weights_of
from .options import QUICK

PATTERNS = {
    "2:4": {"pattern": "2:4"},
    "1:4": {"pattern": "1:4", "solver": "wanda"},
    "unstructured": {"pattern": "unstructured", "sparsity": 0.6},
    "structured": {"pattern": "structured", "blocks": ":", "heads": 0.5, "neurons": 0.3, "sparsity": 0.3},
}
BLOCKS = {"pattern": "2:4", "blocks": "1:", "include": r"attn\.", "exclude": "to_k"}


@pytest.fixture(scope="module")
def checkpoints(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Pruned tiny models by the names of PATTERNS. To read, not to change."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, options in PATTERNS.items():
        prune(tiny_sd3, folder / name.replace(":", "-"), **{**QUICK, **options})
    return {name: folder / name.replace(":", "-") for name in PATTERNS}


@pytest.fixture(params=PATTERNS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: Mapping[str, Path]) -> tuple[str, Path, CheckpointInfo]:
    path = checkpoints[request.param]
    info = read_info(path)
    assert info
    return request.param, path, info


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the calls of modules by class name."""
    counter: Counter[str] = Counter()
    handle = register_module_forward_pre_hook(lambda module, _args: counter.update([type(module).__name__]))
    yield counter
    handle.remove()


def test_weights_are_zero_exactly_where_masks_say(checkpoint: tuple[str, Path, CheckpointInfo]) -> None:
    _, path, info = checkpoint
    weights, masks = weights_of(path), read_masks(path, info)
    assert set(masks) == {layer.name for layer in info.layers}
    for layer in info.layers:
        weight, mask = weights[f"{layer.name}.weight"], masks[layer.name]
        assert weight.shape == mask.shape == torch.Size(layer.shape)
        assert not weight[~mask].any()
        assert (weight[mask] != 0).float().mean() > 0.99
        assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())
        assert weight.isfinite().all()
    verify(find_source(path), info)


def test_masks_fit_the_pattern(checkpoint: tuple[str, Path, CheckpointInfo]) -> None:
    name, path, info = checkpoint
    for mask in read_masks(path, info).values():
        if ":" in name:
            pattern = NM(*map(int, name.split(":")))
            assert is_nm(mask, pattern)
            assert mask.float().mean() == pattern.n / pattern.m
        elif name == "unstructured":
            assert 0.4 <= mask.float().mean() < 0.42
        else:
            assert mask.all(0).all() or mask.all(1).all() or (~mask.any(0)).any() or (~mask.any(1)).any()
            assert torch.equal(mask, mask.any(1, keepdim=True) & mask.any(0, keepdim=True)), "whole rows and columns"


def test_every_linear_is_pruned_unless_left_out(checkpoints: Mapping[str, Path], tiny_sd3: Path) -> None:
    every = {
        name.removesuffix(".weight")
        for name, tensor in weights_of(tiny_sd3).items()
        if re.match(r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)\.", name) and tensor.ndim == 2
    }
    for name in ("2:4", "1:4", "unstructured"):
        info = read_info(checkpoints[name])
        assert info
        assert {layer.name for layer in info.layers} == every


def test_structured_removes_the_same_units_from_all_that_write_and_read_them(checkpoints: Mapping[str, Path]) -> None:
    path = checkpoints["structured"]
    info = read_info(path)
    assert info
    masks, weights = read_masks(path, info), weights_of(path)
    assert {(group.block, group.name) for group in info.groups} >= {
        (0, "attn"),
        (0, "attn2"),
        (1, "ff_context"),
        (2, "ff"),
    }
    for group in info.groups:
        prefix = f"transformer_blocks.{group.block}.{group.name}."
        assert len(group.kept) == (2 if group.kind == "heads" else 96), (
            "of 4 heads and of 128 neurons, 90 rounded up to 8s"
        )
        gone = [unit for unit in range(group.of) if unit not in group.kept]
        readers = [name for name in masks if name.startswith(prefix) and re.search(r"to_out|to_add_out|net\.2", name)]
        writers = [name for name in masks if name.startswith(prefix) and name not in readers]
        assert readers
        assert writers
        for name in readers:
            assert not masks[name].view(len(masks[name]), group.of, -1)[:, gone].any()
            assert masks[name].view(len(masks[name]), group.of, -1)[:, group.kept].all()
        for name in writers:
            rows = masks[name].view(group.of, -1, masks[name].shape[1])
            assert not rows[gone].any()
            assert rows[group.kept].all()
            assert not weights[f"{name}.bias"].view(group.of, -1)[gone].any(), "a removed neuron has no bias left"


def test_nothing_else_of_the_model_changes(checkpoint: tuple[str, Path, CheckpointInfo], tiny_sd3: Path) -> None:
    _, path, info = checkpoint
    touched = {f"{layer.name}.{kind}" for layer in info.layers for kind in ("weight", "bias")}
    before, after = weights_of(tiny_sd3), weights_of(path)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in touched)
    old, new = hashes(tiny_sd3), hashes(path)
    added = {"masks.safetensors", "obsdiff.json"}
    assert new.keys() == old.keys() | added
    assert {name for name in old if old[name] != new[name]} == {f"transformer/{WEIGHTS}", "transformer/config.json"}
    config = json.loads((path / "transformer" / "config.json").read_text())
    sparsity = config.pop("sparsity_config")
    assert config == json.loads((tiny_sd3 / "transformer" / "config.json").read_text())
    assert sparsity["targets"] == [layer.name for layer in info.layers]
    assert sparsity["sparsity_structure"] == info.recipe["pattern"]
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in info.layers)
    total = sum(layer.shape[0] * layer.shape[1] for layer in info.layers)
    assert sparsity["global_sparsity"] == pytest.approx(zeros / total, abs=1e-5)


def test_plain_diffusers_loads_it_and_draws_the_same(checkpoint: tuple[str, Path, CheckpointInfo]) -> None:
    from diffusers import DiffusionPipeline

    _, path, _ = checkpoint
    plain = DiffusionPipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    source = find_source(path)
    call = {**source.defaults, "num_inference_steps": 2, "output_type": "pt"}
    call.pop("prompt_tokens", None)
    images = [
        pipe("a red boot", generator=torch.Generator().manual_seed(0), **call).images
        for pipe in (plain, load_pipeline(source, torch.float32))
    ]
    assert images[0].isfinite().all()
    assert torch.equal(images[0], images[1])


def test_errors_are_recorded_and_compensation_pays(
    checkpoints: Mapping[str, Path], tiny_sd3: Path, tmp_path: Path
) -> None:
    magnitude = prune(tiny_sd3, tmp_path / "magnitude", **{**QUICK, "solver": "magnitude"})
    obs = read_info(checkpoints["2:4"])
    assert obs
    assert all(0 < layer.error < 1 for info in (obs, magnitude) for layer in info.layers if layer.error is not None)
    found = {info.recipe["solver"]: sum(layer.error or 0 for layer in info.layers) for info in (obs, magnitude)}
    assert found["obs"] < 0.8 * found["magnitude"]


def test_the_recipe_round_trips(checkpoint: tuple[str, Path, CheckpointInfo], tiny_sd3: Path) -> None:
    name, _, info = checkpoint
    recipe = Recipe(**info.recipe)
    assert recipe.model_dump(mode="json") == info.recipe
    asked = {**QUICK, **PATTERNS[name]}
    asked.pop("num_prompts")
    assert {key: getattr(recipe, key) for key in asked} == asked
    assert len(recipe.prompts) == QUICK["num_prompts"]
    assert info.base["name"] == str(tiny_sd3)
    assert {"obsdiff", "torch", "diffusers"} <= set(info.versions)


def test_the_recipe_alone_reproduces_the_checkpoint(
    checkpoint: tuple[str, Path, CheckpointInfo], tiny_sd3: Path, tmp_path: Path
) -> None:
    _, path, info = checkpoint
    prune(tiny_sd3, tmp_path / "again", **info.recipe)
    assert hashes(tmp_path / "again") == hashes(path)


def test_another_seed_gives_other_weights(checkpoints: Mapping[str, Path], tiny_sd3: Path, tmp_path: Path) -> None:
    prune(tiny_sd3, tmp_path / "other", **{**QUICK, **PATTERNS["2:4"]}, seed=1)
    before, after = hashes(checkpoints["2:4"]), hashes(tmp_path / "other")
    assert before[f"transformer/{WEIGHTS}"] != after[f"transformer/{WEIGHTS}"]


def test_blocks_include_and_exclude_choose_the_linears(tiny_sd3: Path, tmp_path: Path) -> None:
    info = prune(tiny_sd3, tmp_path / "out", **{**QUICK, **BLOCKS})
    parts = {tuple(layer.name.split(".")[1:4]) for layer in info.layers}
    assert parts == {
        *((b, "attn", n) for b in "12" for n in ("to_q", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out")),
        ("1", "attn", "to_add_out"),
    }


def test_prompts_are_encoded_once_and_nothing_is_decoded(tiny_sd3: Path, tmp_path: Path) -> None:
    found = []
    for packages in (1, 3):
        with counted() as calls:
            prune(tiny_sd3, tmp_path / f"out-{packages}", **{**QUICK, "packages": packages})
        found.append(calls)
    one, three = found
    assert one["CLIPTextModelWithProjection"] == three["CLIPTextModelWithProjection"] > 0
    assert one["Decoder"] == three["Decoder"] == 0
    assert one["SD3Transformer2DModel"] == 2 * 2, "steps times batches, guidance in one call"
    assert three["SD3Transformer2DModel"] == 3 * one["SD3Transformer2DModel"]


def test_later_packages_see_what_earlier_ones_pruned(tiny_sd3: Path, tmp_path: Path) -> None:
    first, second = (prune(tiny_sd3, tmp_path / f"{n}", **{**QUICK, "packages": n}) for n in (1, 2))
    same = [a.error == b.error for a, b in zip(first.layers, second.layers, strict=True)]
    cut = same.index(False)
    assert 0 < cut < len(same)
    assert not any(same[cut:])


def test_the_sampler_runs_in_the_dtype_asked_for_and_weights_keep_theirs(tiny_sd3: Path, tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "FeedForward":
            seen.add(args[0].dtype)

    handle = register_module_forward_pre_hook(look)
    info = prune(tiny_sd3, tmp_path / "out", **QUICK, dtype="bfloat16")
    handle.remove()
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.float32}
    assert info.recipe["dtype"] == "bfloat16"
