"""Denoiser backends: `load(bundle, manifest, device) -> callable(**named tensors) -> tensor`, one file each."""

import importlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest

Denoise = Callable[..., Tensor]

BACKENDS = {
    "torch": "obsdiff.runtime.backends.torch",
    "onnxruntime": "obsdiff.runtime.backends.onnxruntime",
}


def choose_backend(manifest: Manifest, device: str) -> str:
    """`auto`: ONNX Runtime on a CPU when the bundle has a graph, torch otherwise."""
    return "onnxruntime" if device == "cpu" and "onnx" in manifest.formats else "torch"


def load_backend(name: str, bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """Raises InputError for a backend that is unknown, not installed, or that the bundle has nothing for."""
    if name not in BACKENDS:
        raise InputError(f"--backend {name}: there are auto, {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name]).load(bundle, manifest, device)
