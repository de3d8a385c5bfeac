"""Graphs in the place of a pipeline's VAE and text encoders, with all that the pipeline reads of those."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from obsdiff.errors import InputError, first_line
from obsdiff.export.bundle import Manifest
from obsdiff.export.schema import Graph, component_graph
from obsdiff.files import read_json
from obsdiff.models.source import quiet_libraries
from obsdiff.progress import Progress
from obsdiff.runtime.backends import library_obstacle
from obsdiff.runtime.backends.onnxruntime import PROVIDERS, open_session

IN_TORCH = ("torch", "torch-sparse")
"""Backends that run a bundle's modules, all of them; with every other the graphs of components run."""
Run = Callable[..., list[Tensor]]


def load_components(
    bundle: Path,
    manifest: Manifest,
    index: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """For each component that has a graph what stands in its place, run by ONNX Runtime; none where it cannot run here.

    `dtype` is what the pipeline works in; `progress` is told why the modules have to do. Raises InputError when the
    bundle's folders do not fit its graphs, ObsdiffError when a graph does not load.
    """
    if manifest.graphs and (reason := library_obstacle("onnxruntime", manifest, device)):
        (progress or Progress()).message(f"{', '.join(manifest.graphs)} run in torch: {reason}")
        return {}
    made: dict[str, nn.Module] = {}
    for name, graph in manifest.graphs.items():
        provider = PROVIDERS.get(device.partition(":")[0])
        path = bundle / component_graph(name)
        providers: dict[str, dict[str, Any]] = {provider: {}} if provider else {}
        run = open_session(path, graph.inputs, graph.outputs, device, providers, "onnxruntime", graph.scale)
        make = _make_decoder if name == "vae" else _make_encoder
        try:
            with quiet_libraries():
                made[name] = make(bundle / name, str(index[name][1]), name, graph, run, device, dtype)
        except InputError:
            raise
        except Exception as error:  # diffusers, transformers and safetensors each raise their own
            raise InputError(f"{bundle}: its {name} is not what the manifest says: {first_line(error)}") from None
    return made


class GraphComponent:
    """What all of them have: a graph, a device, and a check of what goes in."""

    _name: str
    _graph: Graph
    _run: Run
    _where: torch.device
    _kind: torch.dtype

    @property
    def device(self) -> torch.device:
        return self._where

    @property
    def dtype(self) -> torch.dtype:
        """What the pipeline casts to; inputs are cast to what the graph was made with."""
        return self._kind

    def _call(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name. Raises InputError for a size outside the graph's range."""
        ready = {}
        for entry in self._graph.inputs:
            value = tensors[entry.name]
            if value.ndim != len(entry.axes):
                raise InputError(f"{entry.name} has {value.ndim} axes, the graph of {self._name} has {len(entry.axes)}")
            for axis, size in zip(entry.axes, value.shape, strict=True):
                allowed = self._graph.axes[axis] if isinstance(axis, str) else None
                if allowed and not allowed.allows(size):
                    raise InputError(
                        f"{axis} {size} is outside what the graph of {self._name} was exported for: "
                        f"{allowed.min} to {allowed.max}"
                    )
                if not allowed and size != axis:
                    raise InputError(
                        f"{entry.name} of {self._name} has shape {list(value.shape)}: {size} is not {axis}"
                    )
            ready[entry.name] = value.to(self._where, getattr(torch, entry.dtype))
        outputs = dict(zip((entry.name for entry in self._graph.outputs), self._run(**ready), strict=True))
        return {name: value.to(self._kind) if value.is_floating_point() else value for name, value in outputs.items()}


class GraphDecoder(GraphComponent):
    """A VAE of which the decoder is left, as a graph. Mixed into its class, for all else that a pipeline asks it."""

    def decode(self, z: Tensor, return_dict: bool = True, **options: Any) -> Any:
        """Pixels [batch, channels, (frames,) height, width] of latents, scaled and shifted as for the VAE itself."""
        if extra := [name for name, value in options.items() if value is not None and name != "generator"]:
            raise InputError(f"the vae's graph takes no {extra[0]}: use --backend torch for that")
        (sample,) = self._call({self._graph.inputs[0].name: z}).values()
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        raise InputError("the bundle's vae only decodes, as a graph: use --backend torch to encode pictures")

    forward = encode

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        warnings.warn("the vae runs as a graph, on whole batches and pictures: tiling does not apply", stacklevel=2)

    def enable_slicing(self, *_: Any, **__: Any) -> None:
        warnings.warn("the vae runs as a graph, on whole batches and pictures: slicing does not apply", stacklevel=2)


class GraphEncoder(GraphComponent, PreTrainedModel):
    """A text encoder as a graph: its config, no weights, and of its answers what its pipeline was seen to read."""

    def __init__(self, config: Any):
        super().__init__(config)
        self._argument_names: Sequence[str] = ()

    def forward(self, *args: Any, **kwargs: Any) -> "Answer":
        """The encoder's own call. Raises InputError for arguments other than those it was exported with."""
        named = dict(zip(self._argument_names, args, strict=False)) | kwargs
        given = {name: value for name, value in named.items() if value is not None}
        tensors = {}
        for entry in self._graph.inputs:
            if entry.name not in given:
                raise InputError(f"the graph of {self._name} needs the input {entry.name}")
            tensors[entry.name] = given.pop(entry.name)
        for name in sorted({*given, *self._graph.constants}):
            value, own = given.get(name), self._graph.constants.get(name)
            if isinstance(value, Tensor) or value != own:
                said = name if isinstance(value, Tensor) else f"{name} {value}"
                raise InputError(f"the graph of {self._name} is not for {said}: use --backend torch for that")
        return Answer(self._name, self._call(tensors))


class Answer:
    """What a text encoder returns, as far as its graph has it: `[0]`, `.last_hidden_state`, `.hidden_states[-2]`."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], path: str = "output"):
        self._name, self._tensors, self._path = name, tensors, path

    def __getitem__(self, key: Any) -> Any:
        path = f"{self._path}.{key}"
        if path in self._tensors:
            return self._tensors[path]
        if any(name.startswith(f"{path}.") for name in self._tensors):
            return Answer(self._name, self._tensors, path)
        there = ", ".join(name.partition(".")[2] for name in self._tensors)
        asked = path.partition(".")[2]
        raise InputError(f"the graph of {self._name} gives {there}, not {asked}: use --backend torch for that")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]


def _bind(made: Any, name: str, graph: Graph, run: Run, device: str, dtype: torch.dtype) -> Any:
    made._name, made._graph, made._run = name, graph, run
    made._where, made._kind = torch.device(device), dtype
    return made.eval()


def _make_encoder(
    folder: Path, kind: str, name: str, graph: Graph, run: Run, device: str, dtype: torch.dtype
) -> nn.Module:
    encoder = GraphEncoder(AutoConfig.from_pretrained(str(folder), local_files_only=True))
    encoder._argument_names = list(inspect.signature(getattr(transformers, kind).forward).parameters)[1:]
    return _bind(encoder, name, graph, run, device, dtype)


def _make_decoder(
    folder: Path, kind: str, name: str, graph: Graph, run: Run, device: str, dtype: torch.dtype
) -> nn.Module:
    """The VAE's own class without what has weights: its config and numbers, and statistics that pipelines read."""
    own = getattr(diffusers, kind)
    with torch.device("meta"):
        mixed: Any = type(kind, (GraphDecoder, own), {})
        vae = mixed.from_config(read_json(folder / "config.json"))
    for child in [child for child, part in vae.named_children() if next(part.parameters(), None) is not None]:
        delattr(vae, child)
    buffers = _stored(folder, [key for key, _ in vae.named_buffers()])
    for key, value in buffers.items():
        owner, _, last = key.rpartition(".")
        vae.get_submodule(owner)._buffers[last] = value.to(device)
    # float32 where the graph is: a pipeline that knows of VAEs that overflow would cast this one otherwise.
    wide = graph.inputs[0].dtype == "float32"
    return _bind(vae, name, graph, run, device, torch.float32 if wide else dtype)


def _stored(folder: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) if keys else ():
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in {*keys} & {*file.keys()}}
    if missing := [key for key in keys if key not in found]:
        raise InputError(f"{folder}: its weights lack {missing[0]}")
    return found
