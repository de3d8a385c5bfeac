"""Runs TensorRT's engines on torch's CUDA tensors: no copy through the host, on the caller's stream.

An engine holds the weights; an execution context holds the state of one call in flight, so every stream has its own.
A CUDA graph needs one as well, since a context that changes its shapes breaks the graphs captured from it. Contexts own
no memory: they borrow from torch's allocator for as long as a call takes, and all share it with the rest of the model.
"""

import contextlib
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from obsdiff.errors import ObsdiffError
from obsdiff.export.bundle import Manifest
from obsdiff.export.cuda_graphs import Recorder, with_graphs
from obsdiff.export.engines import Denoise
from obsdiff.export.schema import EngineKey
from obsdiff.export.trt_log import get_logger, say_errors, start
from obsdiff.files import cache_folder, whole

ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class Lane(NamedTuple):
    """What serves one CUDA stream of the caller's: the stream that the engine runs on, and its call there."""

    stream: torch.cuda.Stream
    run: Denoise


def open_engine(trt: Any, title: str, path: Path, manifest: Manifest, key: EngineKey, device: str) -> Denoise:
    """The engine in `path` as a function of CUDA tensors by name.

    Raises ObsdiffError when the file is damaged, is of another model or for another machine, or the GPU is too small.
    """
    with torch.cuda.device(device):
        engine = load_engine(trt, title, path, key)
        check_signature(engine, path, manifest)
        if key.options.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        make_context, keep_kernels = _contexts(trt, engine, key, path)
    logger = get_logger(trt)
    (output,) = manifest.outputs
    dtype = getattr(torch, output.dtype)
    lanes: dict[int, Lane] = {}
    lock = Lock()  # a call only enqueues, and two threads may be on one stream

    def enqueue(context: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Sets shapes and addresses and starts the engine on torch's current stream."""
        logger.messages.clear()
        for name, value in inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                why = say_errors(logger.messages)
                raise ObsdiffError(f"{path} does not take {name} of shape {list(value.shape)}: {why}")
            context.set_tensor_address(name, value.data_ptr())
        if missing := context.infer_shapes():
            raise ObsdiffError(f"{path} needs the input {missing[0]}")
        needed = context.update_device_memory_size_for_shapes()
        try:
            result = torch.empty(tuple(context.get_tensor_shape(output.name)), dtype=dtype, device=device)
            scratch = torch.empty(max(1, needed), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            raise ObsdiffError(
                f"too little GPU memory: {title} needs {needed / 1e9:.1f} GB beside the weights for "
                f"{_say_shapes(inputs)}, and {torch.cuda.mem_get_info()[0] / 1e9:.1f} GB are free"
            ) from None
        context.set_tensor_address(output.name, result.data_ptr())
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ObsdiffError(f"{title} does not run {path}: {say_errors(logger.messages)}")
        return result

    def open_lane(current: torch.cuda.Stream) -> Lane:
        context, recorder = make_context(), Recorder()
        seen: set[tuple[torch.Size, ...]] = set()

        def run(**inputs: Tensor) -> Tensor:
            result = enqueue(context, inputs)
            if (shapes := tuple(value.shape for value in inputs.values())) not in seen:
                seen.add(shapes)
                keep_kernels()
            return result

        def record(_run: Denoise, inputs: Mapping[str, Tensor]) -> Denoise:
            own = make_context()
            try:
                return recorder(lambda **values: enqueue(own, values), inputs)
            except ObsdiffError as error:  # what only capturing makes fail is no reason to stop
                raise RuntimeError(str(error)) from None

        # On the default stream TensorRT would wait for the whole device after each call.
        stream = current if current.cuda_stream else torch.cuda.Stream()
        # Weights that stream from the host cannot be captured.
        return Lane(stream, run if key.options.weight_streaming else with_graphs(run, record=record))

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        with lock, torch.cuda.device(device):
            ready = {entry.name: aligned(inputs[entry.name].to(device)) for entry in manifest.inputs}
            current = torch.cuda.current_stream()
            if current.cuda_stream not in lanes:
                lanes[current.cuda_stream] = open_lane(current)
            stream, run = lanes[current.cuda_stream]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = run(**ready)
            current.wait_stream(stream)
            for value in ready.values():
                value.record_stream(stream)
            result.record_stream(current)
        return result

    return denoise


def load_engine(trt: Any, title: str, path: Path, key: EngineKey) -> Any:
    """Deserialises an engine onto the current CUDA device. Raises ObsdiffError with what is wrong with the file."""
    size, (free, _) = path.stat().st_size, torch.cuda.mem_get_info()
    if size > free and not key.options.weight_streaming:
        raise ObsdiffError(
            f"too little GPU memory: the weights in {path} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "an export with --weight-streaming leaves part of them in the host's memory"
        )
    logger = get_logger(trt)
    runtime = start(trt.Runtime, logger, title)
    # A version-compatible engine carries its own runtime: code, and so is such an engine.
    runtime.engine_host_code_allowed = key.options.version_compatible
    if not size:
        raise ObsdiffError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        if key.format == "tensorrt-rtx" and (why := _invalid(trt, runtime, plan)):
            raise ObsdiffError(f"{path} does not run here: {why}")
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ObsdiffError(f"{path} is no engine that {title} {trt.__version__} loads: {say_errors(logger.messages)}")
    return engine


def _invalid(trt: Any, runtime: Any, plan: Any) -> str:
    """What TensorRT-RTX has against an engine file, before it loads it."""
    validity, reasons = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return ""
    names = [name for name, reason in trt.EngineInvalidityDiagnostics.__members__.items() if int(reasons) & int(reason)]
    return ", ".join(name.replace("_", " ").lower() for name in names) or "TensorRT-RTX finds no CUDA GPU that it fits"


def check_signature(engine: Any, path: Path, manifest: Manifest) -> None:
    """Raises ObsdiffError unless the engine has the inputs and outputs of the manifest."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    wanted = {entry.name: entry.dtype for entry in (*manifest.inputs, *manifest.outputs)}
    kinds = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
    found = {name: kinds.get(engine.get_tensor_dtype(name).name, "another type") for name in names}
    if odd := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        has, want = (f"as {side[odd[0]]}" if odd[0] in side else "not" for side in (found, wanted))
        raise ObsdiffError(f"{path} is the engine of another model: it has {odd[0]} {has}, the bundle {want}")


def _contexts(trt: Any, engine: Any, key: EngineKey, path: Path) -> tuple[Callable[[], Any], Callable[[], None]]:
    """What makes an execution context, and what keeps the kernels that TensorRT-RTX compiled since.

    TensorRT-RTX compiles for a shape when it is first met, which takes seconds: the user's cache keeps the result.
    """
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if key.format != "tensorrt-rtx":
        return lambda: engine.create_execution_context(strategy), lambda: None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # Eager: compiled in the background, the kernels of the first calls would be other ones than those of later calls.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    cache, kept = config.create_runtime_cache(), cache_folder("rtx") / f"{path.name}.kernels"
    if kept.exists():
        cache.deserialize(kept.read_bytes())  # False: of another GPU or driver; it is then written anew
    config.set_runtime_cache(cache)

    def keep_kernels() -> None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with whole(kept) as part:
                part.write_bytes(cache.serialize())

    return lambda: engine.create_execution_context(config), keep_kernels


def aligned(value: Tensor) -> Tensor:
    """The tensor as TensorRT reads it: in one piece, from an aligned address."""
    value = value.contiguous()
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def _say_shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
