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

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from obsdiff.errors import InputError
from obsdiff.files import folder_files, read_json, sha256
from obsdiff.models import FAMILIES, GroupRecord, Input, ModelSpec, generic
from obsdiff.models.source import MANIFEST
from obsdiff.models.spec import AXES, used_axes

SCHEMA_VERSION = 1
WEIGHTS = "denoiser/model.safetensors"
CONFIG = "denoiser/config.json"
GRAPH = "denoiser/model.onnx"
RECEIPT = "receipt.json"
ENGINES = "engines"
Precision = Literal["fp32", "fp16", "bf16"]
EngineFormat = Literal["tensorrt", "tensorrt-rtx", "torch-tensorrt", "aoti"]
SUFFIXES: dict[EngineFormat, str] = {
    "tensorrt": ".plan",
    "tensorrt-rtx": ".plan",
    "torch-tensorrt": ".pt2",
    "aoti": ".pt2",
}


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in parts[0] or ".." in parts:
        raise ValueError(f"the path {path!r} leaves the bundle")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path) or max(len(part.encode()) for part in parts) > 255:
        raise ValueError(f"the path {path!r} has control characters or is too long")
    return path


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Model):
    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Axis(_Model):
    """The range of a dynamic axis; `multiple` is what its values must be divisible by. Latents, not pixels."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)
    multiple: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Axis":
        if not self.min <= self.opt <= self.max:
            raise ValueError("needs min <= opt <= max")
        return self

    def allows(self, size: int) -> bool:
        return self.min <= size <= self.max and size % self.multiple == 0


class Tensor(_Model):
    """One input or output: its dtype and its axes, each a number or the name of a dynamic axis."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    axes: tuple[str | int, ...]

    @field_validator("axes")
    @classmethod
    def _known_axes(cls, axes: tuple[str | int, ...]) -> tuple[str | int, ...]:
        for axis in axes:
            if axis not in AXES and (isinstance(axis, str) or axis < 1):
                raise ValueError(f"{axis!r} is neither a size nor one of {', '.join(AXES)}")
        return axes


class Check(_Model):
    """How far a format was from PyTorch at shapes that it was not traced at, on random inputs."""

    shapes: list[dict[str, int]]
    max_difference: float
    relative_error: float
    tolerance: float


class Graph(_Model):
    """A text encoder's or the VAE decoder's graph, in its component's folder.

    An output is named after where it stands in what the component returns (`output.hidden_states.-2`), the decoder's
    is `sample`. `constants` are the other arguments that the pipeline calls it with. The height and width of an output
    are `scale` times those of the input.
    """

    inputs: list[Tensor] = Field(min_length=1)
    outputs: list[Tensor] = Field(min_length=1)
    constants: dict[str, bool | int | float | str]
    axes: dict[str, Axis]
    scale: int = Field(ge=1)
    check: Check

    @model_validator(mode="after")
    def _says_its_axes(self) -> "Graph":
        named = {axis for entry in (*self.inputs, *self.outputs) for axis in entry.axes if isinstance(axis, str)}
        if named != set(self.axes) or not named <= {axis for entry in self.inputs for axis in entry.axes}:
            raise ValueError("the axes are not those of the inputs and outputs")
        return self


def component_graph(name: str) -> str:
    return f"{name}/model.onnx"


class EngineOptions(_Model):
    """What a user may ask of an engine. `sm`: the GPUs it is for, such as "89"; none: the machine that builds it."""

    sm: tuple[Annotated[str, Field(pattern=r"^\d{2,3}$")], ...] = ()
    sparse: bool = True
    refit: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


class EngineKey(_Model):
    """What an engine hangs on: two engines with the same key do the same on the same machines.

    `source` is a SHA-256 of what was compiled, `target` the machine ("sm_90", "sm_80+sm_89", "cpu-x86_64-avx512"),
    `version` that of the compiler, `cuda` CUDA's ("": none).
    """

    format: EngineFormat
    source: str = Field(pattern=r"^[0-9a-f]{64}$")
    target: str = Field(pattern=r"^[A-Za-z0-9_+.-]+$")
    version: str
    cuda: str
    precision: Precision
    profile: dict[str, Axis]
    options: EngineOptions

    @property
    def file(self) -> str:
        """The engine's file name: readable in front, and never the same for two keys."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"{self.format}-{self.target}-{digest[:16]}{SUFFIXES[self.format]}"


class Engine(_Model):
    """An engine of the bundle, under ENGINES. `check` None: nothing that could run it was there when it was built."""

    key: EngineKey
    seconds: float = Field(ge=0)
    check: Check | None

    @property
    def path(self) -> str:
        return f"{ENGINES}/{self.key.file}"


class Tuned(_Model):
    """What `obsdiff tune` found on one device: the fastest backend of those that were right.

    `kind`, `name` and `target` are those of obsdiff.device.describe. `shapes` are of denoiser calls, in latents;
    `milliseconds` the median of a call at each of them, for every backend that was right. `evidence` is what
    torch-sparse told for the receipt (obsdiff.export.receipt.Evidence), where it was among them.
    """

    kind: str
    name: str
    target: str
    threads: int = Field(ge=1)
    shapes: list[dict[str, int]]
    backend: str
    milliseconds: dict[str, list[float]]
    versions: dict[str, str]
    evidence: dict[str, Any] | None = None


class Totals(_Model):
    """The denoiser: parameters, those that are not zero, bytes, and MACs of one call at the default size, batch 1."""

    parameters: int
    nonzero: int
    bytes: int
    macs: int


class Manifest(_Model):
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
    engines: list[Engine] = []
    graphs: dict[str, Graph] = {}
    tuned: list[Tuned] = []
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
        first = error.errors()[0]
        where = repr(".".join(map(str, first["loc"])))[1:-1][:80]
        message = first["msg"].removeprefix("Value error, ")[:200]
        raise InputError(f"{path} is not a manifest that obsdiff wrote: {where}: {message}") from None


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
