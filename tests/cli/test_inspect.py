"""obsdiff inspect: a dense model, a checkpoint and a bundle, as tables and as JSON that agree with the files."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import assert_sentence, call
from obsdiff.checkpoint import WEIGHTS, denoiser_weights, read_info

from .conftest import Journey


def test_a_checkpoint_is_told_layer_by_layer(journey: Journey) -> None:
    result = call("inspect", journey.checkpoint, "--json")
    assert (result.code, result.err) == (0, "")
    info = read_info(journey.checkpoint)
    assert info
    found, weights = result.json, denoiser_weights(journey.checkpoint / "transformer")
    assert found["about"]["kind"] == "pruned checkpoint"
    assert (found["about"]["pattern"], found["about"]["solver"]) == ("2:4", "obs")
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in info.layers]
    for layer, record in zip(found["layers"], info.layers, strict=True):
        weight = weights[f"{layer['name']}.weight"]
        assert layer["shape"] == list(weight.shape)
        assert layer["sparsity"] == pytest.approx((weight == 0).float().mean().item(), abs=1e-6)
        assert layer["nm"] == "2:4"
        assert layer["error"] == record.error > 0
    dense, here = found["totals"]["nonzero"]
    assert here == sum(int(value.count_nonzero()) for value in weights.values())
    assert dense == sum(value.numel() for value in weights.values()) == found["totals"]["parameters"][1]


def test_the_table_has_a_row_for_every_layer(journey: Journey) -> None:
    result = call("inspect", journey.checkpoint)
    info = read_info(journey.checkpoint)
    assert info
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line.strip()}
    for layer in info.layers:
        shape, error = f"{layer.shape[0]}×{layer.shape[1]}", f"{layer.error:.4f}"
        assert rows[layer.name] == [shape, "0.500", "2:4", "-", "-", error]  # no units, and nothing for auto to choose
    assert {"parameters", "nonzero", "MACs", "bytes"} <= rows.keys()


def test_the_table_says_what_auto_took(pruned: dict[str, Path]) -> None:
    info = read_info(pruned["2:4"])
    assert info
    lines = {line.split()[0]: line for line in call("inspect", pruned["2:4"]).out.splitlines() if line.strip()}
    for layer in info.layers:
        assert layer.choice
        assert f" {layer.choice.solver} {layer.choice.damping:g} " in lines[layer.name]


def test_a_dense_model_has_totals_and_no_layers() -> None:
    found = call("inspect", "fashion", "--json").json
    assert found["about"]["kind"] == "dense model"
    assert found["layers"] == []
    assert all(here == dense for name, (dense, here) in found["totals"].items() if name != "nonzero")
    assert found["totals"]["nonzero"][1] <= found["totals"]["nonzero"][0] == 4_683_552
    table = call("inspect", "fashion").out
    assert "dense model" in table
    assert "sparsity" not in table


def test_a_bundle_is_told_with_its_ranges_and_checks(journey: Journey) -> None:
    found = call("inspect", journey.bundle, "--json").json
    assert found["about"]["kind"] == "bundle"
    assert found["about"]["pattern"] == "2:4"
    assert "onnx against PyTorch" in found["about"]
    assert found["totals"]["bytes"][1] == (journey.bundle / "denoiser" / "model.safetensors").stat().st_size
    table = call("inspect", journey.bundle)
    assert (table.code, table.err) == (0, "")
    assert "MACs a call" in table.out


def test_a_checkpoint_that_was_trained_since_is_refused(journey: Journey, tmp_path: Path) -> None:
    copy = shutil.copytree(journey.checkpoint, tmp_path / "copy")
    file = copy / "transformer" / WEIGHTS
    tensors = load_file(file)
    info = read_info(copy)
    assert info
    name = f"{info.layers[0].name}.weight"
    save_file(tensors | {name: torch.ones_like(tensors[name])}, file)
    assert_sentence(call("inspect", copy), 2, info.layers[0].name)


@pytest.mark.parametrize("name", ["denoiser/model.onnx", "denoiser/model.safetensors", "vae/config.json"])
def test_a_bundle_that_was_changed_since_is_refused(journey: Journey, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(journey.bundle, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    assert_sentence(call("inspect", copy, "--json"), 2, name, "SHA-256")
