"""The pruned checkpoint: packed masks, shards, and damage of every kind told in one sentence."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from obsdiff import checkpoint
from obsdiff.checkpoint import (
    MASKS,
    SCHEMA_VERSION,
    CheckpointInfo,
    TensorFiles,
    denoiser_weights,
    pack,
    read_info,
    read_masks,
    unpack,
    verify,
)
from obsdiff.errors import InputError
from obsdiff.files import folder_files, read_json, write_json
from obsdiff.models.source import INFO, find_source, load_denoiser
from obsdiff.prune.stage import prune

INDEX = f"{checkpoint.WEIGHTS}.index.json"
QUICKEST: dict[str, Any] = {"solver": "magnitude", "num_prompts": 1, "steps": 1, "packages": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def base(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose denoiser lies in several files."""
    model = tmp_path_factory.mktemp("checkpoint") / "sharded"
    shutil.copytree(one_block_sd3, model)
    (model / "transformer" / checkpoint.WEIGHTS).unlink()
    denoiser: Any = load_denoiser(find_source(one_block_sd3))
    denoiser.save_pretrained(model / "transformer", max_shard_size="100KB")
    return model


@pytest.fixture(scope="module")
def sharded(base: Path) -> Path:
    out = base.with_name("pruned")
    prune(base, out, pattern="2:4", **QUICKEST)
    return out


@pytest.fixture
def damaged(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "damaged"))


def info_of(path: Path) -> CheckpointInfo:
    info = read_info(path)
    assert info
    return info


