"""fp16 that overflows: found at export, with the first module to do it and what to use instead."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from obsdiff.errors import ObsdiffError
from obsdiff.export import onnx, parity
from obsdiff.export.ranges import make_axes
from obsdiff.export.stage import export
from obsdiff.models import graph
from obsdiff.models.source import find_source, load_denoiser

LOUD = "transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(scope="module")
def loud(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with one block whose feed-forward gives some 1e6, with weights that fp16 holds."""
    model = Path(shutil.copytree(one_block_sd3, tmp_path_factory.mktemp("loud") / "model"))
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[f"{LOUD}.weight"] *= 3e4 / tensors[f"{LOUD}.weight"].abs().max()
    save_file(tensors, path)
    return model


def test_the_first_module_that_overflows_is_found_in_forward_order(loud: Path) -> None:
    source = find_source(loud)
    shapes = parity.check_shapes(make_axes(source, "1:1:2", None))
    denoiser = load_denoiser(source, torch.float32).half()
    for seed in range(len(shapes)):
        assert parity.find_overflow(denoiser, source.spec, source.config, shapes, seed) == LOUD
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_a_model_that_does_not_overflow_has_none(one_block_sd3: Path) -> None:
    source = find_source(one_block_sd3)
    shapes = parity.check_shapes(make_axes(source, "1:1:2", None))
    denoiser = load_denoiser(source, torch.float32)
    assert parity.find_overflow(denoiser, source.spec, source.config, shapes, 0) == ""


def test_an_fp16_export_that_overflows_names_the_module_and_proposes_bf16(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own fp16 in place of the graph, which takes long to trace."""
    denoiser = load_denoiser(find_source(loud), torch.float32).half()
    compare = parity.compare

    def check(expected: Any, spec: Any, config: Any, shapes: Any, _path: Path, precision: Any) -> Any:
        half = graph.TensorDenoiser(denoiser, spec)
        with torch.no_grad():
            return compare(
                lambda **inputs: half(*inputs.values()), expected, spec, config, shapes, precision, name="graph"
            )

    monkeypatch.setattr(onnx, "export_onnx", lambda *_arguments: None)
    monkeypatch.setattr(onnx, "check_onnx", check)
    with pytest.raises(ObsdiffError) as caught:
        export(loud, tmp_path / "bundle", precision="fp16")
    said = str(caught.value)
    assert said.startswith("the fp16 graph gives NaN or infinity at batch 1, height ")
    assert "use --precision bf16, which has float32's range" in said
    assert said.endswith(f"the first module to pass fp16's largest number is {LOUD}")
    assert not list(tmp_path.iterdir())
