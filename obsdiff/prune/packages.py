"""Module packages: what is solved between two runs of the sampler (OBS-Diff, arXiv 2510.06751)."""

from collections.abc import Sequence
from itertools import groupby, pairwise

from obsdiff.models.walk import Stage


def cut(stages: Sequence[Stage], packages: int) -> list[list[Stage]]:
    """Cuts stages in forward order into that many packages, as even as they go; at most one package a stage.

    Linears that run in parallel are one stage, so they stay together.
    """
    packages = min(packages, len(stages))
    bounds = [len(stages) * i // packages for i in range(packages + 1)]
    return [list(stages[start:end]) for start, end in pairwise(bounds)]


def by_block(stages: Sequence[Stage]) -> list[list[Stage]]:
    """One package a block."""
    return [list(package) for _, package in groupby(stages, key=lambda stage: stage.block)]


def apart(stages: Sequence[Stage], count: int) -> list[list[Stage]]:
    """Runs of at most `count` stages that change no linear in common, so that they can be solved side by side."""
    runs: list[list[Stage]] = []
    for stage in stages:
        busy = {name for other in runs[-1] for name in other.touched} if runs else set()
        if runs and len(runs[-1]) < count and not busy & set(stage.touched):
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return runs
