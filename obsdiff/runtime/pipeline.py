"""A bundle, a checkpoint or a model as a diffusers pipeline that is ready to draw."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from obsdiff.device import pick_device
from obsdiff.errors import InputError
from obsdiff.export.bundle import CONFIG, Manifest, open_bundle
from obsdiff.files import read_json
from obsdiff.models import find_spec
from obsdiff.models.source import MANIFEST, Source, find_source, load_pipeline
from obsdiff.runtime.backends import Denoise, choose_backend, load_backend

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EngineDenoiser(ModelMixin, ConfigMixin):
    """A backend's callable where a pipeline expects its denoiser: the base model's config, no weights."""

    def __init__(self, denoise: Denoise, manifest: Manifest, config: Mapping[str, Any], device: str, dtype: Any):
        super().__init__()
        self.register_to_config(**config)
        self._denoise, self._manifest = denoise, manifest
        self._device, self._dtype = torch.device(device), dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the pipeline works in; inputs are cast to what the engine was built with."""
        return self._dtype

    @contextlib.contextmanager
    def cache_context(self, _name: str) -> Iterator[None]:
        yield

    def forward(self, return_dict: bool = True, **inputs: Any) -> Any:
        """The denoiser's own call. Raises InputError for a size outside the bundle's range and for unknown inputs."""
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for entry in self._manifest.inputs:
            if (value := inputs.pop(entry.name, None)) is None:
                raise InputError(f"the engine needs the input {entry.name}")
            _check_shape(entry.name, entry.axes, value, self._manifest)
            for axis, size in zip(entry.axes, value.shape, strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise InputError(f"{entry.name} has shape {list(value.shape)}: its {axis} should be {sizes[axis]}")
            tensors[entry.name] = value.to(getattr(torch, entry.dtype))
        if extra := sorted(name for name, value in inputs.items() if value is not None):
            raise InputError(f"the engine has no input {', '.join(extra)}: use the diffusers pipeline for that")
        sample = self._denoise(**tensors).to(self._dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _check_shape(name: str, axes: Sequence[str | int], value: Tensor, manifest: Manifest) -> None:
    if value.ndim != len(axes):
        raise InputError(f"{name} has {value.ndim} axes, the engine wants {len(axes)}")
    for axis, size in zip(axes, value.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise InputError(f"{name} has shape {list(value.shape)}: {size} should be {axis}")
        elif not manifest.axes[axis].allows(size):
            raise InputError(_say_range(axis, size, manifest))


def _say_range(axis: str, size: int, manifest: Manifest) -> str:
    allowed = manifest.axes[axis]
    scale = manifest.vae_scale if axis in ("height", "width") else 1
    unit = {"batch": "denoiser inputs (two an image with guidance)", "tokens": "prompt tokens"}.get(axis, "pixels")
    step = f" in steps of {allowed.multiple * scale}" if allowed.multiple * scale > 1 else ""
    return (
        f"{axis} {size * scale} is outside what the bundle was exported for: "
        f"{allowed.min * scale} to {allowed.max * scale} {unit}{step}"
    )


def load(
    path: str | Path, backend: str = "auto", device: str | None = None, *, manifest: Manifest | None = None
) -> "DiffusionPipeline":
    """A diffusers pipeline from a bundle, a pruned checkpoint, a diffusers folder, a hub id or `fashion`.

    A bundle is verified first (pass its `manifest` from open_bundle to verify once) and its denoiser runs on `backend`;
    anything else runs in torch. The device defaults to cuda where there is one.
    Raises InputError when the path, the backend or the device is wrong.
    """
    device = pick_device(device)
    if not (Path(path) / MANIFEST).exists():
        if backend not in ("auto", "torch"):
            raise InputError(f"{path} is not a bundle, so it runs on the torch backend: export it first")
        return load_pipeline(find_source(path), _dtype("fp16", device)).to(device)
    folder = Path(path)
    manifest = manifest or open_bundle(folder)
    source = bundle_source(folder, manifest)
    dtype = _dtype(manifest.precision, device)
    name = choose_backend(manifest, device) if backend == "auto" else backend
    denoise = load_backend(name, folder, manifest, device)
    engine = EngineDenoiser(denoise, manifest, source.config, device, dtype)
    pipe = load_pipeline(source, dtype, **{manifest.component: engine})
    pipe.obsdiff_backend = name
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
        spec=find_spec(manifest.denoiser),
        config={k: v for k, v in config.items() if not k.startswith("_")},
        defaults=read_json(defaults) if defaults.exists() else {},
    )


def _dtype(precision: str, device: str) -> torch.dtype:
    """What encoders and decoder run in: float32 on a CPU, which is slow at less; the bundle's precision on a GPU."""
    if device == "cpu":
        return torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
