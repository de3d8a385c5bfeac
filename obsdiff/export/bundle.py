"""The bundle: what is in the folder, said by its manifest and verified against it.

BUNDLE/
  manifest.json          Manifest
  model_index.json, generation_config.json, and the untouched diffusers components
  denoiser/config.json, model.safetensors     the shrunk weights; `groups` in the manifest rebuilds the module
  denoiser/model.onnx (+ model.onnx.data past 2 GB)
  vae/model.onnx, text_encoder/model.onnx     those components' graphs, where they were asked for
  engines/               what was compiled ahead of time, each for one kind of machine
  receipt.json           which products of matrices can run sparse, and which were seen to
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from obsdiff.errors import InputError, first_problem
from obsdiff.export.schema import (
    Axis,
    Check,
    Engine,
    File,
    Graph,
    Precision,
    Record,
    Tensor,
    Totals,
    Tuned,
    component_graph,
)
from obsdiff.files import folder_files, read_json, sha256
from obsdiff.models import FAMILIES, GroupRecord, Input, ModelSpec, generic
from obsdiff.models.source import MANIFEST
from obsdiff.models.spec import AXES, used_axes

SCHEMA_VERSION = 1
WEIGHTS = "denoiser/model.safetensors"
CONFIG = "denoiser/config.json"
GRAPH = "denoiser/model.onnx"
RECEIPT = "receipt.json"


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in parts[0] or ".." in parts:
        raise ValueError(f"the path {path!r} leaves the bundle")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path) or max(len(part.encode()) for part in parts) > 255:
        raise ValueError(f"the path {path!r} has control characters or is too long")
    return path


class Manifest(Record):
    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    pipeline: str
    denoiser: str
    component: str
    components: list[str]
    base: dict[str, str]
    recipe: dict[str, Any] | None
    versions: dict[str, str]
    precision: Precision
    groups: list[GroupRecord]
    axes: dict[str, Axis]
    inputs: list[Tensor]
    outputs: list[Tensor]
    vae_scale: int = Field(ge=1)
    formats: dict[str, Check]
    engines: list[Engine] = Field(default_factory=list)
    graphs: dict[str, Graph] = Field(default_factory=dict)
    tuned: list[Tuned] = Field(default_factory=list)
    dense: Totals
    totals: Totals
    files: dict[Annotated[str, AfterValidator(_inside)], File]

    @model_validator(mode="after")
    def _fits_its_family(self) -> "Manifest":
        spec = self.spec
        if odd := sorted(set(self.graphs) - set(self.components)):
            raise ValueError(f"{odd[0]!r} has a graph and is no component")
        if self.component != spec.component:
            raise ValueError(f"the denoiser of a {spec.family} pipeline is its {spec.component}, not {self.component}")
        known = {entry.name: _dynamic(entry.axes) for entry in spec.inputs}
        needed = {entry.name for entry in spec.inputs if entry.when is None}
        named = {entry.name: _dynamic(entry.axes) for entry in self.inputs}
        outputs = [(entry.name, _dynamic(entry.axes)) for entry in self.outputs]
        fits = needed <= set(named) <= set(known) and all(known[name] == axes for name, axes in named.items())
        if not fits or len(named) < len(self.inputs) or outputs != [(spec.output.name, _dynamic(spec.output.axes))]:
            raise ValueError(f"the inputs and outputs are not those of {self.denoiser}")
        used = {axis for axes in named.values() for axis in axes}
        if set(self.axes) != set(used_axes(used)):
            raise ValueError(f"the axes must be {', '.join(used_axes(used))}")
        return self

    @property
    def spec(self) -> ModelSpec:
        """The denoiser's family; of a denoiser without one, what the manifest itself says of its graph."""
        if self.denoiser in FAMILIES:
            return FAMILIES[self.denoiser]
        inputs, outputs = ([Input(e.name, e.axes, e.dtype) for e in side] for side in (self.inputs, self.outputs))
        if len(outputs) != 1:
            raise ValueError("there must be one output")
        return generic.graph_spec(self.denoiser, self.component, inputs, outputs[0])

    @property
    def max_batch(self) -> int | None:
        """The most pictures that a batch may have, with guidance; None where the graph's range does not say."""
        return max(1, self.axes["batch"].max // self.spec.passes) if "batch" in self.axes else None

    def scale(self, axis: str) -> int:
        """Pixels in a step of the axis for height and width, 1 for the others."""
        return self.vae_scale if axis in ("height", "width") else 1

    def say_range(self, axis: str) -> str:
        """What an axis may be in the user's unit: `16 to 64 pixels in steps of 8`."""
        allowed, scale = self.axes[axis], self.scale(axis)
        unit = {
            "batch": f"denoiser inputs{' (two an image with guidance)' * (self.spec.passes > 1)}",
            "tokens": "prompt tokens",
            "image": "image tokens",
        }.get(axis, "pixels")
        step = f" in steps of {allowed.multiple * scale}" if allowed.multiple * scale > 1 else ""
        return f"{allowed.min * scale} to {allowed.max * scale} {unit}{step}"


def _dynamic(axes: Sequence[Any]) -> list[str]:
    return [axis for axis in axes if axis in AXES]


def read_manifest(bundle: Path) -> Manifest:
    """The manifest alone, unverified. Raises InputError with one sentence for whatever is wrong with it."""
    path = bundle / MANIFEST
    if not bundle.is_dir():
        raise InputError(f"{bundle} does not exist or is no folder")
    if not path.exists():
        raise InputError(f"{bundle} is not a bundle: it has no {MANIFEST}")
    value = read_json(path)
    found = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {found}, newer than this obsdiff reads: upgrade obsdiff")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{path} is not a manifest that obsdiff wrote: {first_problem(error)}") from None


def open_bundle(bundle: str | Path) -> Manifest:
    """The manifest after every file that it lists was hashed. Raises InputError for the first that does not agree.

    Files that could be loaded and that it does not list are refused; pictures and the like beside it are nobody's.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    graph = ((GRAPH,) if "onnx" in manifest.formats else ()) + tuple(map(component_graph, manifest.graphs))
    for needed in ("model_index.json", WEIGHTS, CONFIG, *graph, *(engine.path for engine in manifest.engines)):
        if needed not in manifest.files:
            raise InputError(f"{bundle}: the manifest does not list {needed}")
    for name in folder_files(bundle):
        if ("/" in name or name.endswith(".json")) and name not in manifest.files and name != MANIFEST:
            raise InputError(f"{bundle}: {name} is not in the manifest: it was added after the export")
    root = bundle.resolve()
    for name, file in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            raise InputError(f"{bundle}: {name} is in the manifest and missing from the folder")
        if not path.resolve().is_relative_to(root):
            raise InputError(f"{bundle}: {name} is a link that leaves the bundle")
        if path.stat().st_size != file.bytes or sha256(path) != file.sha256:
            raise InputError(f"{bundle}: {name} is not the file that was exported (its SHA-256 differs)")
    return manifest


def list_files(folder: Path, *only: str) -> dict[str, File]:
    """Every file of the folder but the manifest, for the manifest; with names, those alone.

    Raises InputError for a name that no bundle may hold.
    """
    found = {name: path for name, path in folder_files(folder).items() if name != MANIFEST}
    found = {name: found[name] for name in only} if only else found
    for name in found:
        try:
            _inside(name)
        except ValueError as error:
            raise InputError(f"a file of the model cannot be put into a bundle: {error}") from None
    return {name: File(bytes=os.path.getsize(path), sha256=sha256(path)) for name, path in found.items()}
