"""Every family the whole way: pruned, exported, and drawn by every backend as the pruned checkpoint draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.export.schema import EngineOptions
from obsdiff.export.stage import export
from obsdiff.models import FAMILIES
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

# Heads and neurons first, 2:4 on what is left; the structured part alone where 2:4 does not divide a tiny width.
OPTIONS: dict[str, Any] = {
    "pattern": "structured+2:4",
    "num_prompts": 2,
    "steps": 2,
    "batch_size": 2,
    "packages": 1,
    "allocation": "uniform",
    "solver": "obs",
    "blocks": ":",
    "device": "cpu",
}
CHANGES: dict[str, dict[str, Any]] = {}
"""What a family's tiny model needs otherwise."""


def latents(path: Path, backend: str) -> torch.Tensor:
    pipe = load(path, backend, "cpu")
    options = call_options(pipe, path, {"num_inference_steps": 2})
    return torch.as_tensor(generate(pipe, ["a red bag", "a blue coat"], [3, 4], options, "latent"))


@pytest.mark.parametrize("family", [*(spec.family for spec in FAMILIES.values()), "sdxl"])
def test_from_a_model_to_pictures(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, checkpoint, bundle = tiny_model(family), tmp_path / "checkpoint", tmp_path / "bundle"
    info = prune(model, checkpoint, **{**OPTIONS, **CHANGES.get(family, {})})
    assert info.groups
    manifest = export(checkpoint, bundle, formats=("onnx", "tensorrt-rtx"), options=EngineOptions(sm=("86",)))
    assert [engine.key.target for engine in manifest.engines] == ["sm_86"], "no GPU is needed to build it"
    assert manifest.totals.parameters < manifest.dense.parameters
    assert manifest.totals.nonzero < 0.9 * manifest.totals.parameters
    wanted = latents(checkpoint, "torch")
    assert (wanted - latents(model, "torch")).norm() > 1e-4 * wanted.norm(), "pruning changed nothing"
    for backend in ("torch", "onnxruntime"):
        assert (latents(bundle, backend) - wanted).norm() < 1e-3 * wanted.norm(), backend
