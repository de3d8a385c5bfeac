"""ONNX Runtime over IOBinding: tensors stay where they are, in and out."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.export.bundle import GRAPH, Manifest
from obsdiff.runtime.backends import Denoise

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ELEMENTS = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


def load(bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """Raises InputError when the bundle has no graph, or the provider for the device is not there."""
    import onnxruntime

    if "onnx" not in manifest.formats:
        raise InputError(f"{bundle} has no ONNX graph: export with --format onnx, or use --backend torch")
    if odd := sorted({entry.dtype for entry in (*manifest.inputs, *manifest.outputs)} - set(ELEMENTS)):
        raise InputError(f"{bundle}: ONNX Runtime does not take {odd[0]}: use --backend torch")
    kind, _, index = device.partition(":")
    provider = PROVIDERS.get(kind)
    if provider not in onnxruntime.get_available_providers():
        raise InputError(f"--backend onnxruntime: no provider for {device} in the onnxruntime that is installed")
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(bundle / GRAPH), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise ObsdiffError(f"{bundle / GRAPH}: ONNX Runtime does not load it: {first_line(error)}") from None
    if session.get_providers()[0] != provider:  # it falls back to the CPU without a word
        raise ObsdiffError(f"ONNX Runtime could not start {provider} and would have used the CPU instead")
    (output,) = manifest.outputs
    dtype = getattr(torch, output.dtype)

    def denoise(**inputs: Tensor) -> Tensor:
        binding = session.io_binding()
        sizes: dict[str, int] = {}
        for entry in manifest.inputs:
            value = inputs[entry.name] = inputs[entry.name].contiguous()
            sizes |= {axis: size for axis, size in zip(entry.axes, value.shape, strict=True) if isinstance(axis, str)}
            binding.bind_input(
                entry.name, kind, int(index or 0), ELEMENTS[entry.dtype], list(value.shape), value.data_ptr()
            )
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in output.axes]
        result = torch.empty(shape, dtype=dtype, device=device)
        binding.bind_output(output.name, kind, int(index or 0), ELEMENTS[output.dtype], shape, result.data_ptr())
        if kind == "cuda":
            torch.cuda.current_stream().synchronize()  # the session runs on a stream of its own
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise ObsdiffError(f"{bundle / GRAPH}: ONNX Runtime does not run it: {first_line(error)}") from None
        return result

    return denoise
