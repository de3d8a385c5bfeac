"""Running an engine: addresses, shapes, streams, memory and CUDA graphs, with an engine that adds on the CPU.

The stand-ins have the names that test_trt_names.py finds in the library; what a GPU does with them, only one can tell.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from obsdiff.errors import ObsdiffError
from obsdiff.export import trt_run
from obsdiff.export.bundle import Manifest
from obsdiff.export.schema import EngineKey, EngineOptions
from obsdiff.export.schema import Tensor as Signature

PLAN = b"a plan"
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16}


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The memory at an address as a tensor."""
    count = torch.Size(shape).numel()
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


class Context:
    """y = 2 a + b, and as much scratch memory as y has values, which it fills."""

    def __init__(self, library: Any):
        self.library, self.shapes, self.addresses, self.scratch = library, {}, {}, (0, 0)
        library.contexts.append(self)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 8

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % trt_run.ALIGNMENT == 0
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in ("a", "b") if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {**self.shapes, "y": self.shapes["a"]}[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return torch.Size(self.shapes["a"]).numel() * self.library.scratch_factor

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        addresses, shape, (scratch, size) = dict(self.addresses), self.shapes["a"], self.scratch
        recording = self.library.recording

        def run() -> None:
            if recording is None:  # a graph's scratch is its pool's, which lives on
                at(scratch, (size,), torch.uint8).fill_(255)
            at(addresses["y"], shape).copy_(2 * at(addresses["a"], shape) + at(addresses["b"], shape))
            self.library.ran.append((self, stream, addresses))

        if recording is None:
            run()
        else:
            recording.append(run)
        return not self.library.fails


class Engine:
    num_io_tensors = 3

    def __init__(self, library: Any):
        self.library, self.budget = library, None

    def get_tensor_name(self, i: int) -> str:
        return "aby"[i]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.library.dtypes.get(name, "FLOAT"))

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == "the user's"
        return Context(self.library)

    def get_weight_streaming_automatic_budget(self) -> int:
        return 42

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in ("library", "budget", "weight_streaming_budget_v2")
        super().__setattr__(name, value)


