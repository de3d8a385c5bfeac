"""Which calls are recorded, which replayed and which forgotten, with a recorder that any machine has."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obsdiff.export.cuda_graphs import with_graphs


class Tape:
    """Counts calls by shape; what it records fills buffers of its own and copies the output, as CUDA graphs do."""

    def __init__(self) -> None:
        self.called: list[int] = []
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        self.called.append(len(x))
        return x * t

    def record(self, denoise: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        held = {name: value.clone() for name, value in inputs.items()}
        self.recorded.append(len(held["x"]))

        def replay(**values: Tensor) -> Tensor:
            for name, value in values.items():
                held[name].copy_(value)
            self.replayed.append(len(held["x"]))
            return held["x"] * held["t"]

        return replay


def call(run: Callable[..., Tensor], size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(size, generator=generator), torch.randn((), generator=generator)
    return run(x=x, t=t), x * t


def test_shapes_are_recorded_when_they_come_again() -> None:
    tape = Tape()
    run = with_graphs(tape.denoise, record=tape.record)
    for seed, size in enumerate([2, 3, 2, 2, 3]):
        got, wanted = call(run, size, seed)
        assert torch.equal(got, wanted)
    assert (tape.called, tape.recorded, tape.replayed) == ([2, 3], [2, 3], [2, 2, 3])


def test_another_dtype_is_another_graph() -> None:
    tape = Tape()
    run = with_graphs(tape.denoise, record=tape.record)
    for dtype in (torch.float32, torch.float16):
        assert run(x=torch.ones(2, dtype=dtype), t=torch.ones(())).dtype == dtype
    assert tape.called == [2, 2]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 6), max_size=40), limit=st.integers(1, 4))
def test_the_last_shapes_are_kept_and_every_result_is_right(sizes: list[int], limit: int) -> None:
    tape = Tape()
    run = with_graphs(tape.denoise, record=tape.record, limit=limit)
    kept: list[int] = []
    for seed, size in enumerate(sizes):
        known, before = size in kept, len(tape.replayed)
        got, wanted = call(run, size, seed)
        assert torch.equal(got, wanted)
        assert len(tape.replayed) - before == known
        kept = [*(other for other in kept if other != size), size][-limit:]


def test_where_recording_fails_it_warns_once_and_goes_on() -> None:
    tape = Tape()

    def record(*_args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    run = with_graphs(tape.denoise, record=record)
    call(run, 2)
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: operation not permitted"):
        got, wanted = call(run, 2, 1)
    assert torch.equal(got, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, wanted = call(run, 2, 2)
    assert torch.equal(got, wanted)
    assert tape.called == [2, 2, 2]


@pytest.mark.gpu
def test_graphs_replay_what_was_called_on_a_gpu() -> None:
    layer = torch.nn.Linear(64, 64, device="cuda", dtype=torch.float16).requires_grad_(False)
    calls = []

    def denoise(x: Tensor) -> Tensor:
        calls.append(len(x))
        return layer(x).relu()

    run = with_graphs(denoise)
    results = []
    for seed, size in enumerate([2, 2, 5, 2, 5, 5, 2]):
        x = torch.randn(size, 64, generator=torch.Generator().manual_seed(seed)).half().cuda()
        results.append((run(x=x), layer(x).relu()))
    assert all(torch.equal(got, wanted) for got, wanted in results)  # all are still what they were
    assert len(calls) == 6  # a first call, a warm-up and a recording of each shape
