"""What the server and its workers say to each other over a pipe. Imported without torch: the server draws nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """What a worker serves."""

    path: str
    backend: str = "auto"
    device: str | None = None
    max_batch_size: int = 8
    build: bool = True  # an engine that the bundle lacks for this machine


@dataclass(frozen=True)
class Side:
    """What a height or width may be, in pixels, and the manifest's words for it."""

    min: int
    max: int
    step: int
    words: str


@dataclass(frozen=True)
class Info:
    """What a worker found out about its model while it warmed up.

    `sides` is empty for a model that draws one size. `difference` is by how many levels of 8 bits a picture changed
    that was drawn with another one; `drops` says whether cancelled pictures can leave a running batch.
    """

    identity: str
    backend: str
    device: str
    max_batch: int
    height: int
    width: int
    steps: int
    guidance: float | None
    sides: Mapping[str, Side] = field(default_factory=dict)
    difference: float = 0.0
    drops: bool = False


@dataclass(frozen=True)
class Key:
    """What pictures must share to be drawn in one batch."""

    height: int
    width: int
    steps: int
    guidance: float | None
    negative_prompt: str | None


@dataclass(frozen=True)
class Draw:
    """To the worker: one batch. `previews` is how many previews each picture gets, evenly over its steps."""

    batch: int
    key: Key
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    previews: tuple[int, ...]
    stream: bool


@dataclass(frozen=True)
class Cancel:
    """To the worker: nobody waits for this picture any more."""

    batch: int
    index: int


@dataclass(frozen=True)
class Ready:
    """From the worker: warmed up."""

    info: Info


@dataclass(frozen=True)
class Failed:
    """From the worker: it cannot start, and why; `code` is the exit code that says so."""

    message: str
    code: int


@dataclass(frozen=True)
class Step:
    """From the worker: a step of a batch that somebody watches is done. `previews` are PNGs by index."""

    batch: int
    step: int
    total: int
    previews: Mapping[int, bytes]


@dataclass(frozen=True)
class Picture:
    """From the worker: one picture as PNG."""

    batch: int
    index: int
    png: bytes


@dataclass(frozen=True)
class Refused:
    """From the worker: one picture will not come, by whose fault: the client's (it cannot be drawn) or the server's."""

    batch: int
    index: int
    message: str
    fault: str


@dataclass(frozen=True)
class Done:
    """From the worker: it is free again; the batch's pictures may still be on their way."""

    batch: int
    seconds: float
    steps: tuple[float, ...]
    dropped: int
