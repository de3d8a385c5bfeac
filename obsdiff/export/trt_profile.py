"""Times a TensorRT engine with sparse kernels against one without, layer by layer, in turn."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import ObsdiffError
from obsdiff.export import tensorrt, trt_run
from obsdiff.export.bundle import CONFIG, Manifest
from obsdiff.export.parity import DTYPES
from obsdiff.export.schema import EngineKey
from obsdiff.export.trt_log import inspector_layers
from obsdiff.files import read_json, write_json
from obsdiff.models import graph
from obsdiff.progress import Progress

RUNS, WARM = 30, 5
Times = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Timed:
    """An engine to time: its inspector's layers, and what runs it once and gives milliseconds by layer name."""

    layers: Sequence[Mapping[str, Any]]
    run: Callable[[], Times]


def profile(bundle: Path, manifest: Manifest, key: EngineKey, device: str, out: Path, progress: Progress) -> None:
    """Builds the twin of the bundle's engine without sparse kernels, times both, and writes <engine>.profile.json.

    The twin is thrown away. Needs the GPU that the engine is for. Raises ObsdiffError with the library's own reason.
    """
    trt = tensorrt.load_library(key.format)
    dense = key.model_copy(update={"options": key.options.model_copy(update={"sparse": False})})
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / dense.file
        tensorrt.build(bundle, manifest, dense, twin, progress)
        axes = {name: axis.opt for name, axis in manifest.axes.items()}
        config, dtype = read_json(bundle / CONFIG), DTYPES[manifest.precision]
        inputs = graph.random_inputs(manifest.spec, config, axes, dtype, device)
        timed = [open_timed(trt, path, manifest, kind, device, inputs) for path, kind in ((twin, dense), (out, key))]
        found = interleave(timed)
    names = ("dense", "sparse")
    write_json(
        out.with_name(f"{out.name}.profile.json"),
        {"device": torch.cuda.get_device_name(device), **dict(zip(names, found, strict=True))},
    )


def interleave(timed: Sequence[Timed], runs: int = RUNS) -> list[list[dict[str, Any]]]:
    """Runs the engines in turn, so that drift meets all alike; their layers with the median "ms" of each."""
    taken: list[dict[str, list[float]]] = [{} for _ in timed]
    for run in range(-WARM, runs):
        for engine, times in zip(timed, taken, strict=True):
            for name, ms in engine.run().items():
                if run >= 0:
                    times.setdefault(name, []).append(ms)
    found = []
    for engine, times in zip(timed, taken, strict=True):
        by_name = {str(layer["Name"]): layer for layer in engine.layers}
        found.append(
            [
                {"Name": name, "Metadata": str(by_name.get(name, {}).get("Metadata", "")), "ms": median(values)}
                for name, values in times.items()
            ]
        )
    return found


def open_timed(
    trt: Any, path: Path, manifest: Manifest, key: EngineKey, device: str, inputs: Mapping[str, Tensor]
) -> Timed:
    """The engine with a profiler on its context, which makes a call wait for its layers' times."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    with torch.cuda.device(device):
        engine = trt_run.load_engine(trt, tensorrt.TITLES[key.format], path, key)
        context, profiler, stream = engine.create_execution_context(), Profiler(), torch.cuda.Stream()
    context.profiler = profiler
    tensors = {name: trt_run.aligned(value) for name, value in inputs.items()}
    for name, value in tensors.items():
        context.set_input_shape(name, tuple(value.shape))
    (output,) = manifest.outputs
    shape, dtype = tuple(context.get_tensor_shape(output.name)), getattr(torch, output.dtype)
    tensors[output.name] = torch.empty(shape, dtype=dtype, device=device)
    torch.cuda.synchronize(device)

    def run() -> Times:
        profiler.times = {}
        for name, value in tensors.items():
            context.set_tensor_address(name, value.data_ptr())
        with torch.cuda.device(device):
            started = context.execute_async_v3(stream.cuda_stream)
            stream.synchronize()
        if not started:
            raise ObsdiffError(f"{path} does not run while it is profiled")
        return profiler.times

    return Timed(inspector_layers(engine), run)
