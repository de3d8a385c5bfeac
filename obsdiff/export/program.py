"""The denoiser as a program of PyTorch's: the module of a bundle, and its trace with dynamic axes."""

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from obsdiff import __version__
from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.export.bundle import CONFIG, WEIGHTS, Manifest
from obsdiff.export.parity import DTYPES
from obsdiff.export.schema import Axis
from obsdiff.files import read_json
from obsdiff.models import ModelSpec, graph
from obsdiff.models.shrink import shrink
from obsdiff.models.source import quiet_libraries


def load_module(bundle: Path, manifest: Manifest, device: str) -> graph.TensorDenoiser:
    """Rebuilds the module from the bundle's config and groups; its parameters are never held twice.

    Raises InputError when the groups or the weights do not fit the config.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            denoiser = empty_denoiser(bundle, manifest)
        denoiser.load_state_dict(load_file(bundle / WEIGHTS), assign=True)
    except InputError:
        raise
    except Exception as error:  # diffusers and safetensors each raise their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{bundle}: the denoiser's config and weights do not fit each other: {reason}") from None
    return graph.TensorDenoiser(denoiser.to(device).eval().requires_grad_(False), manifest.spec).eval()


def empty_denoiser(bundle: Path, manifest: Manifest) -> nn.Module:
    """The bundle's narrower denoiser as its class makes it, on torch's default device."""
    import diffusers

    with quiet_libraries():
        denoiser = getattr(diffusers, manifest.denoiser).from_config(read_json(bundle / CONFIG))
    shrink(denoiser, manifest.spec, manifest.groups)
    return denoiser


def trace(module: graph.TensorDenoiser, bundle: Path, manifest: Manifest, device: str) -> torch.export.ExportedProgram:
    """The bundle's module as an exported program, over the ranges of the manifest's axes.

    Raises ObsdiffError with the reason when it cannot be traced, or when tracing would fix an axis.
    """
    spec, config = manifest.spec, read_json(bundle / CONFIG)
    sizes = traced_sizes(manifest.axes)
    inputs = graph.random_inputs(spec, config, sizes, DTYPES[manifest.precision], device)
    with quiet_libraries(), torch.no_grad():
        try:
            return torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes={"inputs": dynamic_axes(spec, config, manifest.axes)},
            )
        except Exception as error:  # torch.export's errors share no base class
            raise ObsdiffError(f"the denoiser could not be traced: {first_line(error)}") from error


def traced_sizes(axes: Mapping[str, Axis]) -> dict[str, int]:
    """What to trace at: a batch of more than one and a picture that is not square, where the ranges have them.

    A trace takes sizes for equal that only happen to be.
    """
    batch = axes["batch"]
    sizes = {name: axis.opt for name, axis in axes.items()} | {"batch": min(max(2, batch.min), batch.max)}
    if "width" in axes and sizes["width"] == sizes["height"]:
        width = axes["width"]
        wider, narrower = width.opt + width.multiple, width.opt - width.multiple
        sizes["width"] = wider if wider <= width.max else narrower if narrower >= width.min else width.opt
    return sizes


def dynamic_axes(spec: ModelSpec, config: Mapping[str, Any], axes: Mapping[str, Axis]) -> tuple[dict[int, Any], ...]:
    """For each input of the graph, torch.export's dimension of every axis that may vary."""
    dims = {name: _dim(name, axis) for name, axis in axes.items()}
    return tuple(
        {i: dims[axis] for i, axis in enumerate(entry.axes) if axis in dims and dims[axis] is not None}
        for entry in spec.graph_inputs(config)
    )


def _dim(name: str, axis: Axis) -> Any:
    """A torch.export dimension; None for an axis with a single size, which is traced as a constant."""
    if axis.min == axis.max:
        return None
    units = torch.export.Dim(name, min=axis.min // axis.multiple, max=axis.max // axis.multiple)
    return axis.multiple * units if axis.multiple > 1 else units


def program_hash(manifest: Manifest, *files: str) -> str:
    """SHA-256 of what decides the program that is traced: config, groups, inputs, versions, these files."""
    made_of = {
        "files": [manifest.files[name].sha256 for name in (CONFIG, *files)],
        "groups": [group.model_dump(mode="json") for group in manifest.groups],
        "inputs": [entry.model_dump(mode="json") for entry in manifest.inputs],
        "versions": [version("diffusers"), __version__],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silences the warnings and log lines of tracing and compiling, by these loggers or torch's own: nothing in them
    is something that a user can act on."""
    chosen = names or ("torch", "torch._inductor", "torch._dynamo", "torch._export")
    loggers = [logging.getLogger(name) for name in chosen]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
