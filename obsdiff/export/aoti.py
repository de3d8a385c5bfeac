"""Engines of torch's own ahead-of-time compiler, AOTInductor: a .pt2 package of machine code, without the weights.

The weights stay in the bundle's safetensors, so an engine is a few megabytes, and models that differ in nothing but
their weights share one in the cache. The host's code is compiled for the processor at hand, on GPUs too: an engine
fits machines with the same processor features, GPU architecture, torch and CUDA.
"""

import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from obsdiff.device import gpu_sm
from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.export.bundle import Manifest
from obsdiff.export.cuda_graphs import with_graphs
from obsdiff.export.engines import Denoise
from obsdiff.export.program import load_module, program_hash, quiet, trace
from obsdiff.export.schema import EngineKey, EngineOptions, Precision
from obsdiff.progress import Progress

# What a compiler uses by itself when it is told to compile for the machine at hand.
FEATURES = re.compile(
    r"s?sse\w*|avx\w*|amx\w*|fma\w*|bmi\d|f16c|popcnt|abm|lzcnt|movbe|apx\w*|asimd\w*|sve\w*|bf16|i8mm"
)


def check(_options: EngineOptions, device: str, _precision: Precision) -> None:
    """Raises InputError where no engine can be built: on another kind of device, or without a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    _target(device)
    try:
        subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, check=True)  # noqa: S603
    except Exception as error:  # torch has an error of its own for it
        raise InputError(
            "aoti compiles with a C++ compiler and there is none: install g++ (apt install g++), "
            f"or name one in the environment variable CXX ({first_line(error)})"
        ) from None


def make_key(manifest: Manifest, _options: EngineOptions, device: str) -> EngineKey:
    """The key of an engine for this machine. Raises InputError for a device that AOTInductor does not compile for."""
    return EngineKey(
        format="aoti",
        source=program_hash(manifest),
        target=_target(device),
        version=torch.__version__,
        cuda=torch.version.cuda or "",
        precision=manifest.precision,
        profile=manifest.axes,
        options=EngineOptions(),
    )


def misfit(key: EngineKey, device: str) -> str:
    """Why an engine with the key does not run on the device, "" where it does."""
    if key.version != torch.__version__:
        return f"it was compiled with torch {key.version}, and this is torch {torch.__version__}"
    if key.cuda != (torch.version.cuda or ""):
        return f"it was compiled with CUDA {key.cuda or 'left out'}, and this torch has {torch.version.cuda or 'none'}"
    (unit, _, host), (own, _, own_host) = (target.partition("-") for target in (key.target, _target(device)))
    if unit != own:
        return f"it was compiled for {unit}, and {device} is {own}"
    if host != own_host:
        return f"it was compiled for a processor with other features ({host}), and this one is {own_host}"
    return ""


def build(bundle: Path, manifest: Manifest, key: EngineKey, out: Path, progress: Progress) -> None:
    """Traces the bundle's module and compiles it: half a minute for the smallest models, minutes for large ones.

    Raises InputError when there is no C++ compiler, ObsdiffError when the module cannot be traced or compiled.
    """
    from torch._inductor.utils import fresh_cache

    device = "cpu" if key.target.startswith("cpu-") else "cuda"
    check(key.options, device, key.precision)
    module = load_module(bundle, manifest, device)
    progress.advance(0, "tracing for aoti")
    with quiet():
        program = trace(module, bundle, manifest, device)
    if strange := sorted(set(program.constants) - _weights(module).keys()):
        raise ObsdiffError(f"the denoiser makes tensors of its own in a call ({strange[0]}), which aoti cannot hold")
    progress.advance(0, "compiling for aoti: a minute or more")
    with quiet(), tempfile.TemporaryDirectory(prefix="obsdiff-aoti-") as folder, fresh_cache(dir=folder):
        try:
            package = torch._inductor.aoti_compile_and_package(
                program,
                package_path=f"{folder}/engine.pt2",
                inductor_configs={
                    "aot_inductor.package_constants_in_so": False,
                    "cpp.dynamic_threads": True,  # as many as torch has when it runs, not when it was compiled
                },
            )
        except Exception as error:  # inductor's errors share no base class
            raise ObsdiffError(f"AOTInductor could not compile the denoiser: {first_line(error)}") from error
        shutil.move(package, out)


def open_engine(path: Path, manifest: Manifest, key: EngineKey, device: str, bundle: Path) -> Denoise:
    """Loads a package and hands it the bundle's weights, which it uses where they are.

    Raises ObsdiffError when the file is no such package, or is one for a denoiser with other weights.
    """
    where = torch.device(device)
    try:  # the loader takes any zip file, and says in pages what it lacks
        names = ZipFile(path).namelist()
        if not any(re.search(r"/aotinductor/model/.*\.so$", name) for name in names):
            raise BadZipFile("it holds no compiled model")
        with quiet():
            runner = torch._inductor.aoti_load_package(
                str(path),
                run_single_threaded=where.type == "cuda",  # its locks would be recorded into a CUDA graph
                device_index=where.index if where.type == "cuda" and where.index is not None else -1,
            )
        wanted = runner.get_constant_fqns()
    except (BadZipFile, OSError, RuntimeError, ValueError) as error:
        raise ObsdiffError(f"{path} is not an engine that AOTInductor compiled: {first_line(error)}") from None
    weights = _weights(load_module(bundle, manifest, device))
    if missing := sorted(set(wanted) - weights.keys()):
        raise ObsdiffError(f"{path} was compiled for another denoiser: {bundle} has no {missing[0]}")
    runner.load_constants({name: weights[name] for name in wanted}, check_full_update=True, user_managed=True)

    runner.weights = weights  # type: ignore[attr-defined]  # they live as long as what points into them

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        return runner(*(inputs[entry.name].contiguous() for entry in manifest.inputs))

    return with_graphs(denoise) if where.type == "cuda" else denoise


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that a trace has for them, those that are not saved included."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _target(device: str) -> str:
    """The device and the processor beside it: what machine code made here runs on."""
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"aoti: AOTInductor compiles for cpu and cuda here, not for {device}")
    own = f"sm_{gpu_sm(device)}" if where.type == "cuda" else "cpu"
    features = sorted(set(FEATURES.findall(_processor())))
    digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:8]
    return f"{own}-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}-{digest}"


def _processor() -> str:
    """The line of /proc/cpuinfo that lists the processor's features; its name on systems without the file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
