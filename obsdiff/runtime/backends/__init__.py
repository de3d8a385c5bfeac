"""Denoiser backends: `load(bundle, manifest, device) -> callable(**named tensors) -> tensor`, one file each.

The backends that run an engine have none of their own: obsdiff.export.engines finds, builds and opens engines.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from obsdiff.device import describe
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import engines
from obsdiff.export.bundle import Manifest
from obsdiff.export.engines import Denoise
from obsdiff.export.schema import Tuned
from obsdiff.progress import Progress

MODULES = {
    "torch": "obsdiff.runtime.backends.torch",
    "torch-sparse": "obsdiff.runtime.backends.torch_sparse",
    "onnxruntime": "obsdiff.runtime.backends.onnxruntime",
    "onnxruntime-tensorrt": "obsdiff.runtime.backends.onnxruntime_tensorrt",
}
BACKENDS = (*MODULES, *engines.FORMATS)
BUILDS = ("onnxruntime-tensorrt",)  # of MODULES: their `load` takes `build` and `progress` as well
LIBRARIES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-tensorrt": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "torch-tensorrt": "torch_tensorrt",
}
NEED_CUDA = ("torch-sparse", "onnxruntime-tensorrt", *engines.NEED_GRAPH, "torch-tensorrt")
PROVIDERS = {"onnxruntime": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}
ORDER = {"cuda": ("tensorrt", "torch-tensorrt", "onnxruntime", "torch"), "cpu": ("onnxruntime", "torch")}
FOREIGN = "its engine brings code of its own and was not built by this user here"


def choose_backend(bundle: Path, manifest: Manifest, device: str, progress: Progress | None = None) -> str:
    """`auto`: what `obsdiff tune` recorded for this device, else the first that is ready.

    The order is tensorrt, torch-tensorrt, onnxruntime, torch on CUDA, and onnxruntime, torch elsewhere. Ready is what
    is installed and would not have to build an engine first; an engine that brings code of its own, such as aoti's or
    torch-tensorrt's, must have been built by this user. `progress` is told what was taken, and why.
    """
    progress = progress or Progress()
    record = find_tuned(manifest, device)
    if record:
        if not (reason := unready(record.backend, bundle, manifest, device)):
            progress.message(f"backend: {record.backend}, the fastest when this device was tuned")
            return record.backend
        progress.message(f"this device was tuned to {record.backend}, which cannot be used: {reason}")
    order = ORDER.get(device.partition(":")[0], ORDER["cpu"])
    name = next((name for name in order if not unready(name, bundle, manifest, device)), "torch")
    progress.message(f"backend: {name}, the first that is ready{'' if record else ' (obsdiff tune finds the fastest)'}")
    return name


def check_name(name: str) -> None:
    """Raises InputError for what is neither `auto` nor a backend."""
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"--backend {name}: there are auto, {', '.join(BACKENDS)}")


def find_tuned(manifest: Manifest, device: str) -> Tuned | None:
    """The record of this device, if it was tuned."""
    if not manifest.tuned:
        return None
    here = describe(device)
    return next((record for record in manifest.tuned if (record.kind, record.name, record.target) == here), None)


def obstacle(name: str, manifest: Manifest, device: str) -> str:
    """What keeps the backend from running on this machine, whatever is built; "" where nothing does.

    Nothing heavy is imported to tell.
    """
    kind = device.partition(":")[0]
    if name not in BACKENDS:
        return "this obsdiff has no such backend"
    if name in NEED_CUDA and kind != "cuda":
        return "it needs a CUDA GPU"
    if name in PROVIDERS and "onnx" not in manifest.formats:
        return "the bundle has no ONNX graph"
    return library_obstacle(name, manifest, device)


def library_obstacle(name: str, manifest: Manifest, device: str) -> str:
    """What keeps the backend's library from running graphs or engines of this precision on the device."""
    kind = device.partition(":")[0]
    if name == "onnxruntime" and kind == "cpu" and manifest.precision == "bf16":
        return "ONNX Runtime has no bf16 kernels for CPUs"
    if name in LIBRARIES and not find_spec(LIBRARIES[name]):
        return f"{LIBRARIES[name]} is not installed"
    if name in PROVIDERS and kind not in ("cpu", "cuda"):
        return f"ONNX Runtime does not run on {kind} here"
    if name in PROVIDERS and kind == "cuda":
        import onnxruntime

        if PROVIDERS[name] not in onnxruntime.get_available_providers():
            return f"the onnxruntime that is installed has no {PROVIDERS[name]}"
    return ""


def unready(name: str, bundle: Path, manifest: Manifest, device: str) -> str:
    """Why `auto` may not take the backend as it is; "" where it may."""
    if reason := obstacle(name, manifest, device):
        return reason
    try:
        if name in BUILDS:
            from obsdiff.runtime.backends import onnxruntime_tensorrt as built

            return "" if built.is_built(built.engine_folder(manifest, device)) else "its engine would have to be built"
        if name in engines.FORMATS:
            found = engines.find_engine(name, bundle, manifest, device)
            if isinstance(found, str):
                return f"no engine fits: {found}"
            if engines.runs_code(found[0]) and not engines.was_built_here(found[1]):
                return FOREIGN
    except ObsdiffError as error:  # what a format says when its engine cannot be made here
        return str(error)
    return ""


def load_backend(
    name: str, bundle: Path, manifest: Manifest, device: str, *, build: bool = True, progress: Progress | None = None
) -> Denoise:
    """The denoiser on a backend; an engine that the bundle lacks for this machine is built unless `build` is False.

    Raises InputError for a backend that is unknown, not installed, or that the bundle has nothing for.
    """
    if name in engines.FORMATS:
        return engines.open_engine(name, bundle, manifest, device, build=build, progress=progress)
    check_name(name)
    options: dict[str, Any] = {"build": build, "progress": progress} if name in BUILDS else {}
    return importlib.import_module(MODULES[name]).load(bundle, manifest, device, **options)
