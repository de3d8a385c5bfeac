"""Denoiser backends: `load(bundle, manifest, device) -> callable(**named tensors) -> tensor`, one file each.

The backends that run an engine have none of their own: obsdiff.export.engines finds, builds and opens engines.
"""

import importlib
from pathlib import Path

from obsdiff.errors import InputError
from obsdiff.export import engines
from obsdiff.export.bundle import Manifest
from obsdiff.export.engines import Denoise
from obsdiff.progress import Progress

MODULES = {
    "torch": "obsdiff.runtime.backends.torch",
    "onnxruntime": "obsdiff.runtime.backends.onnxruntime",
}
BACKENDS = (*MODULES, *engines.FORMATS)


def choose_backend(manifest: Manifest, device: str) -> str:
    """`auto`: ONNX Runtime on a CPU when the bundle has a graph, torch otherwise."""
    return "onnxruntime" if device == "cpu" and "onnx" in manifest.formats else "torch"


def load_backend(
    name: str, bundle: Path, manifest: Manifest, device: str, *, build: bool = True, progress: Progress | None = None
) -> Denoise:
    """The denoiser on a backend; an engine that the bundle lacks for this machine is built unless `build` is False.

    Raises InputError for a backend that is unknown, not installed, or that the bundle has nothing for.
    """
    if name in engines.FORMATS:
        return engines.open_engine(name, bundle, manifest, device, build=build, progress=progress)
    if name not in MODULES:
        raise InputError(f"--backend {name}: there are auto, {', '.join(BACKENDS)}")
    return importlib.import_module(MODULES[name]).load(bundle, manifest, device)
