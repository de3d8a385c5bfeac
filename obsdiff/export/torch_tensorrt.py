"""Engines of Torch-TensorRT: the traced module with its parts compiled by TensorRT, saved as an exported program.

Loading one unpickles (torch.export.load does, `weights_only=False` where tensors are not plain; so does Torch-TensorRT
for its metadata): it is trusted as a program is, by who built it.
"""

import contextlib
import io
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.device import gpu_sm
from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.export.bundle import CONFIG, WEIGHTS, Manifest
from obsdiff.export.cuda_graphs import with_graphs
from obsdiff.export.engines import Denoise
from obsdiff.export.program import load_module, program_hash, quiet, trace
from obsdiff.export.schema import EngineKey, EngineOptions, Precision
from obsdiff.files import read_json
from obsdiff.models import graph
from obsdiff.progress import Progress


def check(_options: EngineOptions, device: str, _precision: Precision) -> None:
    """Raises InputError where no engine can be built: no GPU to build it on, or no Torch-TensorRT."""
    if not gpu_sm(device):
        raise InputError(f"torch-tensorrt builds on the GPU that it is for, and the device is {device}")
    load_library()


def load_library() -> Any:
    """torch_tensorrt. Raises InputError that says what to install."""
    try:
        with quiet():
            import torch_tensorrt
    except Exception as error:  # with a torch that it was not built for it fails in many ways
        raise InputError(
            f"torch-tensorrt is not there or does not fit torch {torch.__version__}: "
            f"pip install 'obsdiff[torch-tensorrt]' ({first_line(error)})"
        ) from None
    return torch_tensorrt


def make_key(manifest: Manifest, options: EngineOptions, device: str) -> EngineKey:
    """The key of an engine for the GPU at hand. Raises InputError where there is none, or no Torch-TensorRT."""
    check(options, device, manifest.precision)
    return EngineKey(
        format="torch-tensorrt",
        source=program_hash(manifest, WEIGHTS),
        target=f"sm_{gpu_sm(device)}",
        version=_version(),
        cuda=torch.version.cuda or "",
        precision=manifest.precision,
        profile=manifest.axes,
        options=EngineOptions(sparse=options.sparse),
    )


def misfit(key: EngineKey, device: str) -> str:
    """Why an engine with the key does not run on the device, "" where it does."""
    if not (sm := gpu_sm(device)):
        return f"it needs a CUDA GPU, and the device is {device}"
    if key.target != f"sm_{sm}":
        return f"it was built for {key.target}, and {device} is sm_{sm}"
    if key.version != _version():
        return f"it was built with {key.version}, and here is {_version()}"
    if key.cuda != torch.version.cuda:
        return f"it was built with CUDA {key.cuda}, and this torch has {torch.version.cuda}"
    return ""


def build(bundle: Path, manifest: Manifest, key: EngineKey, out: Path, progress: Progress) -> None:
    """Traces the bundle's module on the GPU and compiles it, with sparse kernels where the options allow them.

    Raises ObsdiffError when it cannot be traced, compiled or saved.
    """
    library = load_library()
    module = load_module(bundle, manifest, "cuda")
    progress.advance(0, "tracing for torch-tensorrt")
    with quiet():
        program = trace(module, bundle, manifest, "cuda")
    progress.advance(0, "compiling for torch-tensorrt: minutes")
    with quiet(), tempfile.TemporaryDirectory(prefix="obsdiff-trt-") as folder:
        try:
            compiled = library.dynamo.compile(
                program,
                arg_inputs=_inputs(library, bundle, manifest),
                sparse_weights=key.options.sparse,
                timing_cache_path=f"{folder}/timing.bin",
            )
            # With retrace it would trace again, from the first inputs' shapes, what has its ranges already.
            library.save(compiled, f"{folder}/engine.pt2", output_format="exported_program", retrace=False)
        except Exception as error:  # of torch, of TensorRT and of its own
            raise ObsdiffError(f"Torch-TensorRT could not compile the denoiser: {first_line(error)}") from error
        shutil.move(f"{folder}/engine.pt2", out)


def open_engine(path: Path, manifest: Manifest, _key: EngineKey, device: str, _bundle: Path | None = None) -> Denoise:
    """Loads an engine, which runs what is in it. Raises ObsdiffError when the file is none."""
    library = load_library()
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.cuda.device(device):  # it prints a traceback
            module = library.load(str(path)).module()
    except Exception as error:  # of zipfile, of torch, of TensorRT
        raise ObsdiffError(f"{path} is not an engine that Torch-TensorRT built: {first_line(error)}") from None

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        return module(*(inputs[entry.name].contiguous() for entry in manifest.inputs))

    return with_graphs(denoise)


def _inputs(library: Any, bundle: Path, manifest: Manifest) -> list[Any]:
    """The range of every input's shape; a plain shape for an input that has but one."""
    config = read_json(bundle / CONFIG)
    profiles = [
        graph.with_image({name: getattr(axis, which) for name, axis in manifest.axes.items()}, manifest.spec, config)
        for which in ("min", "opt", "max")
    ]
    inputs = []
    for entry in manifest.inputs:
        low, usual, high = (
            tuple(sizes[axis] if isinstance(axis, str) else axis for axis in entry.axes) for sizes in profiles
        )
        shapes = {"shape": usual} if low == high else {"min_shape": low, "opt_shape": usual, "max_shape": high}
        inputs.append(library.Input(**shapes, dtype=getattr(torch, entry.dtype), name=entry.name))
    return inputs


def _version() -> str:
    """What an engine is bound to: Torch-TensorRT, the TensorRT below it and torch."""
    import tensorrt

    return f"torch-tensorrt {version('torch_tensorrt')}, tensorrt {tensorrt.__version__}, torch {torch.__version__}"
