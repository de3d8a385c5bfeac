"""Sparse against dense: how long products of matrices take on this GPU, kept as a table that others can use."""

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional

from obsdiff.errors import InputError, first_line, first_problem
from obsdiff.files import cache_folder, read_json, write_json
from obsdiff.progress import Progress

RUNS, WARM, CALLS = 15, 2, 10  # a run times this many calls on end: one alone is shorter than an event's resolution
MARGIN = 0.02  # a sparse product that is faster by less than this is not: it is noise
MULTIPLE = 16  # of rows and columns of a sparse weight in half precision (cuSPARSELt)
AHEAD = 4_000_000  # cycles that the GPU waits before it is timed, so that no call waits for its launch

Dtype = Literal["float16", "bfloat16"]
Shape = tuple[int, int, int]
"""rows, out, in: inputs [rows, in] times a weight [out, in]."""
Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]
"""Takes functions, gives the milliseconds that each takes."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GemmTime(_Model):
    """One product, milliseconds of a call. sparse_ms None: there is no sparse kernel for the shape."""

    rows: int = Field(ge=1)
    shape: tuple[int, int]
    dtype: Dtype
    dense_ms: float = Field(gt=0)
    sparse_ms: float | None = Field(gt=0)

    @property
    def faster(self) -> bool:
        """Whether sparse is faster than dense by more than noise."""
        return self.sparse_ms is not None and self.sparse_ms < self.dense_ms * (1 - MARGIN)


class GemmTable(_Model):
    """Products timed on one device with one set of versions."""

    schema_version: Literal[1] = 1
    device: str
    driver: str
    cuda: str
    torch: str
    entries: tuple[GemmTime, ...]

    def find(self, shape: Shape, dtype: Dtype) -> GemmTime | None:
        """The product in that dtype, else in the other one: both take half-precision tensor cores alike."""
        found = {entry.dtype: entry for entry in self.entries if (entry.rows, *entry.shape) == shape}
        return found.get(dtype) or next(iter(found.values()), None)

    def joined(self, others: Iterable[GemmTime]) -> "GemmTable":
        """With these products too; one that is there already is taken anew."""
        found = {(entry.rows, entry.shape, entry.dtype): entry for entry in (*self.entries, *others)}
        return self.model_copy(update={"entries": tuple(found[key] for key in sorted(found))})


def measure_gemms(
    shapes: Iterable[Shape],
    dtype: Dtype,
    device: str = "cuda",
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> GemmTable:
    """Times F.linear with dense weights and with semi-structured ones (cuSPARSELt), for each shape once.

    Products that this device was asked for before come from the user's cache. The weight stays in the GPU's cache from
    one call to the next, in both.
    Raises InputError when the device has no sparse tensor cores that torch can use.
    """
    table = _known(device)
    there = {(entry.rows, *entry.shape) for entry in table.entries if entry.dtype == dtype}
    wanted = list(dict.fromkeys(shapes))
    missing = [shape for shape in wanted if shape not in there]
    with (progress or Progress()).task(f"timing products on {table.device}", len(missing)) as shown:
        for rows, out, inner in missing:
            shown.advance(1, f"timing {rows}×{inner} times {inner}×{out} in {dtype}")
            table = table.joined([time_gemm((rows, out, inner), dtype, device, timer or cuda_timer)])
    with contextlib.suppress(OSError):  # a home that cannot be written to costs a measurement the next time
        cache_file(table.device).parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(table.device), table.model_dump(mode="json"))
        shown.message(f"times of {len(table.entries)} products are kept in {cache_file(table.device)}")
    return table.model_copy(
        update={
            "entries": tuple(
                entry for entry in table.entries if entry.dtype == dtype and (entry.rows, *entry.shape) in wanted
            )
        }
    )


def time_gemm(shape: Shape, dtype: Dtype, device: str, timer: Timer) -> GemmTime:
    """One product with random inputs and a random weight that is 2:4, in the same turns."""
    rows, out, inner = shape
    kind = getattr(torch, dtype)
    inputs = torch.randn(rows, inner, dtype=kind, device=device)
    bias = torch.randn(out, dtype=kind, device=device)
    weight = prune_randomly(torch.randn(out, inner, dtype=kind, device=device))
    with torch.no_grad():
        functions = [lambda: functional.linear(inputs, weight, bias)]
        if out % MULTIPLE == 0 and inner % MULTIPLE == 0:
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            functions.append(lambda: functional.linear(inputs, sparse, bias))
        times = timer(functions)
    sparse_ms = times[1] if len(times) > 1 else None
    return GemmTime(rows=rows, shape=(out, inner), dtype=dtype, dense_ms=times[0], sparse_ms=sparse_ms)


def prune_randomly(weight: Tensor) -> Tensor:
    """The weight [out, in] with the two smallest of every four neighbours in a row zeroed, where four fit."""
    if weight.shape[1] % 4:
        return weight
    groups = weight.reshape(-1, 4)
    return groups.scatter(1, groups.abs().topk(2, dim=1, largest=False).indices, 0).reshape(weight.shape)


def cuda_timer(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """The median milliseconds of a call of each function, by CUDA events, in turn, so that drift meets all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for run in range(-WARM, RUNS):
        for function, taken in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            start.record()
            for _ in range(CALLS):
                function()
            end.record()
            end.synchronize()
            if run >= 0:
                taken.append(start.elapsed_time(end) / CALLS)
    return [median(taken) for taken in times]


def cache_file(device: str) -> Path:
    """Where a device's table is kept."""
    return cache_folder("gemms") / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read_table(path: Path) -> GemmTable:
    """A table from a file. Raises InputError that says what is wrong with it."""
    try:
        return GemmTable.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path} is no table of products: {first_problem(error)}") from None


def _known(device: str) -> GemmTable:
    """What is kept of the device with these versions, or a table without entries."""
    empty = _describe(device)
    try:
        kept = read_table(cache_file(empty.device))
    except InputError:
        return empty
    return kept if kept.model_copy(update={"entries": ()}) == empty else empty


def _describe(device: str) -> GemmTable:
    """The device as the head of a table. Raises InputError when it cannot run sparse."""
    reason = ""
    try:
        if torch.device(device).type != "cuda":
            reason = f"the device is {device}, and it takes a CUDA GPU"
        elif not torch.cuda.is_available():
            reason = "there is no CUDA GPU here"
        elif torch.cuda.get_device_capability(device) < (8, 0):
            reason = f"{torch.cuda.get_device_name(device)} is older than Ampere and has no sparse tensor cores"
        elif not torch.backends.cusparselt.is_available():
            reason = "this build of torch has no cuSPARSELt"
    except (RuntimeError, AssertionError) as error:
        reason = f"torch cannot use {device}: {first_line(error)}"
    if reason:
        raise InputError(f"sparse products cannot be timed: {reason}")
    return GemmTable(
        device=torch.cuda.get_device_name(device),
        driver=_driver(device),
        cuda=str(torch.version.cuda),
        torch=torch.__version__,
        entries=(),
    )


def _driver(device: str) -> str:
    """The NVIDIA driver's version; "" where NVML does not tell."""
    from obsdiff import nvml

    found = nvml.find_gpu(device)
    return nvml.describe(found).get("driver", "") if found else ""
