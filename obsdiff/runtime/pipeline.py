"""A bundle, a checkpoint or a model as a diffusers pipeline that is ready to draw."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from obsdiff.device import pick_device
from obsdiff.errors import InputError
from obsdiff.export.bundle import CONFIG, Manifest, open_bundle, read_manifest
from obsdiff.files import read_json
from obsdiff.hooks import defaults
from obsdiff.models import size_of
from obsdiff.models.source import INFO, MANIFEST, Source, find_source, load_pipeline
from obsdiff.progress import Progress
from obsdiff.runtime.backends import Denoise, check_name, choose_backend, load_backend
from obsdiff.runtime.components import IN_TORCH, load_components

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EngineDenoiser(ModelMixin, ConfigMixin):
    """A backend's callable where a pipeline expects its denoiser: the base model's config, no weights."""

    def __init__(self, denoise: Denoise, manifest: Manifest, config: Mapping[str, Any], device: str, dtype: Any):
        super().__init__()
        model = getattr(diffusers, manifest.denoiser)
        # What the class takes for what its config.json leaves out, as those of the first diffusers do.
        self.register_to_config(**{**defaults(model.__init__), **config})
        self._denoise, self._manifest, self._spec = denoise, manifest, manifest.spec
        self._argument_names = list(inspect.signature(model.forward).parameters)[1:]
        for path, size in self._spec.attributes.items():
            _set_attribute(self, path, size_of(size, config))
        self._device, self._dtype = torch.device(device), dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the pipeline works in; inputs are cast to what the engine was built with."""
        return self._dtype

    @contextlib.contextmanager
    def cache_context(self, _name: str, **_state: Any) -> Iterator[None]:
        yield

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The denoiser's own call. Raises InputError for a size outside the bundle's range and for unknown inputs."""
        inputs = self._named(args, kwargs)
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for entry in self._manifest.inputs:
            if (value := inputs.pop(entry.name, None)) is None:
                raise InputError(f"the engine needs the input {entry.name}")
            if value.ndim == 0 and entry.axes == ("batch",):  # one timestep for all
                value = value.expand(sizes["batch"])
            _check_shape(entry.name, entry.axes, value, self._manifest)
            for axis, size in zip(entry.axes, value.shape, strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise InputError(f"{entry.name} has shape {list(value.shape)}: its {axis} should be {sizes[axis]}")
            tensors[entry.name] = value.to(getattr(torch, entry.dtype))
        if extra := sorted(name for name, value in inputs.items() if value is not None and value != {}):
            raise InputError(f"the engine has no input {', '.join(extra)}: use the diffusers pipeline for that")
        sample = self._denoise(**tensors).to(self._dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the denoiser's call by the names of the graph's inputs."""
        names = self._argument_names
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        if self._spec.feeds:
            named = self._spec.feeds(self, named)
        for holder in {entry.inside for entry in self._spec.inputs if entry.inside}:
            named |= named.pop(holder, None) or {}
        return named


