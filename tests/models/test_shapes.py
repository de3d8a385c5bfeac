"""A known denoiser class of an unknown shape: the module that does not fit is named before anything is computed."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from safetensors.torch import load_file, save_file
from torch import nn

from obsdiff.errors import InputError
from obsdiff.export.inspect import inspect
from obsdiff.export.stage import export
from obsdiff.models import GroupRecord, walk
from obsdiff.models.shrink import shrink
from obsdiff.models.source import find_source, load_denoiser, meta_denoiser
from obsdiff.prune.stage import prune

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def model(one_block_sd3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_block_sd3, tmp_path / "model"))


def edit(model: Path, **changes: Any) -> None:
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("stage", [prune, export, lambda path, out: inspect(path)], ids=["prune", "export", "inspect"])
@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": "four"}, {"attention_head_dim": -8}, {"num_layers": None}, {"patch_size": 0}],
    ids=["words", "negative", "null", "zero"],
)
def test_a_config_of_impossible_sizes_is_one_sentence(
    model: Path, tmp_path: Path, stage: Callable[..., Any], changes: dict[str, Any]
) -> None:
    edit(model, **changes)
    with pytest.raises(InputError, match=r"transformer") as caught:
        stage(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_config_without_blocks_names_them(model: Path, tmp_path: Path) -> None:
    edit(model, num_layers=0)
    with pytest.raises(InputError, match="transformer_blocks"):
        prune(model, tmp_path / "out", **QUICK)


@pytest.mark.parametrize("stage", [prune, export], ids=["prune", "export"])
def test_weights_of_another_shape_than_the_config_name_the_module(
    model: Path, tmp_path: Path, stage: Callable[..., Any]
) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"][:-4].contiguous()
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(InputError, match=QUERY) as caught:
        stage(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_weights_that_lack_a_module_name_it(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors[f"{QUERY}.weight"]
    save_file(tensors, model / WEIGHTS)
    for stage in (prune, export):
        with pytest.raises(InputError, match=QUERY):
            stage(model, tmp_path / "out")


class Adapted(nn.Module):
    """What stands in for a linear in a quantised or adapted model."""


def test_something_else_in_the_place_of_a_linear_is_named_in_full(one_block_sd3: Path) -> None:
    source = find_source(one_block_sd3)
    denoiser = meta_denoiser(source)
    denoiser.get_submodule("transformer_blocks.0.attn").to_q = Adapted()
    with pytest.raises(InputError, match=rf"^{QUERY} is a Adapted where a Linear is expected: .*full-precision"):
        walk.linear(denoiser, QUERY)
    with pytest.raises(InputError, match=rf"^{QUERY} is a Adapted"):
        walk.group_stages(denoiser, source.spec)


@pytest.mark.parametrize("heads", [3, 0, 64])
def test_heads_that_do_not_divide_name_the_linear_in_full(one_block_sd3: Path, heads: int) -> None:
    source = find_source(one_block_sd3)
    denoiser: Any = copy.deepcopy(load_denoiser(source, torch.float32))
    denoiser.transformer_blocks[0].attn.heads = heads
    with pytest.raises(InputError, match=rf"^{QUERY}: 32 rows cannot hold {heads} heads"):
        walk.group_stages(denoiser, source.spec)


def test_a_block_that_does_not_say_how_many_heads_it_has_is_named(one_block_sd3: Path) -> None:
    source = find_source(one_block_sd3)
    denoiser: Any = meta_denoiser(source)
    del denoiser.transformer_blocks[0].attn.heads
    with pytest.raises(InputError, match=r"^transformer_blocks.0.attn.heads is not there"):
        walk.group_stages(denoiser, source.spec)


def test_shrinking_says_which_block_does_not_fit(one_block_sd3: Path) -> None:
    source = find_source(one_block_sd3)
    record = GroupRecord(block=3, name="attn", kind="heads", kept=[0], of=4)
    with pytest.raises(InputError, match=r"transformer_blocks.3.attn"):
        shrink(meta_denoiser(source), source.spec, [record])