class Graph:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Stream:
    def __init__(self, handle: int = 77):
        self.cuda_stream, self.waited = handle, []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A TensorRT and a CUDA that run on the CPU; what they were asked is kept in it."""

    class ILogger:
        WARNING = 2

    class Library:
        """In place of the module."""

        __version__ = "11.0"
        ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="the user's")

    made: Any = Library()
    made.ILogger, made.contexts, made.ran, made.dtypes = ILogger, [], [], {}
    made.recording, made.fails, made.capturable, made.scratch_factor = None, False, True, 1
    made.engine, made.streams = Engine(made), []
    made.stream = Stream(5)

    class Runtime:
        def __init__(self, logger: Any):
            self.logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> Any:
            if bytes(plan) == PLAN:
                return made.engine
            self.logger.log(1, "IRuntime::load: Error Code 1: Serialization (magic tag. In f at /a.cpp:1)")
            return None

    made.Runtime = Runtime

    @contextlib.contextmanager
    def graph(into: Graph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        if not made.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        made.recording = into.calls
        yield
        made.recording = None

    @contextlib.contextmanager
    def enter(stream: Any) -> Iterator[None]:
        before, made.stream = made.stream, stream
        yield
        made.stream = before

    cuda = {
        "device": contextlib.nullcontext,
        "current_stream": lambda: made.stream,
        "stream": enter,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "mem_get_info": lambda: (10**9, 2 * 10**9),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(trt_run, "ALIGNMENT", 64)  # torch's own on a CPU; on a GPU it is 512
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: made.streams.append(stream))
    return made


def signature(dtype: str = "float32") -> Manifest:
    entries = [Signature(name=name, dtype=dtype, axes=("batch", 4)) for name in "aby"]  # type: ignore[arg-type]
    return Manifest.model_construct(inputs=entries[:2], outputs=entries[2:])


def load(library: Any, path: Path, **options: bool) -> Any:
    key = EngineKey.model_construct(format="tensorrt", options=EngineOptions(**options))
    return trt_run.open_engine(library, "TensorRT", path, signature(), key, "cpu")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(PLAN)
    return path


def pair(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 4, generator=generator) for name in "ab"}


def check(denoise: Any, inputs: dict[str, Tensor]) -> None:
    assert torch.allclose(denoise(**inputs), 2 * inputs["a"] + inputs["b"])


def test_the_callers_own_memory_is_read_where_it_can_be(library: Any, plan: Path) -> None:
    denoise, inputs = load(library, plan), pair(2)
    inputs = {name: trt_run.aligned(value) for name, value in inputs.items()}
    check(denoise, inputs)
    ((_, stream, addresses),) = library.ran
    assert {name: value.data_ptr() for name, value in inputs.items()}.items() <= addresses.items()
    assert stream == 5, "the stream of the caller"


def test_odd_memory_is_copied(library: Any, plan: Path) -> None:
    denoise = load(library, plan)
    values = torch.randn(9, 4)
    check(denoise, {"a": values[1:5], "b": torch.randn(4, 4).T})


def test_shapes_that_come_again_are_captured_and_replayed_with_new_values(library: Any, plan: Path) -> None:
    denoise = load(library, plan)
    for seed in range(5):
        for batch in (1, 3):
            check(denoise, pair(batch, seed))
    contexts = [context for context, *_ in library.ran]
    assert len(library.contexts) == 3, "one for any shape, and one a graph: a change of shape breaks those captured"
    assert contexts[-2:] == library.contexts[1:]
    assert {context.shapes["a"] for context in library.contexts[1:]} == {(1, 4), (3, 4)}


def test_a_result_is_not_overwritten_by_the_next_call(library: Any, plan: Path) -> None:
    denoise = load(library, plan)
    for seed in range(2):
        denoise(**pair(2, seed))
    first = denoise(**pair(2, 10))
    kept = first.clone()
    denoise(**pair(2, 11))
    assert torch.equal(first, kept)


@pytest.mark.filterwarnings("ignore:goes on without CUDA graphs")
def test_what_cannot_be_captured_runs_all_the_same(library: Any, plan: Path) -> None:
    library.capturable = False
    denoise = load(library, plan)
    for seed in range(4):
        check(denoise, pair(2, seed))


def test_weights_that_stream_are_given_a_budget_and_no_graph(library: Any, plan: Path) -> None:
    denoise = load(library, plan, weight_streaming=True)
    assert library.engine.weight_streaming_budget_v2 == 42
    for seed in range(4):
        check(denoise, pair(2, seed))
    assert len(library.contexts) == 1


def test_every_stream_has_a_context_and_the_default_one_is_left_alone(library: Any, plan: Path) -> None:
    denoise, default = load(library, plan), Stream(0)
    check(denoise, pair(2))
    library.stream = default
    check(denoise, pair(2))
    assert [stream for _, stream, _ in library.ran] == [5, 77]
    assert len(library.contexts) == 2
    assert [stream.cuda_stream for stream in default.waited] == [77]
    assert {stream.cuda_stream for stream in library.streams[-3:]} == {77, 0}, "inputs and result know both streams"


def test_what_the_engine_refuses_is_said(library: Any, plan: Path) -> None:
    denoise = load(library, plan)
    with pytest.raises(ObsdiffError, match=r"engine\.plan does not take a of shape \[9, 4\]"):
        denoise(**pair(9))
    library.fails = True
    with pytest.raises(ObsdiffError, match=r"TensorRT does not run .*engine\.plan"):
        denoise(**pair(2))


def test_too_little_memory_says_how_much_is_needed(library: Any, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoise, empty = load(library, plan), torch.empty
    library.scratch_factor = 10**9

    def refuse(shape: Any, **options: Any) -> Tensor:
        if options["dtype"] == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ObsdiffError, match=r"needs 8\.0 GB beside the weights for a \[2, 4\], b .* 1\.0 GB are free"):
        denoise(**pair(2))


@pytest.mark.parametrize("content", [b"junk", PLAN[:-1], b""], ids=["foreign", "truncated", "empty"])
def test_a_file_that_is_no_engine_is_one_sentence(library: Any, plan: Path, content: bytes) -> None:
    plan.write_bytes(content)
    with pytest.raises(ObsdiffError, match=r"engine\.plan is (no engine that TensorRT 11.* tag|empty)") as caught:
        load(library, plan)
    assert "/a.cpp" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [({"y": "HALF"}, "it has y as float16, the bundle as float32"), ({"a": "INT8"}, "it has a as another type")],
)
def test_the_engine_of_another_model_is_refused(library: Any, plan: Path, dtypes: dict[str, str], message: str) -> None:
    library.dtypes = dtypes
    with pytest.raises(ObsdiffError, match=message):
        load(library, plan)


def test_an_engine_larger_than_the_memory_is_refused_before_it_is_loaded(
    library: Any, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2, 10))
    with pytest.raises(ObsdiffError, match="--weight-streaming"):
        load(library, plan)
    load(library, plan, weight_streaming=True)


@pytest.mark.parametrize("content", [b"x" * 4000, b"ftrt" * 10])
def test_tensorrt_rtx_itself_refuses_what_is_no_engine(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    path = tmp_path / "engine.plan"
    path.write_bytes(content)
    key = EngineKey.model_construct(format="tensorrt-rtx", options=EngineOptions())
    with pytest.raises(ObsdiffError, match=r"engine\.plan does not run here: malformed engine$"):
        trt_run.load_engine(trt, "TensorRT-RTX", path, key)
