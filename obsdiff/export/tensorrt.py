"""TensorRT engines from the bundle's ONNX graph, and TensorRT-RTX's: one API, so one code with other data.

TensorRT builds on the GPU that the engine is for. TensorRT-RTX builds anywhere, for several GPUs at once, and compiles
its kernels where the engine is loaded. Networks are strongly typed: the precision is in the graph.
"""

import contextlib
import hashlib
import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from obsdiff.device import gpu_sm
from obsdiff.errors import InputError, first_line
from obsdiff.export import trt_build, trt_run
from obsdiff.export.bundle import GRAPH, Manifest
from obsdiff.export.engines import Denoise
from obsdiff.export.schema import EngineFormat, EngineKey, EngineOptions, Precision
from obsdiff.progress import Progress

TITLES: dict[EngineFormat, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
TURING = "75"


def make_key(manifest: Manifest, options: EngineOptions, device: str, format: EngineFormat = "tensorrt") -> EngineKey:
    """The key of the engine for the device's GPU, or for the GPUs that the options name.

    Without either, TensorRT-RTX builds for every GPU that it knows from Ampere on: an engine for several is held to
    the least of them, and Turing would cost the others most.
    Raises InputError when the library is not there, does not know the GPU, or has to build on another machine.
    """
    targets = check(options, device, manifest.precision, format)
    if GRAPH not in manifest.files:
        raise InputError(f"the bundle has no ONNX graph to build a {format} engine from: export with --format onnx")
    weights = [f"{name}\0{file.sha256}\n" for name, file in manifest.files.items() if name.startswith(GRAPH)]
    return EngineKey(
        format=format,
        source=hashlib.sha256("".join(weights).encode()).hexdigest(),
        target="+".join(f"sm_{sm}" for sm in targets),
        version=load_library(format).__version__,
        cuda=_cuda(format),
        precision=manifest.precision,
        profile=manifest.axes,
        options=options.model_copy(update={"sm": ()}),  # the target says it
    )


def check(options: EngineOptions, device: str, precision: Precision, format: EngineFormat = "tensorrt") -> list[str]:
    """The SMs that an engine would be built for. Raises InputError, as make_key does, before there is a bundle."""
    trt, own = load_library(format), gpu_sm(device)
    return _rtx_targets(trt, precision, options, own) if format == "tensorrt-rtx" else _own_target(options, own)


def _own_target(options: EngineOptions, own: str) -> list[str]:
    if not own:
        raise InputError(
            "--format tensorrt: TensorRT builds on the CUDA GPU that the engine is for, and there is none here; "
            "tensorrt-rtx builds without one"
        )
    if other := [sm for sm in options.sm if sm != own]:
        raise InputError(
            f"--sm {other[0]}: TensorRT builds for the GPU at hand, an sm_{own}: export on the other machine, "
            "or use --format tensorrt-rtx"
        )
    return [own]


def _rtx_targets(trt: Any, precision: Precision, options: EngineOptions, own: str) -> list[str]:
    known = [name[2:] for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    wanted = set(options.sm) or ({own} if own else {*known} - {TURING})
    if unknown := sorted(wanted - {*known}):
        which = f"{'--sm ' if options.sm else 'sm_'}{unknown[0]}"
        raise InputError(
            f"{which}: TensorRT-RTX {trt.__version__} knows the SMs {', '.join(known)}; "
            "for others use --format tensorrt"
        )
    if TURING in wanted and precision != "fp16":
        raise InputError(f"--sm {TURING}: TensorRT-RTX multiplies no {precision} matrices on Turing, fp16 only")
    if options.refit and not own:
        raise InputError("--refit: TensorRT-RTX builds a refittable engine only where there is a CUDA GPU")
    return [sm for sm in known if sm in wanted]


def misfit(key: EngineKey, device: str) -> str:
    """Why the engine does not run on the device, in the library that is installed; "" where it does."""
    own = gpu_sm(device)
    targets = [target.removeprefix("sm_") for target in key.target.split("+")]
    if not own:
        return f"it runs on a CUDA GPU, {key.target.replace('+', ' or ')}"
    ampere = key.options.hardware_compatible and min(int(own), *map(int, targets)) >= 80
    if own not in targets and not ampere:
        return f"it is for {key.target.replace('+', ' or ')}, and {device} is an sm_{own}"
    try:
        installed = load_library(key.format).__version__
    except InputError as error:
        return str(error)
    built, here = _version(key.version), _version(installed)
    newer = key.options.version_compatible and built[0] == here[0] and built <= here
    if built != here and not newer:
        return f"it was built by {TITLES[key.format]} {key.version}, and {installed} is installed"
    return ""


def build(
    bundle: Path,
    manifest: Manifest,
    key: EngineKey,
    out: Path,
    progress: Progress,
    timing_cache: Path | None = None,
) -> None:
    """Builds the engine; TensorRT's kernel timings are kept in `timing_cache`, by default one of the user's own.

    Beside a TensorRT engine it leaves <key.file>.layers.json: which layers could run sparse, which do, and all that
    the engine inspector tells of each. Ctrl-C cancels the build. Raises ObsdiffError with the library's own reason.
    """
    trt = load_library(key.format)
    monitor = trt_build.make_monitor(trt, progress, f"building {key.format} for {key.target}")
    # Signals reach the main thread alone. While the builder runs in another they are heard at once, and no callback
    # of the library meets an exception that it could not pass on.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            trt_build.build, trt, TITLES[key.format], bundle, manifest, key, out, monitor, timing_cache
        )
        try:
            future.result()
        except BaseException:
            monitor.stopped = True
            raise


def open_engine(path: Path, manifest: Manifest, key: EngineKey, device: str, _bundle: Path | None = None) -> Denoise:
    """The engine as a function of CUDA tensors. Raises ObsdiffError when the file is not an engine for this machine."""
    return trt_run.open_engine(load_library(key.format), TITLES[key.format], path, manifest, key, device)


def load_library(format: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises InputError that says how to install it."""
    name, title = format.replace("-", "_"), TITLES[format]  # type: ignore[index]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise InputError(f"{title} does not load: {first_line(error)}") from None
        raise InputError(f"{title} is not installed: pip install 'obsdiff[{format}]'") from None
    except (ImportError, OSError) as error:  # the bindings are there, the libraries are not
        raise InputError(f"{title} does not load: {first_line(error)}") from None


def _cuda(format: str) -> str:
    """CUDA's major version that the library was made for, which its package's name ends in; "" where it does not."""
    for number in ("13", "12"):
        with contextlib.suppress(PackageNotFoundError):
            distribution(f"{format}-cu{number}")
            return number
    return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
