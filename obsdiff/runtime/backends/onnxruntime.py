"""ONNX Runtime over IOBinding: tensors stay where they are, in and out.

On a GPU the session runs on a stream of its own that waits for torch's current one, and is waited for by it, without
the host: ONNX Runtime keeps to one stream for life, and takes torch's default stream, whose handle is 0, for none.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.export.bundle import GRAPH, Manifest
from obsdiff.export.schema import Tensor as Signature
from obsdiff.runtime.backends import Denoise

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ELEMENTS = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}  # onnx.TensorProto's: numpy has no bfloat16
# On a GPU, ONNX Runtime itself keeps the arithmetic of shapes on the CPU; these would cost what the GPU gains.
HEAVY = {"Attention", "Conv", "Einsum", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "Softmax"}


def load(bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """The CPU's provider or CUDA's. Raises InputError when the bundle has no graph, or the provider is not there."""
    provider = PROVIDERS.get(device.partition(":")[0])
    if manifest.precision == "bf16" and provider == PROVIDERS["cpu"]:
        raise InputError(f"{bundle} is in bf16, which ONNX Runtime cannot run on a CPU: use --backend torch")
    return open_graph(bundle, manifest, device, {provider: {}} if provider else {}, "onnxruntime")


def open_graph(
    bundle: Path, manifest: Manifest, device: str, providers: Mapping[str, Mapping[str, Any]], name: str
) -> Denoise:
    """The bundle's graph on the providers, the first one preferred, each with its options.

    Raises InputError when one of them is not in this onnxruntime, ObsdiffError when it does not start or leaves the
    work to the CPU.
    """
    if "onnx" not in manifest.formats:
        raise InputError(f"{bundle} has no ONNX graph: export with --format onnx, or use --backend torch")
    run = open_session(bundle / GRAPH, manifest.inputs, manifest.outputs, device, providers, name)

    def denoise(**inputs: Tensor) -> Tensor:
        (result,) = run(**inputs)
        return result

    return denoise


def open_session(
    path: Path,
    inputs: Sequence[Signature],
    outputs: Sequence[Signature],
    device: str,
    providers: Mapping[str, Mapping[str, Any]],
    name: str,
    scale: int = 1,
) -> Callable[..., list[Tensor]]:
    """A graph as a function of its inputs by name that returns its outputs, on the providers as in open_graph.

    `scale` is what the height and width of the outputs are counted in, by those of the inputs.
    """
    import onnxruntime

    if not providers or set(providers) - set(onnxruntime.get_available_providers()):
        raise InputError(f"--backend {name}: no provider for {device} in the onnxruntime that is installed")
    kind, _, number = device.partition(":")
    index = int(number) if number else torch.cuda.current_device() if kind == "cuda" else 0
    stream = torch.cuda.Stream(device) if kind == "cuda" else None
    shared = {"device_id": str(index), "user_compute_stream": str(stream.cuda_stream)} if stream else {}
    chosen = [(provider, {**options, **shared}) for provider, options in providers.items()]
    onnxruntime.set_default_logger_severity(4)
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise ObsdiffError(f"{path}: ONNX Runtime does not load it: {first_line(error)}") from None
    check_providers(session, list(providers))
    run_options = onnxruntime.RunOptions()
    if stream:
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(**given: Tensor) -> list[Tensor]:
        binding = session.io_binding()
        sizes: dict[str, int] = {}
        ready = {entry.name: given[entry.name].contiguous() for entry in inputs}  # alive until the session has run
        for entry in inputs:
            value = ready[entry.name]
            sizes |= {axis: size for axis, size in zip(entry.axes, value.shape, strict=True) if isinstance(axis, str)}
            binding.bind_input(entry.name, kind, index, ELEMENTS[entry.dtype], list(value.shape), value.data_ptr())
        sizes |= {side: sizes[side] * scale for side in ("height", "width") if side in sizes}
        results = []
        for entry in outputs:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in entry.axes]
            result = torch.empty(shape, dtype=getattr(torch, entry.dtype), device=device)
            binding.bind_output(entry.name, kind, index, ELEMENTS[entry.dtype], shape, result.data_ptr())
            results.append(result)
        if stream:
            stream.wait_stream(torch.cuda.current_stream(device))
        try:
            session.run_with_iobinding(binding, run_options)
        except Exception as error:
            raise ObsdiffError(f"{path}: ONNX Runtime does not run it: {first_line(error)}") from None
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
        return results

    return run


def session_options() -> Any:
    """As many threads as torch has, and a record of which provider got which node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def check_providers(session: Any, wanted: Sequence[str]) -> None:
    """Raises ObsdiffError when a provider did not start, got nothing, or left the work to the CPU, all silently."""
    started = session.get_providers()
    if missing := [provider for provider in wanted if provider not in started]:
        raise ObsdiffError(f"ONNX Runtime could not start {missing[0]} and would have used {started[0]} instead")
    parts = session.get_provider_graph_assignment_info()
    if not any(part.ep_name == wanted[0] for part in parts):
        raise ObsdiffError(f"{wanted[0]} takes nothing of this graph: ONNX Runtime would have used another")
    if fallen := nodes_elsewhere(parts, wanted):
        raise ObsdiffError(f"ONNX Runtime leaves {', '.join(fallen)} to the CPU: {wanted[0]} does not take them here")


def nodes_elsewhere(parts: Sequence[Any], wanted: Collection[str]) -> list[str]:
    """Kinds of nodes that cost time and run on none of the wanted providers, such as `48 MatMul`."""
    kinds = [node.op_type for part in parts if part.ep_name not in wanted for node in part.get_nodes()]
    return [f"{kinds.count(kind)} {kind}" for kind in sorted(HEAVY & set(kinds))]