def _refuse_loras(pipe: Any, path: str | Path, why: str) -> None:
    """Makes pipe.load_lora_weights say what to do instead: diffusers' own words would be about a missing attribute."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise InputError(f"{path} takes no LoRA: {why}; fuse it first, with obsdiff prune --lora PATH[:SCALE]")

    pipe.load_lora_weights = refuse


def _set_attribute(owner: Any, path: str, value: int) -> None:
    """Sets owner.a.b.c where a and b are made up on the way: a pipeline may read a width off a module."""
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(owner, name):
            setattr(owner, name, SimpleNamespace())
        owner = getattr(owner, name)
    setattr(owner, last, value)


def _check_shape(name: str, axes: Sequence[str | int], value: Tensor, manifest: Manifest) -> None:
    if value.ndim != len(axes):
        raise InputError(f"{name} has {value.ndim} axes, the engine wants {len(axes)}")
    for axis, size in zip(axes, value.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise InputError(f"{name} has shape {list(value.shape)}: {size} should be {axis}")
        elif not manifest.axes[axis].allows(size):
            raise InputError(_outside(axis, size * manifest.scale(axis), manifest))


def _outside(axis: str, size: int, manifest: Manifest) -> str:
    return f"{axis} {size} is outside what the bundle was exported for: {manifest.say_range(axis)}"


def check_sides(path: str | Path, sides: Mapping[str, Any]) -> None:
    """Raises InputError for a `height` or `width` (pixels, None: not given) that a bundle at `path` cannot draw.

    Before anything is loaded: the pipelines' own words come late and tell neither range nor step.
    """
    if not (Path(path) / MANIFEST).exists():
        return
    manifest = read_manifest(Path(path))
    for axis in ("height", "width"):
        size, scale = sides.get(axis), manifest.vae_scale
        if size is not None and axis not in manifest.axes:
            raise InputError(f"{axis} {size}: this model draws pictures of one size: leave the option out")
        if size is not None and (size % scale or not manifest.axes[axis].allows(size // scale)):
            raise InputError(_outside(axis, size, manifest))


def load(
    path: str | Path,
    backend: str = "auto",
    device: str | None = None,
    *,
    manifest: Manifest | None = None,
    build: bool = True,
    progress: Progress | None = None,
) -> "DiffusionPipeline":
    """A diffusers pipeline from a bundle, a pruned checkpoint, a diffusers folder, a hub id or `fashion`.

    A bundle is verified first (pass its `manifest` from open_bundle to verify once) and its denoiser runs on `backend`;
    the components that it has graphs of run in ONNX Runtime then, unless the backend is torch's; anything else runs in
    torch. The device defaults to cuda where there is one. `auto` is explained at backends.choose_backend; what it took
    is in `pipe.obsdiff_backend`. An engine that the bundle lacks for this machine is built into the user's cache,
    unless `build` is False.
    Raises InputError when the path, the backend or the device is wrong.
    """
    check_name(backend)
    device = pick_device(device)
    if not (Path(path) / MANIFEST).exists():
        if backend not in ("auto", "torch"):
            raise InputError(f"{path} is not a bundle, so it runs on the torch backend: export it first")
        pipe = load_pipeline(find_source(path), _dtype("fp16", device)).to(device)
        if (Path(path) / INFO).exists():
            _refuse_loras(pipe, path, "it is pruned, and a LoRA would fill its zeros again")
        return pipe
    folder = Path(path)
    manifest = manifest or open_bundle(folder)
    source = bundle_source(folder, manifest)
    dtype = _dtype(manifest.precision, device)
    name = choose_backend(folder, manifest, device, progress) if backend == "auto" else backend
    denoise = load_backend(name, folder, manifest, device, build=build, progress=progress)
    engine = EngineDenoiser(denoise, manifest, source.config, device, dtype)
    graphs = {} if name in IN_TORCH else load_components(folder, manifest, source.index, device, dtype, progress)
    pipe = load_pipeline(source, dtype, **{manifest.component: engine, **graphs})
    pipe.obsdiff_backend = name
    _refuse_loras(pipe, path, "the weights of a bundle are fixed")
    return pipe.to(device)


def bundle_source(folder: Path, manifest: Manifest) -> Source:
    """A bundle's pipeline folder, without a look at the denoiser's weights."""
    defaults = folder / "generation_config.json"
    index, config = read_json(folder / "model_index.json"), read_json(folder / CONFIG)
    if not isinstance(index, dict) or index.get("_class_name") != manifest.pipeline:
        raise InputError(f"{folder}: model_index.json is not of the {manifest.pipeline} that the manifest names")
    if {name for name in index if not name.startswith("_")} != {*manifest.components, manifest.component}:
        raise InputError(f"{folder}: model_index.json has other components than the manifest")
    if not isinstance(config, dict):
        raise InputError(f"{folder}: {CONFIG} is not a denoiser's config")
    return Source(
        name=str(folder),
        path=folder,
        index=index,
        spec=manifest.spec,
        config={k: v for k, v in config.items() if not k.startswith("_")},
        defaults=read_json(defaults) if defaults.exists() else {},
    )


def _dtype(precision: str, device: str) -> torch.dtype:
    """What encoders and decoder run in: float32 on a CPU, which is slow at less; the bundle's precision on a GPU."""
    if device == "cpu":
        return torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