def set_weight(path: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Stores another tensor in the place of one, or none."""
    file = denoiser_weights(path / "transformer")._home[name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file)


@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 19))
def test_a_packed_mask_comes_back(data: st.DataObject, rows: int, columns: int) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = torch.tensor(bits).reshape(rows, columns)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-rows * columns // 8)
    assert torch.equal(unpack(packed, (rows, columns)), mask)


def test_bits_are_packed_row_by_row_with_the_first_one_highest() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert pack(mask).tolist() == [0b10000001, 0b11000000]


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (torch.zeros(1, dtype=torch.uint8), (3, 3)),
        (torch.zeros(3, dtype=torch.uint8), (3, 3)),
        (torch.zeros(2, dtype=torch.int8), (3, 3)),
        (torch.zeros(0, dtype=torch.uint8), (1, 1)),
    ],
)
def test_a_packed_mask_that_does_not_fit_is_refused(packed: Tensor, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="does not fit a weight"):
        unpack(packed, shape)


def test_tensors_of_several_files_are_one_mapping(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"c": torch.full((3,), 7)}, tmp_path / "2.safetensors")
    tensors = TensorFiles([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert sorted(tensors) == ["a", "b", "c"]
    assert len(tensors) == 3
    assert tensors["c"].tolist() == [7, 7, 7]
    assert tensors.get("d") is None
    assert "b" in tensors


@pytest.mark.parametrize("content", [None, b"", b"\x08", b"PK\x03\x04" + bytes(100), b"\xff" * 64, "folder"])
def test_a_file_that_is_missing_truncated_or_foreign_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "1.safetensors"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"1\.safetensors is (missing|truncated or is not safetensors)"):
        TensorFiles([path])


def test_a_truncated_or_missing_shard_is_named(damaged: Path) -> None:
    shard = denoiser_weights(damaged / "transformer").files[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{shard.name} is truncated"):
        denoiser_weights(damaged / "transformer")
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        denoiser_weights(damaged / "transformer")


def test_sharded_weights_stay_in_their_shards_and_dtypes(base: Path, sharded: Path) -> None:
    before, after = (denoiser_weights(path / "transformer") for path in (base, sharded))
    assert len(before.files) > 2
    assert [file.name for file in after.files] == [file.name for file in before.files]
    assert before.keys() == after.keys()
    pruned = {f"{layer.name}.weight" for layer in info_of(sharded).layers}
    for name in before:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]) == (name not in pruned), name
    assert read_json(sharded / "transformer" / INDEX) == read_json(base / "transformer" / INDEX)


def test_a_sharded_checkpoint_loads_and_draws_with_plain_diffusers(sharded: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(sharded, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    masks = read_masks(sharded, info_of(sharded))
    modules = dict(pipe.transformer.named_modules())
    for name, mask in masks.items():
        assert mask.float().mean() == 0.5
        assert not modules[name].weight[~mask].any()
        assert modules[name].weight[mask].any()
    (image,) = pipe("a red bag", num_inference_steps=1, height=32, width=32).images
    assert image.size == (32, 32)


def test_the_untouched_files_are_those_of_the_base(base: Path, sharded: Path) -> None:
    before, after = folder_files(base), folder_files(sharded)
    assert after.keys() - before.keys() == {INFO, MASKS}
    assert before.keys() <= after.keys()
    for name in before:
        if not name.startswith("transformer/"):
            assert after[name].read_bytes() == before[name].read_bytes()


def test_the_config_has_the_key_names_of_compressed_tensors(sharded: Path) -> None:
    info, config = info_of(sharded), read_json(sharded / "transformer" / "config.json")
    assert config["sparsity_config"] == {
        "format": "dense",
        "global_sparsity": 0.5,
        "sparsity_structure": "2:4",
        "targets": [layer.name for layer in info.layers],
        "ignore": [],
    }


def test_the_recipe_says_what_reproduces_it_and_a_dense_model_has_none(base: Path, sharded: Path) -> None:
    assert read_info(base) is None
    info = info_of(sharded)
    assert info.schema_version == SCHEMA_VERSION
    assert info.base["name"] == str(base)
    assert len(info.base["sha256"]) == 64
    assert info.versions["torch"] == version("torch")
    assert info.threads == torch.get_num_threads()
    assert {"pattern": "2:4", "solver": "magnitude", "seed": 0}.items() <= info.recipe.items()
    assert CheckpointInfo.model_validate(json.loads(info.model_dump_json())) == info


def test_verify_accepts_what_prune_wrote(sharded: Path) -> None:
    verify(find_source(sharded), info_of(sharded))


def test_verify_finds_a_weight_that_was_trained(damaged: Path) -> None:
    info = info_of(damaged)
    layer = info.layers[-1]
    mask = read_masks(damaged, info)[layer.name]
    row, column = (~mask).nonzero()[0].tolist()

    def train(weight: Tensor) -> Tensor:
        weight[row, column] = 1e-6
        return weight

    set_weight(damaged, f"{layer.name}.weight", train)
    with pytest.raises(InputError, match=f"{layer.name} has weights where its mask says zero"):
        verify(find_source(damaged), info)


@pytest.mark.parametrize("change", [lambda weight: None, lambda weight: weight[:-1].contiguous()], ids=["gone", "cut"])
def test_verify_finds_a_layer_that_is_gone_or_has_another_shape(damaged: Path, change: Any) -> None:
    info = info_of(damaged)
    set_weight(damaged, f"{info.layers[0].name}.weight", change)
    with pytest.raises(InputError, match=f"{info.layers[0].name} is missing or has another shape"):
        verify(find_source(damaged), info)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b"not safetensors at all, whatever its name says"),
        lambda path: save_file({"other": torch.zeros(1)}, path),
        lambda path: save_file({name: value[:-1] for name, value in load_file(path).items()}, path),
        lambda path: save_file({name: value.float() for name, value in load_file(path).items()}, path),
    ],
    ids=["gone", "empty", "truncated", "foreign", "other", "short", "floats"],
)
def test_damaged_masks_are_refused(damaged: Path, damage: Callable[[Path], None]) -> None:
    damage(damaged / MASKS)
    with pytest.raises(InputError) as caught:
        verify(find_source(damaged), info_of(damaged))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '{"schema_version": 1}'])
def test_a_damaged_or_foreign_recipe_is_named(damaged: Path, text: str) -> None:
    (damaged / INFO).write_text(text)
    with pytest.raises(InputError, match=r"obsdiff\.json") as caught:
        read_info(damaged)
    assert "\n" not in str(caught.value)


def test_a_newer_recipe_says_to_upgrade(damaged: Path) -> None:
    write_json(damaged / INFO, {"schema_version": SCHEMA_VERSION + 1, "something": "new"})
    with pytest.raises(InputError, match=f"schema version {SCHEMA_VERSION + 1}, newer than .* upgrade obsdiff"):
        read_info(damaged)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"layers": [{"name": "a"}]},
        {"layers": "all"},
        {"groups": [{"block": 0, "name": "ff", "kind": "wings", "kept": [], "of": 1}]},
        {"threads": "many"},
        {"schema_version": "one"},
        {"recipe": {}},
        {"base": {}},
    ],
    ids=str,
)
def test_a_recipe_with_a_wrong_field_is_refused(damaged: Path, change: dict[str, Any]) -> None:
    write_json(damaged / INFO, read_json(damaged / INFO) | change)
    with pytest.raises(InputError, match=rf"obsdiff\.json is not a recipe that obsdiff wrote: {next(iter(change))}"):
        read_info(damaged)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ["x"]}},
        {"weight_map": {}},
        {"weight_map": ["a"]},
        {"weight_map": None},
        {},
        [],
        "index",
    ],
    ids=str,
)
def test_an_index_that_points_outside_or_nowhere_is_refused(damaged: Path, index: Any) -> None:
    write_json(damaged / "transformer" / INDEX, index)
    with pytest.raises(InputError, match=r"index\.json lists shards outside its folder, or none"):
        denoiser_weights(damaged / "transformer")
