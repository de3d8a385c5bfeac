"""A single-file checkpoint as MODEL of a prune, laid out by diffusers with the configs of a pipeline beside it.

Here the file holds an SD3 transformer in the names of Stability's files, written by the mapping below; encoders and VAE
come from the --config folder. Files that hold their own encoders and VAE go the same way in diffusers: not tested.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import call
from conftest import QUICK
from safetensors.torch import load_file, save_file
from torch import Tensor

from obsdiff.checkpoint import denoiser_weights
from obsdiff.errors import InputError
from obsdiff.files import folder_hash, sha256
from obsdiff.models.source import find_source
from obsdiff.prune.stage import prune

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
OPTIONS: dict[str, Any] = {**QUICK, "pattern": "2:4", "solver": "magnitude", "steps": 1, "packages": 1}
NAMES = (
    ("pos_embed.pos_embed", "pos_embed"),
    ("pos_embed.proj", "x_embedder.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
)
FUSED = {"to_{}": "x_block.attn.qkv", "add_{}_proj": "context_block.attn.qkv"}


def as_single_file(weights: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """diffusers' names and layout of an SD3 transformer as those of the original."""
    left, found = dict(weights), {}
    for block in range(blocks):
        for form, name in FUSED.items():
            for part in ("weight", "bias"):
                linears = [f"transformer_blocks.{block}.attn.{form.format(x)}.{part}" for x in "qkv"]
                found[f"joint_blocks.{block}.{name}.{part}"] = torch.cat([left.pop(linear) for linear in linears])
    last = f"transformer_blocks.{blocks - 1}.norm1_context"
    for name, tensor in left.items():
        if name.startswith(("norm_out", last)):  # scale and shift the other way round
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for pattern, replacement in NAMES:
            name = re.sub(f"^{pattern}", replacement, name)
        found[name] = tensor.contiguous()
    return {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}


@pytest.fixture
def single(one_block_sd3: Path, tmp_path: Path) -> Path:
    save_file(as_single_file(load_file(one_block_sd3 / WEIGHTS), 1), tmp_path / "sd3.safetensors")
    return tmp_path / "sd3.safetensors"


@pytest.fixture
def config(one_block_sd3: Path, tmp_path: Path) -> Path:
    """A pipeline whose denoiser has no weights."""
    folder = Path(shutil.copytree(one_block_sd3, tmp_path / "config"))
    (folder / WEIGHTS).unlink()
    return folder


def test_a_single_file_prunes_as_its_folder_does(
    single: Path, config: Path, one_block_sd3: Path, tmp_path: Path
) -> None:
    info = prune(single, tmp_path / "out", config=config, **OPTIONS)
    wanted = prune(one_block_sd3, tmp_path / "wanted", **OPTIONS)
    found, expected = (denoiser_weights(tmp_path / name / "transformer") for name in ("out", "wanted"))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert info.base == {
        "name": str(single),
        "sha256": sha256(single),
        "config": str(config),
        "config_sha256": folder_hash(config),
    }
    assert info.recipe == wanted.recipe
    assert find_source(tmp_path / "out").defaults == find_source(one_block_sd3).defaults
    assert not list(tmp_path.glob("out.partial*"))


def test_without_a_config_it_is_told_what_is_missing(single: Path, tmp_path: Path) -> None:
    result = call("prune", single, tmp_path / "out")
    assert result.code == 2
    assert "is a file" in result.err
    assert "--config MODEL" in result.err


def test_a_config_is_for_a_file(one_block_sd3: Path, config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--config is for a single-file checkpoint"):
        prune(one_block_sd3, tmp_path / "out", config=config, **OPTIONS)


def test_a_file_of_something_else_is_one_sentence(config: Path, tmp_path: Path) -> None:
    save_file({"something": torch.ones(4)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors is no single-file Stable Diffusion 3") as caught:
        prune(tmp_path / "other.safetensors", tmp_path / "out", config=config, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_quantised_single_file_is_refused(single: Path, config: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(single).items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(InputError, match=r"fp8.safetensors is quantised .* stored as F8_E4M3"):
        prune(tmp_path / "fp8.safetensors", tmp_path / "out", config=config, **OPTIONS)
