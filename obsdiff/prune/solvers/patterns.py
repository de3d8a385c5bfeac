"""Sparsity patterns and the masks that a score gives under them."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """The share `sparsity` of the weights is zero, anywhere."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must lie between 0 and 1 (both excluded), not {self.sparsity}")

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """Of every `m` weights in a row along the input dimension at most `n` are kept: 2:4 runs on sparse tensor cores."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"{self.n}:{self.m}: N of N:M must be at least 1 and smaller than M")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def parse_nm(text: str) -> NM:
    """`2:4` as NM(2, 4). Raises ValueError."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise ValueError(f"{text!r} is no N:M pattern such as 2:4")
    return NM(int(match[1]), int(match[2]))


def check_width(pattern: Pattern, width: int) -> None:
    """Raises ValueError when the input dimension cannot carry the pattern."""
    if isinstance(pattern, NM) and width % pattern.m:
        raise ValueError(f"the input dimension {width} is not a multiple of {pattern.m}, so {pattern} does not fit")


def nm_mask(score: Tensor, pattern: NM) -> Tensor:
    """Keeps the n best of every m neighbours in a row. score [rows, columns]; bool of the same shape."""
    groups = score.reshape(-1, pattern.m)
    best = groups.topk(pattern.n, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).reshape(score.shape)


def best_mask(score: Tensor, count: int) -> Tensor:
    """Keeps the `count` best entries of each row. score [rows, columns]; bool of the same shape."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    mask = score >= score.kthvalue(score.shape[1] - count + 1, dim=1, keepdim=True).values  # a quarter of topk's time
    if bool((mask.sum(1) == count).all()):
        return mask
    best = score.topk(count, dim=1).indices  # ties, which a threshold cannot tell apart
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)


def pattern_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """A layer's mask: the best of every group, or of all entries together. score [out, in]; bool of that shape."""
    if isinstance(pattern, NM):
        return nm_mask(score, pattern)
    return best_mask(score.reshape(1, -1), kept_count(pattern.sparsity, score.numel())).view_as(score)


def kept_count(sparsity: float, entries: int) -> int:
    """How many of so many entries stay, at least the share that was asked for."""
    return entries - int(sparsity * entries + 1e-9)


def is_nm(mask: Tensor, pattern: NM) -> bool:
    """Whether no group of m neighbours along the input dimension keeps more than n. mask [out, in]."""
    return mask.shape[1] % pattern.m == 0 and bool((mask.reshape(-1, pattern.m).sum(1) <= pattern.n).all())
