"""ONNX Runtime's TensorRT provider, and CUDA's for what TensorRT does not take.

It builds TensorRT engines when it loads a graph, for all shapes in the bundle's range, and keeps them in the user's
cache. The option names are those of https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html.
"""

import contextlib
import hashlib
import importlib
from pathlib import Path
from typing import Any

from obsdiff.device import gpu_sm
from obsdiff.errors import InputError
from obsdiff.export.bundle import GRAPH, Manifest
from obsdiff.files import cache_folder
from obsdiff.progress import Progress
from obsdiff.runtime.backends import Denoise
from obsdiff.runtime.backends.onnxruntime import open_graph


def load(
    bundle: Path, manifest: Manifest, device: str, *, build: bool = True, progress: Progress | None = None
) -> Denoise:
    """Raises InputError when the bundle has no graph, the provider is not there, or it would build and must not."""
    if not device.startswith("cuda"):
        raise InputError(f"--backend onnxruntime-tensorrt: TensorRT runs on a CUDA GPU, not on {device}")
    folder = engine_folder(manifest, device)
    if not is_built(folder):
        if not build:
            raise InputError(f"{bundle} has no onnxruntime-tensorrt engine for {device}, and --no-build forbids it")
        (progress or Progress()).message(f"building TensorRT engines by ONNX Runtime: kept in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ImportError):  # the pip package brings libraries that the provider finds once loaded
        importlib.import_module("tensorrt")
    providers = {"TensorrtExecutionProvider": trt_options(manifest, folder), "CUDAExecutionProvider": {}}
    return open_graph(bundle, manifest, device, providers, "onnxruntime-tensorrt")


def engine_folder(manifest: Manifest, device: str) -> Path:
    """Where the provider keeps this graph's engines: it tells two graphs apart by their name alone."""
    import onnxruntime

    graph = [f"{name}\0{file.sha256}\n" for name, file in sorted(manifest.files.items()) if name.startswith(GRAPH)]
    digest = hashlib.sha256("".join([*graph, onnxruntime.__version__]).encode()).hexdigest()
    return cache_folder("onnxruntime", f"sm_{gpu_sm(device)}-{digest[:16]}")


def is_built(folder: Path) -> bool:
    return any(folder.glob("*.engine"))


def trt_options(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the provider is told: precision, sparsity, caches, and the shapes that the bundle was exported for."""
    return {
        **({f"trt_{manifest.precision}_enable": True} if manifest.precision != "fp32" else {}),
        "trt_sparsity_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder.parent),
        **{f"trt_profile_{bound}_shapes": profile(manifest, bound) for bound in ("min", "opt", "max")},
    }


def profile(manifest: Manifest, bound: str) -> str:
    """The inputs' shapes at `min`, `opt` or `max` of every axis, as `hidden_states:2x16x64x64,timestep:2`."""
    shapes = {
        entry.name: [axis if isinstance(axis, int) else getattr(manifest.axes[axis], bound) for axis in entry.axes]
        for entry in manifest.inputs
    }
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
