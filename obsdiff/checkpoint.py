"""The pruned checkpoint: a diffusers folder with its masks and its recipe. Written whole, read with care.

OUT/                    loads with plain DiffusionPipeline.from_pretrained
  obsdiff.json          CheckpointInfo: recipe, base model and hash, versions, per-layer sparsity and error
  masks.safetensors     uint8, bit-packed as numpy.packbits does, row-major; of the weights as matrices [out, in]
  transformer/config.json   with `sparsity_config` (key names of compressed-tensors)
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from obsdiff.errors import InputError, first_problem
from obsdiff.files import copy_files, read_json, write_json, write_tensors
from obsdiff.models import GroupRecord
from obsdiff.models.layers import as_matrix
from obsdiff.models.source import INFO, Source
from obsdiff.models.weights import lone_variant, make_plain, tensor_names, with_variant

SCHEMA_VERSION = 1
MASKS = "masks.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PACKAGES = ("torch", "diffusers", "transformers", "safetensors")
NEEDED = {"base": ("name", "sha256"), "recipe": ("pattern", "solver", "prompts", "steps")}


class ChoiceRecord(BaseModel):
    """What `auto` took for a layer: relative output errors on held-out prompts, its own and that of plain OBS."""

    solver: str
    damping: float
    error: float
    obs_error: float


class LayerRecord(BaseModel):
    """One pruned linear, in the shape of its matrix (layers.as_matrix). `error` is the relative output error on the
    calibration inputs, None if it has no Hessian."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    error: float | None
    choice: ChoiceRecord | None = None


class Allocation(BaseModel):
    """amounts: sparsity by linear, or units that stay by group stage. `reached` is the measured speed-up or the exact
    size when one was asked for; latency: milliseconds of a block by stage and units left."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["owl", "error"]
    amounts: dict[str, float]
    asked: float | None = None
    reached: float | None = None
    latency: dict[str, dict[int, float]] = {}


class CheckpointInfo(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    base: dict[str, str]
    versions: dict[str, str]
    threads: int
    recipe: dict[str, Any]
    layers: list[LayerRecord]
    groups: list[GroupRecord]
    allocation: Allocation | None = None

    @field_validator("base", "recipe")
    @classmethod
    def _complete(cls, value: dict[str, Any], field: ValidationInfo) -> dict[str, Any]:
        if missing := [name for name in NEEDED[str(field.field_name)] if name not in value]:
            raise ValueError(f"{missing[0]} is missing")
        return value


def versions() -> dict[str, str]:
    """What produced a result, by package name."""
    from obsdiff import __version__

    return {
        "obsdiff": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def pack(mask: Tensor) -> Tensor:
    """A bool mask as uint8 [ceil(entries / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of that shape. Raises InputError when the packed size does not fit it."""
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise InputError(f"a mask of {list(packed.shape)} {packed.dtype} does not fit a weight {list(shape)}")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(shape)


def read_info(path: Path) -> CheckpointInfo | None:
    """What obsdiff.json says, or None for a folder without one (a dense model)."""
    if not (path / INFO).exists():
        return None
    value = read_json(path / INFO)
    found = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise InputError(f"{path / INFO} has schema version {found}, newer than this obsdiff reads: upgrade obsdiff")
    try:
        return CheckpointInfo.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{path / INFO} is not a recipe that obsdiff wrote: {first_problem(error)}") from None


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, read one at a time when they are asked for.

    Raises InputError for a file that is missing, truncated or something else.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self._home = {name: file for file in self.files for name in tensor_names(file)}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def denoiser_weights(folder: Path) -> TensorFiles:
    """The denoiser's tensors as they are stored, of a variant where there are no plain ones; `files` lists the shards.

    Raises InputError as TensorFiles does.
    """
    variant = lone_variant(folder)
    index = folder / with_variant(f"{WEIGHTS}.index.json", variant)
    if not index.exists():
        return TensorFiles([folder / with_variant(WEIGHTS, variant)])
    value = read_json(index)
    found = value.get("weight_map") if isinstance(value, dict) else None
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name not in ("", "..") for name in names):
        raise InputError(f"{index} lists shards outside its folder, or none")
    return TensorFiles([folder / name for name in sorted(set(names))])


def write_checkpoint(
    source: Source,
    info: CheckpointInfo,
    pruned: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    out: Path,
) -> None:
    """Writes the folder: the base's files with the pruned tensors in place, in the dtypes and shards of the base.

    A variant that stood alone gets the plain names, so that plain from_pretrained loads the result.
    """
    copy_files(source.path, out, skip=(source.spec.component,))
    folder = out / source.spec.component
    folder.mkdir(exist_ok=True)
    stored = denoiser_weights(source.denoiser_path)
    for file in stored.files:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: pruned[name] if name in pruned else opened.get_tensor(name) for name in opened.keys()}
            write_tensors(folder / file.name, tensors, opened.metadata())
    for path in source.denoiser_path.glob("*.json"):
        write_json(folder / path.name, read_json(path))
    for component in source.component_folders:
        make_plain(out / component.name)
    config = read_json(folder / "config.json")
    config["sparsity_config"] = sparsity_config(info)
    write_json(folder / "config.json", config)
    write_tensors(out / MASKS, masks)
    write_json(out / INFO, info.model_dump(mode="json"))


def sparsity_config(info: CheckpointInfo) -> dict[str, Any]:
    """The denoiser's `sparsity_config`, in the key names of compressed-tensors. Weights are stored dense."""
    entries = sum(layer.shape[0] * layer.shape[1] for layer in info.layers)
    zeros = sum(layer.shape[0] * layer.shape[1] * layer.sparsity for layer in info.layers)
    return {
        "format": "dense",
        "global_sparsity": round(zeros / entries, 6) if entries else 0.0,
        "sparsity_structure": info.recipe["pattern"],
        "targets": [layer.name for layer in info.layers],
        "ignore": [],
    }


def read_masks(path: Path, info: CheckpointInfo) -> dict[str, Tensor]:
    """The bool mask [out, in] of every pruned linear. Raises InputError when the file is damaged or incomplete."""
    try:
        with safe_open(path / MASKS, framework="pt") as file:
            return {layer.name: unpack(file.get_tensor(layer.name), layer.shape) for layer in info.layers}
    except FileNotFoundError:
        raise InputError(f"{path / MASKS} is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / MASKS} is damaged: {error}") from None


def verify(source: Source, info: CheckpointInfo) -> None:
    """Raises InputError when a weight is not zero where its mask says so: the checkpoint was changed afterwards."""
    weights = denoiser_weights(source.denoiser_path)
    for name, mask in read_masks(source.path, info).items():
        weight = weights.get(f"{name}.weight")
        if weight is None or as_matrix(weight).shape != mask.shape:
            raise InputError(f"{source.name}: {name} is missing or has another shape than its mask")
        if as_matrix(weight)[~mask].any():
            raise InputError(f"{source.name}: {name} has weights where its mask says zero (was it trained since?)")
