"""Several processes on one prune, started by torchrun: each samples its share of the prompts and solves its share.

    torchrun --nproc-per-node 4 -m obsdiff prune MODEL OUT ...

Hessians are summed over the ranks once per package, solved stages are exchanged, and rank 0 alone writes, to a
folder that all ranks see. In a prune of one process every function here does nothing.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.prune.hessian import Hessian

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str) -> str:
    """`cuda` as this rank's own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and count() > 1 else device


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the ranks that torchrun started, if it did, while the body runs.

    Raises ObsdiffError when another rank stops in the middle.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    except RuntimeError as error:
        # gloo raises a bare RuntimeError that names itself or the connection; NCCL a DistError
        if not isinstance(error, dist.DistError) and not re.search("gloo|Connection", str(error)):
            raise
        raise ObsdiffError(f"rank {rank()} lost another rank; the same command goes on from there") from error
    finally:
        dist.destroy_process_group()


def agree(value: T, what: str) -> None:
    """Raises InputError on every rank when they do not all hold the same value."""
    values = share_all(value)
    odd = [k for k, other in enumerate(values) if other != values[0]]
    if odd:
        raise InputError(f"rank {odd[0]} has another {what} than rank 0: all ranks need the same model and options")


def from_first(value: T) -> T:
    """Rank 0's value, on every rank; an ObsdiffError among them is raised everywhere."""
    box = [value]
    if count() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], ObsdiffError):
        raise box[0]
    return box[0]


def share_all(value: T) -> list[T]:
    """Every rank's value, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def add_up(hessians: Iterable[Hessian]) -> None:
    """Sums each Hessian over the ranks, in place."""
    if count() == 1:
        return
    for hessian in hessians:
        weight = torch.tensor(hessian.weight, dtype=torch.float64)
        for tensor in (hessian.total, hessian.sum, hessian.cross, weight):
            if tensor is not None:
                dist.all_reduce(tensor)
        hessian.weight = float(weight)
