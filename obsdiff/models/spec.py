"""What is particular to a denoiser architecture, as data.

A family is one frozen `ModelSpec` in one file of this folder; no other file of obsdiff names an architecture.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from torch import nn

Config = Mapping[str, Any]
Size = int | str | Callable[[Config], int]
"""A number, a key of the denoiser's config, or what computes it from the config."""


@dataclass(frozen=True)
class Span:
    """Where the units of a group live along one axis of one linear, named relative to its block.

    Units are equal runs of entries in each of `copies` equal parts of the span: a gated projection (GEGLU, SwiGLU)
    has two parts, so one neuron loses a pair of rows. The span is the whole axis, less the entries `after` and
    `before` which it lies: attributes of the block, counted as often as they are named.
    """

    linear: str
    copies: int = 1
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def spans(*linears: str) -> tuple[Span, ...]:
    """Whole axes of these linears."""
    return tuple(Span(linear) for linear in linears)


@dataclass(frozen=True)
class Group:
    """Units (heads or neurons) that are removed whole: the rows that produce one and the columns that read it.

    `count` is the block's attribute that holds the number of units; None: one unit a column. `scaled` are attributes
    that shrink in proportion, such as the width of all heads together. A block whose attribute `unless` is there and
    not None has no such group: a norm across all heads, for example.
    """

    name: str
    kind: Literal["heads", "neurons"]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    count: str | None = None
    scaled: tuple[str, ...] = ()
    unless: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(span.linear for span in self.rows + self.columns)


class GroupRecord(BaseModel):
    """One group that lost heads or neurons: the indexes of the units that stay, of how many."""

    block: int
    name: str
    kind: Literal["heads", "neurons"]
    kept: list[int]
    of: int


Layers = tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind in a row: the members of the ModuleList at `path`, or the module that is there, if any is.

    `layers` are the prunable linears of a block, relative to it, in forward order: a stage is a tuple of linears that
    run in parallel, split into tuples that share one input (one Hessian). Names that a block lacks are skipped (SD3's
    last block has no context output).
    """

    path: str
    layers: Layers
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Input:
    """One input of the exported graph. An axis is a name of AXES or a Size.

    `dtype` None is the precision of the export; a timestep stays float32, since bf16 cannot tell 999 from 1000.
    `draw` says what random values look like: normal, or uniform up to a number, or integers below a number with an
    integer dtype. `inside` names the argument of the denoiser, a dict, that holds the input; `when` a key of the config
    (or what computes it) without which the denoiser has no such input.
    """

    name: str
    axes: tuple[Size, ...]
    dtype: str | None = None
    draw: float | None = None
    inside: str | None = None
    when: str | Callable[[Config], Any] | None = None


AXES = ("batch", "height", "width", "tokens", "image")
"""Dynamic axes; height and width count latents, image the image's tokens where latents come packed into patches."""


@dataclass(frozen=True)
class ModelSpec:
    """A denoiser family.

    `carried` are a block's inputs that its outputs replace for the next one, in the outputs' order, where all blocks
    form one chain. `heads_refused` is why a family that has heads loses none.
    """

    family: str
    title: str
    pipelines: tuple[str, ...]
    denoiser: str
    component: str
    blocks: tuple[Blocks, ...]
    inputs: tuple[Input, ...]
    output: Input
    tokens: tuple[int, int, int]  # shortest, usual and longest prompt in tokens
    patch: Size  # what latent height and width must be multiples of
    embeds: tuple[str | None, ...]  # what encode_prompt returns, by the names __call__ takes; None: it takes no such
    passes: int = 2  # inputs of one call that a picture takes with guidance; 1: it is embedded, or takes a second call
    negative_embeds: tuple[str | None, ...] = ()  # the same of negative prompts, where they take a second call of it
    negative_prompt: str | None = None  # given where a user gives none, for pipelines that guide with no other
    guidance: str = "guidance_scale"  # the argument of __call__ that scales away from the negative prompt
    guided_above: float = 1  # the scale from which on the pipeline does so
    sample_size: Size = lambda config: int(config.get("sample_size") or 64)  # latents along a side of a usual picture
    encode: Mapping[str, Any] = field(default_factory=dict)  # arguments that encode_prompt insists on
    call: Mapping[str, Any] = field(default_factory=dict)  # arguments that __call__ insists on beside embeddings
    attributes: Mapping[str, Size] = field(default_factory=dict)  # of the denoiser, that the pipeline reads
    carried: tuple[str, ...] = ()
    heads_refused: str = ""
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Other class names that the denoiser was published under, each with what its config then says."""
    prompts: tuple[str, ...] = ()  # to calibrate on, where captions are no prompts
    arguments: Callable[[Any, Sequence[str]], dict[str, Any]] | None = None
    """Turns prompts into arguments of the pipeline's call, where it encodes no text. Raises InputError for others."""
    graph: Callable[[nn.Module], nn.Module] | None = None
    """Turns the denoiser into a module that takes the inputs by name and can be traced, where it cannot be itself."""
    feeds: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]] | None = None
    """Turns the arguments of a pipeline's call of the denoiser into the graph's inputs, where they differ."""

    def passes_at(self, guidance_scale: float) -> int:
        """Inputs of one call that a picture takes at that guidance."""
        return self.passes if guidance_scale > self.guided_above else 1

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a call of the pipeline by its own names: ours has the guidance as guidance_scale."""
        return {self.guidance if name == "guidance_scale" else name: value for name, value in options.items()}

    def graph_inputs(self, config: Config) -> tuple[Input, ...]:
        """The inputs that a denoiser of this config has."""
        return tuple(
            entry
            for entry in self.inputs
            if entry.when is None or (entry.when(config) if callable(entry.when) else config.get(entry.when))
        )

    def axes(self, config: Config) -> tuple[str, ...]:
        """The names of AXES that its graph's range is said in."""
        return used_axes(axis for entry in self.graph_inputs(config) for axis in entry.axes)


def used_axes(axes: Iterable[Any]) -> tuple[str, ...]:
    """The names of AXES that a graph's range is said in, by the axes of its inputs: packed latents have sides too."""
    used = {axis for axis in axes if isinstance(axis, str)}
    return tuple(axis for axis in AXES if axis in used or ("image" in used and axis in ("height", "width")))


def size_of(size: Size, config: Config) -> int:
    """A Size as a number."""
    return size if isinstance(size, int) else size(config) if callable(size) else int(config[size])
