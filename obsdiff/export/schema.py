"""What a manifest is made of: files, axes, tensors, checks, graphs, engines and their keys."""

import hashlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from obsdiff.models.spec import AXES

ENGINES = "engines"
Precision = Literal["fp32", "fp16", "bf16"]
EngineFormat = Literal["tensorrt", "tensorrt-rtx", "torch-tensorrt", "aoti"]
SUFFIXES: dict[EngineFormat, str] = {
    "tensorrt": ".plan",
    "tensorrt-rtx": ".plan",
    "torch-tensorrt": ".pt2",
    "aoti": ".pt2",
}


class Record(BaseModel):
    """Fixed once made, and without fields that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class File(Record):
    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Axis(Record):
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


class Tensor(Record):
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


class Check(Record):
    """How far a format was from PyTorch at shapes that it was not traced at, on random inputs."""

    shapes: list[dict[str, int]]
    max_difference: float
    relative_error: float
    tolerance: float


class Graph(Record):
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


class EngineOptions(Record):
    """What a user may ask of an engine. `sm`: the GPUs it is for, such as "89"; none: the machine that builds it."""

    sm: tuple[Annotated[str, Field(pattern=r"^\d{2,3}$")], ...] = ()
    sparse: bool = True
    refit: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


class EngineKey(Record):
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


class Engine(Record):
    """An engine of the bundle, under ENGINES. `check` None: nothing that could run it was there when it was built."""

    key: EngineKey
    seconds: float = Field(ge=0)
    check: Check | None

    @property
    def path(self) -> str:
        return f"{ENGINES}/{self.key.file}"


class Tuned(Record):
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


class Totals(Record):
    """The denoiser: parameters, those that are not zero, bytes, and MACs of one call at the default size, batch 1."""

    parameters: int
    nonzero: int
    bytes: int
    macs: int
