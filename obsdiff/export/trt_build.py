"""The builder of TensorRT and TensorRT-RTX: from the graph to a plan, with progress, timings and plain errors."""

import contextlib
import re
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from filelock import FileLock

from obsdiff.device import gpu_sm
from obsdiff.errors import ObsdiffError
from obsdiff.export.bundle import GRAPH, Manifest
from obsdiff.export.schema import Axis, EngineKey
from obsdiff.export.trt_log import (
    get_logger,
    inspector_layers,
    name_modules,
    node_modules,
    say_errors,
    sparsity_counts,
    sparsity_lines,
    start,
)
from obsdiff.files import cache_folder, whole, write_json
from obsdiff.progress import Progress

FLAGS = {
    "sparse": "SPARSE_WEIGHTS",
    "refit": "REFIT",
    "weight_streaming": "WEIGHT_STREAMING",
    "version_compatible": "VERSION_COMPATIBLE",
}
"""Options of an engine that are flags of the builder."""


def build(
    trt: Any,
    title: str,
    bundle: Path,
    manifest: Manifest,
    key: EngineKey,
    out: Path,
    monitor: Any,
    timing_cache: Path | None,
) -> None:
    """Writes the engine to `out`, or nothing where the monitor was stopped. See obsdiff.export.tensorrt.build."""
    graph = bundle / GRAPH
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    device = next((i for i in devices if f"sm_{gpu_sm(f'cuda:{i}')}" in key.target.split("+")), None)
    logger = get_logger(trt)
    with torch.cuda.device(device) if device is not None else contextlib.nullcontext():
        builder = start(trt.Builder, logger, title)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(graph)):  # by its path, since weights past 2 GB lie beside it
            raise ObsdiffError(f"{title} cannot use the graph: {_parser_error(parser, graph)}")
        config = _config(trt, builder, key)
        config.progress_monitor = monitor
        config.add_optimization_profile(_profile(builder, manifest))
        timings = timing_cache or cache_folder("timing") / f"{key.target}-{key.version}.cache"
        cache = _load_timings(config, timings) if key.format == "tensorrt" else None
        plan = builder.build_serialized_network(network, config)
        if plan is None and not monitor.stopped:
            raise ObsdiffError(f"{title} cannot build the engine: {_builder_error(logger.messages, graph)}")
        if plan is None:
            return
        with out.open("wb") as file:
            file.write(plan)
        if key.format == "tensorrt":
            with contextlib.suppress(*(OSError,) * (timing_cache is None)):  # a file that was asked for must be written
                _save_timings(config, cache, timings)
            _write_layers(trt, plan, logger, out.with_name(f"{key.file}.layers.json"))


def _config(trt: Any, builder: Any, key: EngineKey) -> Any:
    config = builder.create_builder_config()
    for option, flag in FLAGS.items():
        if getattr(key.options, option):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would be ten bits, and off from PyTorch by 1e-3
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if key.options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if key.format == "tensorrt-rtx":
        targets = key.target.split("+")
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("sm_", "SM")), i)
    else:  # its own limit is the whole memory, and what others hold of that makes kernels fail that are tried
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, torch.cuda.mem_get_info()[0])
    return config


def _profile(builder: Any, manifest: Manifest) -> Any:
    """One optimisation profile: the shortest, usual and longest shape of each input."""
    profile = builder.create_optimization_profile()
    points = {name: _points(axis) for name, axis in manifest.axes.items()}
    for entry in manifest.inputs:
        shapes = zip(*(points[axis] if isinstance(axis, str) else (axis,) * 3 for axis in entry.axes), strict=True)
        profile.set_shape(entry.name, *shapes)
    return profile


def _points(axis: Axis) -> tuple[int, int, int]:
    """The least, usual and greatest size that the axis allows, each a multiple of its step."""
    step = axis.multiple
    low, high = -(-axis.min // step) * step, axis.max // step * step
    return low, min(max(low, axis.opt // step * step), high), high


def _parser_error(parser: Any, graph: Path) -> str:
    """The first node that the parser refuses, its operation, its module, and why."""
    if not parser.num_errors:
        return "it does not say why"
    error = parser.get_error(0)
    name, operation = error.node_name(), error.node_operator()
    why = re.sub(r"^.*?(?:ERROR|Assertion failed): ", "", " ".join(error.desc().split()))
    if "Plugin not found" in why:
        why = "it has no such operation"
    if not name:
        return why[:300]
    module = node_modules(graph).get(name)
    return f"the node {name} ({operation}){f' of the module {module}' if module else ''}: {why[:300]}"


def _builder_error(messages: Any, graph: Path) -> str:
    said = name_modules(say_errors(messages), graph)
    if re.search(r"out ?of ?memory", said, re.IGNORECASE):
        free = f"{torch.cuda.mem_get_info()[0] / 1e9:.1f} GB were free; " if torch.cuda.is_available() else ""
        said = f"too little memory ({free}a smaller largest --batch or --size needs less): {said}"
    return said


def _write_layers(trt: Any, plan: Any, logger: Any, path: Path) -> None:
    eligible, picked = sparsity_lines(logger.messages)
    counts = dict(zip(("eligible", "picked"), sparsity_counts(logger.messages), strict=True))
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # it was built a moment ago
    engine = runtime.deserialize_cuda_engine(plan)
    layers = inspector_layers(engine) if engine else []
    write_json(path, {"eligible": eligible, "picked": picked, "counts": counts, "layers": layers})


def make_monitor(trt: Any, progress: Progress, title: str) -> Any:
    """Shows what the builder is at, once a second, and cancels the build at its next step once `stopped` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.steps: dict[str, int] = {}
            self.shown = monotonic()

        def phase_start(self, name: str, _parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            self.show(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self.show(name, step + 1)
            return not self.stopped

        def phase_finish(self, name: str) -> None: ...

        def show(self, name: str, step: int) -> None:
            if monotonic() - self.shown > 1:
                self.shown = monotonic()
                total = self.steps.get(name, 1)
                progress.advance(0, f"{title}: {name.lower()}" + (f" ({step} of {total})" if total > 1 else ""))

    return Monitor()


def _load_timings(config: Any, path: Path) -> Any:
    """Attaches the kernel timings of a file, which save timing them again; none where it is of another GPU or version.

    Returns TensorRT's ITimingCache.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timings(config: Any, cache: Any, path: Path) -> None:
    """Writes the timings together with what other builds wrote meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), whole(path) as part:
        others = config.create_timing_cache(path.read_bytes()) if path.exists() else None
        if others is not None:
            cache.combine(others, ignore_mismatch=False)
        part.write_bytes(cache.serialize())
