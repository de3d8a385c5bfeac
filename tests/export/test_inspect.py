"""Inspecting: the numbers of a model, its checkpoint and its bundle, and that they agree with each other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from obsdiff.checkpoint import read_info
from obsdiff.errors import InputError
from obsdiff.export.bundle import open_bundle
from obsdiff.export.inspect import inspect
from obsdiff.export.totals import count_nonzero
from obsdiff.models.source import find_source, load_denoiser


def test_the_dense_model() -> None:
    found = inspect("fashion")
    assert found["about"] == {
        "kind": "dense model",
        "pipeline": "StableDiffusion3Pipeline",
        "denoiser": "SD3Transformer2DModel",
        "weights": "float16",
    }
    state = load_denoiser(find_source("fashion")).state_dict()
    parameters = sum(tensor.numel() for tensor in state.values())
    assert found["totals"]["parameters"] == [parameters] * 2
    assert found["totals"]["nonzero"] == [parameters, count_nonzero(state)]
    assert found["totals"]["macs"][0] == found["totals"]["macs"][1] > parameters
    assert found["layers"] == []
    json.dumps(found)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_a_checkpoint_with_zeros_keeps_its_shapes(pruned: dict[str, Path], pattern: str) -> None:
    found, dense = inspect(pruned[pattern]), inspect("fashion")["totals"]
    assert found["about"]["kind"] == "pruned checkpoint"
    assert (found["about"]["base"], found["about"]["pattern"]) == ("fashion", pattern)
    assert found["about"]["calibration"] == "4 prompts, 2 steps"
    assert found["totals"]["parameters"] == dense["parameters"]
    assert found["totals"]["macs"] == dense["macs"]
    zeros = 0
    weights = load_file(pruned[pattern] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert len(found["layers"]) == 8 * 12 - 3
    for layer in found["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        assert list(weight.shape) == list(layer["shape"])
        assert layer["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert 0 < layer["error"] < 1
        assert layer["units"] is None
        assert (weight == 0).float().mean() == pytest.approx(layer["sparsity"], abs=1e-3)
        if pattern == "2:4":
            assert layer["nm"] == "2:4"
            assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
        else:
            assert layer["nm"] is None
        zeros += weight.numel() // 2
    assert found["totals"]["nonzero"][1] == pytest.approx(dense["nonzero"][1] - zeros, rel=0.002)
    json.dumps(found)


def test_a_structured_checkpoint_says_what_stays(pruned: dict[str, Path]) -> None:
    found = inspect(pruned["structured"])
    info = read_info(pruned["structured"])
    assert info is not None
    assert found["about"]["after export"] == "heads and neurons that were pruned are gone"
    removed = 0
    for record in info.groups:
        gone, size = record.of - len(record.kept), 16 if record.kind == "heads" else 1
        assert gone > 0
        writers, readers = (6, 2) if record.kind == "heads" else (1, 1)
        removed += gone * size * (writers * (128 + 1) + readers * 128)
    dense, here = found["totals"]["parameters"]
    assert dense - here == removed
    units = {layer["name"]: layer["units"] for layer in found["layers"]}
    first = info.groups[0]
    assert units[f"transformer_blocks.{first.block}.attn.to_q"] == f"{len(first.kept)} of 8 heads"
    assert all(units.values())
    json.dumps(found)


def test_a_bundle_and_its_checkpoint_agree(pruned: dict[str, Path], bundles: dict[str, Path]) -> None:
    for model, bundle in (("fashion", bundles["dense"]), (pruned["structured"], bundles["structured"])):
        left, right = inspect(model), inspect(bundle)
        for name in ("parameters", "macs"):
            assert left["totals"][name] == right["totals"][name]
        for name in ("pipeline", "denoiser"):
            assert left["about"][name] == right["about"][name]
        state = load_file(bundle / "denoiser" / "model.safetensors")
        assert right["totals"]["parameters"][1] == sum(tensor.numel() for tensor in state.values())
        assert right["totals"]["nonzero"][1] == count_nonzero(state)
        json.dumps(right)
    assert inspect("fashion")["totals"]["nonzero"] == inspect(bundles["dense"])["totals"]["nonzero"]
    info = read_info(pruned["structured"])
    assert info is not None
    assert inspect(bundles["structured"])["groups"] == [record.model_dump() for record in info.groups]


def test_a_bundle_says_its_ranges_and_checks(bundles: dict[str, Path]) -> None:
    about = inspect(bundles["structured"])["about"]
    assert about["kind"] == "bundle"
    assert (about["base"], about["pattern"], about["precision"]) == ("fashion", "structured", "fp32")
    assert about["batch"] == "1 to 16 denoiser inputs (two an image with guidance)"
    assert about["height"] == about["width"] == "16 to 48 pixels in steps of 8"
    assert about["tokens"] == "1 to 589 prompt tokens"
    assert float(about["onnx against PyTorch"]) < 1e-4
    files = open_bundle(bundles["structured"]).files
    assert (about["files"], about["bytes of all files"]) == (len(files), sum(file.bytes for file in files.values()))
    assert inspect(bundles["dense"])["about"]["pattern"] == "dense"


def test_what_does_not_agree_with_its_records_is_refused(
    pruned: dict[str, Path], graphless: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(pruned["2:4"], tmp_path / "checkpoint"))
    info = json.loads((checkpoint / "obsdiff.json").read_text())
    info["layers"][0]["shape"] = [64, 128]
    (checkpoint / "obsdiff.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"does not fit a weight|another shape"):
        inspect(checkpoint)
    bundle = Path(shutil.copytree(graphless, tmp_path / "bundle"))
    (bundle / "denoiser" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is not the file that was exported"):
        inspect(bundle)
    with pytest.raises(InputError, match="does not exist"):
        inspect(tmp_path / "nothing")
    assert torch.is_grad_enabled()
