"""Backends: the same function of named tensors, and one sentence when a bundle or a machine has nothing for them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.models.graph import TensorDenoiser, random_inputs
from obsdiff.models.sd3 import SD3
from obsdiff.models.source import find_source, load_denoiser
from obsdiff.runtime.backends import load_backend

HERE = ("torch", "onnxruntime")  # the backends that run on a CPU without an engine
SHAPES = [
    {"batch": 1, "height": 8, "width": 8, "tokens": 12},
    {"batch": 7, "height": 4, "width": 10, "tokens": 1},
    {"batch": 2, "height": 12, "width": 6, "tokens": 333},
]


@pytest.fixture(scope="module")
def manifest(one_block_bundle: Path) -> Manifest:
    return open_bundle(one_block_bundle)


@pytest.mark.parametrize("backend", HERE)
def test_every_backend_computes_what_the_diffusers_module_does(
    one_block_sd3: Path, one_block_bundle: Path, manifest: Manifest, backend: str
) -> None:
    source = find_source(one_block_sd3)
    reference = TensorDenoiser(load_denoiser(source, torch.float32), SD3)
    denoise = load_backend(backend, one_block_bundle, manifest, "cpu")
    for seed, shape in enumerate(SHAPES):
        inputs = random_inputs(SD3, source.config, shape, seed=seed)
        with torch.no_grad():
            wanted = reference(*inputs.values())
        got = denoise(**inputs)
        assert got.shape == wanted.shape
        assert not got.requires_grad
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("backend", HERE)
def test_results_do_not_share_memory(
    one_block_sd3: Path, one_block_bundle: Path, manifest: Manifest, backend: str
) -> None:
    denoise = load_backend(backend, one_block_bundle, manifest, "cpu")
    first, second = (random_inputs(SD3, find_source(one_block_sd3).config, SHAPES[0], seed=seed) for seed in (0, 1))
    kept = {name: value.clone() for name, value in first.items()}
    result = denoise(**first)
    copy = result.clone()
    assert not torch.equal(denoise(**second), copy)
    assert torch.equal(result, copy)
    assert torch.equal(denoise(**first), copy)
    assert all(torch.equal(first[name], value) for name, value in kept.items())


def test_tensors_need_not_be_contiguous(one_block_sd3: Path, one_block_bundle: Path, manifest: Manifest) -> None:
    inputs = random_inputs(SD3, find_source(one_block_sd3).config, SHAPES[1])
    turned = dict(inputs)
    turned["hidden_states"] = inputs["hidden_states"].transpose(2, 3).contiguous().transpose(2, 3)
    turned["timestep"] = inputs["timestep"][:1].expand(7)
    inputs["timestep"] = turned["timestep"].clone()
    assert not turned["hidden_states"].is_contiguous()
    denoise = load_backend("onnxruntime", one_block_bundle, manifest, "cpu")
    assert torch.equal(denoise(**turned), denoise(**inputs))


def test_the_module_of_a_structured_bundle_is_narrower(bundles: dict[str, Path]) -> None:
    path = bundles["structured"]
    manifest = open_bundle(path)
    inputs = random_inputs(SD3, find_source("fashion").config, SHAPES[1])
    outputs = [load_backend(name, path, manifest, "cpu")(**inputs) for name in ("torch", "onnxruntime")]
    assert (outputs[0] - outputs[1]).norm() < 1e-5 * outputs[0].norm()
    dense = load_backend("torch", bundles["dense"], open_bundle(bundles["dense"]), "cpu")(**inputs)
    assert (outputs[0] - dense).norm() > 1e-3 * dense.norm()


def test_an_unknown_backend_lists_those_there_are(one_block_bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"--backend openvino: there are auto, torch, torch-sparse, onnxruntime, "):
        load_backend("openvino", one_block_bundle, manifest, "cpu")


def test_onnxruntime_needs_a_graph(graphless: Path) -> None:
    with pytest.raises(InputError, match=r"has no ONNX graph: export with --format onnx, or use --backend torch"):
        load_backend("onnxruntime", graphless, open_bundle(graphless), "cpu")


@pytest.mark.parametrize("device", ["mps", "tpu", "gpu", ""])
def test_onnxruntime_says_when_it_has_no_provider(one_block_bundle: Path, manifest: Manifest, device: str) -> None:
    with pytest.raises(InputError, match=f"no provider for {device}"):
        load_backend("onnxruntime", one_block_bundle, manifest, device)


def test_a_damaged_graph_is_named(one_block_bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(one_block_bundle, tmp_path / "bundle"))
    (bundle / "denoiser" / "model.onnx").write_bytes(b"\x08\x0a damaged")
    with pytest.raises(ObsdiffError, match=r"denoiser/model\.onnx: ONNX Runtime does not load it") as caught:
        load_backend("onnxruntime", bundle, manifest, "cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_a_signature_that_the_graph_does_not_have_is_an_error_of_ours(
    one_block_sd3: Path, one_block_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(one_block_bundle, tmp_path / "bundle"))
    value = json.loads((bundle / "manifest.json").read_text())
    for dtype in ("float16", "bfloat16"):
        value["inputs"][1]["dtype"] = dtype
        (bundle / "manifest.json").write_text(json.dumps(value))
        inputs = random_inputs(SD3, find_source(one_block_sd3).config, SHAPES[0])
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(getattr(torch, dtype))
        with pytest.raises(ObsdiffError, match="bundle"):
            load_backend("onnxruntime", bundle, open_bundle(bundle), "cpu")(**inputs)
