"""What is particular to a denoiser architecture, as data.

A family is one frozen `ModelSpec` in one file of this folder; no other file of obsdiff names an architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel


@dataclass(frozen=True)
class Span:
    """Where the units of a group live along one axis of one linear, named relative to its block.

    Units are equal runs of entries in each of `copies` equal parts of the axis: a gated projection (GEGLU, SwiGLU)
    has two parts, so one neuron loses a pair of rows.
    """

    linear: str
    copies: int = 1


@dataclass(frozen=True)
class Group:
    """Units (heads or neurons) that are removed whole: the rows that produce one and the columns that read it."""

    name: str
    kind: Literal["heads", "neurons"]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    count: str | None = None  # the block's attribute that holds the number of units; None: one unit per column

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


@dataclass(frozen=True)
class Input:
    """One input of the exported graph. An axis is a name of AXES, a key of the denoiser's config, or a number.

    `dtype` None is the precision of the export; a timestep stays float32, since bf16 cannot tell 999 from 1000.
    """

    name: str
    axes: tuple[str | int, ...]
    dtype: str | None = None


AXES = ("batch", "height", "width", "tokens")  # dynamic axes; height and width count latents


@dataclass(frozen=True)
class ModelSpec:
    """A denoiser family.

    `layers` are the prunable linears of one block, relative to it, in forward order:
    a stage is a tuple of linears that run in parallel, split into tuples that share one input (one Hessian).
    Names that a block lacks (SD3's last block has no context output) are skipped.
    """

    family: str
    title: str
    pipelines: tuple[str, ...]
    denoiser: str
    component: str
    blocks: str
    layers: tuple[tuple[tuple[str, ...], ...], ...]
    groups: tuple[Group, ...]
    inputs: tuple[Input, ...]
    output: Input
    tokens: tuple[int, int, int]  # shortest, usual and longest prompt in tokens
    patch: str  # the config key that latent height and width must be multiples of
    embeds: tuple[str, ...]  # what the pipeline's encode_prompt returns, by the names its __call__ takes
    encode: Mapping[str, Any] = field(default_factory=dict)  # arguments that encode_prompt insists on
    carried: tuple[str, ...] = ()  # a block's inputs that its outputs replace for the next one, in the outputs' order
