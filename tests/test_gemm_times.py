"""The table of products: what is timed, kept, read again, and what counts as faster."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obsdiff import gemm_times
from obsdiff.errors import InputError
from obsdiff.gemm_times import GemmTable, GemmTime, cuda_timer, measure_gemms, prune_randomly, read_table, time_gemm
from obsdiff.prune.solvers.patterns import NM, is_nm

EMPTY = GemmTable(device="NVIDIA H200 (a test)", driver="580", cuda="13.0", torch="2.13", entries=())


def entry(rows: int = 64, dense: float = 1.0, sparse: float | None = 0.5) -> GemmTime:
    return GemmTime(rows=rows, shape=(32, 48), dtype="float16", dense_ms=dense, sparse_ms=sparse)


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device that this machine does not have: described by hand, with tensors on the CPU. Returns the cache."""
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gemm_times, "_describe", lambda device: EMPTY)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    return tmp_path / "cache"


def counting(calls: list[int], *times: float) -> Callable[[Sequence[Callable[[], Any]]], list[float]]:
    """A timer that calls each function once, checks that all give the same, and says these times."""

    def timer(functions: Sequence[Callable[[], Any]]) -> list[float]:
        results = [function() for function in functions]
        assert all(torch.equal(result, results[0]) for result in results)
        calls.append(len(functions))
        return list(times[: len(functions)])

    return timer


def test_each_product_is_timed_once_and_kept_for_the_device(no_gpu_needed: Path) -> None:
    calls: list[int] = []
    shapes = [(8, 32, 48), (16, 32, 48), (8, 32, 48)]
    table = measure_gemms(shapes, "float16", "cpu", counting(calls, 2.0, 1.0))
    assert calls == [2, 2]
    assert [(e.rows, e.shape, e.dense_ms, e.sparse_ms) for e in table.entries] == [
        (8, (32, 48), 2.0, 1.0),
        (16, (32, 48), 2.0, 1.0),
    ]
    (file,) = (no_gpu_needed / "gemms").iterdir()
    assert file.name == "nvidia-h200-a-test.json"
    assert read_table(file) == table
    more = measure_gemms([(8, 32, 48), (8, 64, 64)], "float16", "cpu", counting(calls, 4.0, 3.0))
    assert calls == [2, 2, 2], "only the new one"
    assert [(e.rows, *e.shape, e.dense_ms) for e in more.entries] == [(8, 32, 48, 2.0), (8, 64, 64, 4.0)]
    assert len(read_table(file).entries) == 3
    other = measure_gemms([(8, 32, 48)], "bfloat16", "cpu", counting(calls, 9.0, 8.0))
    assert [(e.dtype, e.dense_ms) for e in other.entries] == [("bfloat16", 9.0)]
    assert len(calls) == 4


def test_times_of_another_driver_are_not_taken(no_gpu_needed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    measure_gemms([(8, 32, 48)], "float16", "cpu", counting(calls, 2.0, 1.0))
    monkeypatch.setattr(gemm_times, "_describe", lambda device: EMPTY.model_copy(update={"driver": "590"}))
    measure_gemms([(8, 32, 48)], "float16", "cpu", counting(calls, 2.0, 1.0))
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    no_gpu_needed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", "/dev/null/obsdiff")
    table = measure_gemms([(8, 32, 48)], "float16", "cpu", counting([], 2.0, 1.0))
    assert len(table.entries) == 1


@pytest.mark.parametrize("shape", [(8, 20, 48), (8, 32, 40), (8, 32, 6)])
def test_a_shape_without_a_sparse_kernel_is_timed_dense_alone(no_gpu_needed: Path, shape: tuple[int, int, int]) -> None:
    calls: list[int] = []
    found = time_gemm(shape, "float16", "cpu", counting(calls, 2.0))
    assert calls == [1]
    assert (found.dense_ms, found.sparse_ms, found.faster) == (2.0, None, False)


@pytest.mark.parametrize(
    ("dense", "sparse", "faster"), [(1.0, 0.5, True), (1.0, 0.979, True), (1.0, 0.981, False), (1.0, 1.2, False)]
)
def test_faster_is_by_more_than_noise(dense: float, sparse: float, faster: bool) -> None:
    assert entry(dense=dense, sparse=sparse).faster == faster


@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.1, 9)), max_size=8))
def test_joining_keeps_one_time_of_a_product_the_newest(found: list[tuple[int, float]]) -> None:
    table = EMPTY
    for rows, dense in found:
        table = table.joined([entry(rows=rows, dense=dense)])
    newest = dict(found)
    assert {e.rows: e.dense_ms for e in table.entries} == newest
    for rows in (1, 2, 3):
        there = table.find((rows, 32, 48), "bfloat16")
        assert (there.dense_ms if there else None) == newest.get(rows), "the other half-precision dtype will do"


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_random_weights_are_two_of_four(rows: int, groups: int, seed: int) -> None:
    weight = torch.randn(rows, groups * 4, generator=torch.Generator().manual_seed(seed))
    pruned = prune_randomly(weight)
    assert is_nm(pruned != 0, NM(2, 4))
    assert (pruned != 0).sum() == weight.numel() / 2
    kept = pruned != 0
    assert torch.equal(pruned[kept], weight[kept])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "is no table of products: device: Field required"),
        ('{"entries": [{"rows": 0}]}', "is no table of products"),
        ("[1]", "is no table of products: the file:"),
        ("nonsense", "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=words):
        read_table(tmp_path / "table.json")
    with pytest.raises(InputError, match="is missing"):
        read_table(tmp_path / "nothing.json")


def test_a_time_of_nothing_is_refused(tmp_path: Path) -> None:
    broken = EMPTY.model_dump() | {"entries": [{**entry().model_dump(), "dense_ms": 0}]}
    (tmp_path / "table.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"entries\.0\.dense_ms"):
        read_table(tmp_path / "table.json")


def test_a_cpu_is_refused_in_one_sentence() -> None:
    with pytest.raises(
        InputError, match=r"^sparse products cannot be timed: the device is cpu, and it takes a CUDA GPU$"
    ):
        measure_gemms([(8, 32, 48)], "float16", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"^sparse products cannot be timed: there is no CUDA GPU here$"):
            measure_gemms([(8, 32, 48)], "float16")


@pytest.mark.gpu
def test_a_gpu_times_products_that_grow_with_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path))
    table = measure_gemms([(256, 1024, 1024), (8192, 4096, 4096)], "float16")
    small, large = table.entries
    assert small.sparse_ms is not None
    assert large.sparse_ms is not None
    assert small.dense_ms < large.dense_ms / 10
    assert 0.4 < large.sparse_ms / large.dense_ms < 1.2
    assert 2 * 8192 * 4096 * 4096 / large.dense_ms / 1e9 < 2000, "TFLOP/s that no GPU has"


@pytest.mark.gpu
def test_the_timer_sees_a_product_twice_as_long_as_twice_as_long() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    once, twice = cuda_timer([lambda: a @ a, lambda: (a @ a, a @ a)])
    assert 1.6 < twice / once < 2.4
