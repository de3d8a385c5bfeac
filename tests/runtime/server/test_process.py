"""The worker's loop, over an engine that fails as it is told to."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from obsdiff.errors import InputError
from obsdiff.runtime.server import process
from obsdiff.runtime.server.engine import Stopped, Watch
from obsdiff.runtime.server.messages import Cancel, Draw, Key, Picture, Refused, Step
from obsdiff.runtime.server.process import Worker

KEY = Key(32, 32, 4, 4.0, None)


class Pipe:
    """A real pipe with what the server sent, then its end; keeps what the worker sends."""

    def __init__(self, *incoming: Any, end: bool = False):
        server, self._end = multiprocessing.Pipe()
        for message in incoming:
            server.send(message)
        self._server, self.sent = server, list[Any]()
        self.fileno, self.recv, self.send = self._end.fileno, self._end.recv, self.sent.append
        if end:
            server.close()


class Engine:
    """Draws grey pictures in four steps, unless `fails` says otherwise."""

    prompts = ("a probe",)

    def __init__(self, fails: Callable[[Sequence[str]], Exception | None] = lambda _prompts: None):
        self.fails, self.calls = fails, []

    def draw(self, prompts: Sequence[str], _seeds: Sequence[int], _key: Key, watch: Watch) -> dict[int, Image.Image]:
        self.calls.append(list(prompts))
        if error := self.fails(prompts):
            raise error
        for step in range(4):
            watch.seconds.append(0.1)
            watch.step(step + 1, 4, dict)
            if len(watch.gone()) == len(prompts):
                return {}
        return {k: Image.new("RGB", (32, 32)) for k in range(len(prompts)) if k not in watch.gone()}


def batch(*prompts: str, stream: bool = False) -> Draw:
    return Draw(7, KEY, prompts, (0,) * len(prompts), (0,) * len(prompts), stream)


def drawn(pipe: Pipe) -> list[int]:
    return [message.index for message in pipe.sent if isinstance(message, Picture)]


def test_one_bad_prompt_takes_no_other_with_it() -> None:
    bad = InputError("no such class")
    engine = Engine(lambda prompts: bad if "bad" in prompts else None)
    pipe = Pipe()
    Worker(pipe, engine).draw(batch("a", "b", "bad", "c"))  # type: ignore[arg-type]
    assert sorted(drawn(pipe)) == [0, 1, 3]
    assert [m for m in pipe.sent if isinstance(m, Refused)] == [Refused(7, 2, "no such class", "client")]


def test_a_batch_that_does_not_fit_is_drawn_in_halves() -> None:
    error = RuntimeError("CUDA out of memory")
    engine = Engine(lambda prompts: error if len(prompts) > 2 else None)
    pipe = Pipe()
    Worker(pipe, engine).draw(batch("a", "b", "c", "d"))  # type: ignore[arg-type]
    assert [len(call) for call in engine.calls] == [4, 2, 2]
    assert drawn(pipe) == [0, 1, 2, 3]


def test_an_engine_that_can_draw_no_more_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    pipe, error = Pipe(), RuntimeError("CUDA error: an illegal memory access")
    Worker(pipe, Engine(lambda _prompts: error)).draw(batch("a"))  # type: ignore[arg-type]
    assert pipe.sent == [Refused(7, 0, "drawing failed", "server")]
    assert codes == [1]


def test_an_engine_that_draws_on_after_a_failure_keeps_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"exit {code}"))
    error = RuntimeError("CUDA out of memory")
    pipe = Pipe()
    Worker(pipe, Engine(lambda prompts: error if "huge" in prompts else None)).draw(batch("huge"))  # type: ignore[arg-type]
    assert pipe.sent == [Refused(7, 0, process.IN_MEMORY, "server")]


def test_who_was_cancelled_before_or_between_steps_gets_nothing() -> None:
    pipe = Pipe(Cancel(7, 1))
    worker = Worker(pipe, engine := Engine())  # type: ignore[arg-type]
    worker.cancelled.add((7, 0))
    worker.draw(batch("a", "b", "c", stream=True))
    assert engine.calls == [["b", "c"]]
    assert drawn(pipe) == [2]
    assert [m.step for m in pipe.sent if isinstance(m, Step)] == [1, 2, 3, 4]


def test_the_worker_ends_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Stopped(code)

    monkeypatch.setattr(os, "_exit", leave)
    worker = Worker(Pipe(end=True), Engine())  # type: ignore[arg-type]
    with pytest.raises(Stopped, match="0"):
        worker.listen()
