"""The worker process: reads batches from a pipe, draws them with an engine, writes back what happens."""

import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.runtime.server.logs import log_json
from obsdiff.runtime.server.messages import Cancel, Done, Draw, Failed, Picture, Ready, Refused, Settings, Step

if TYPE_CHECKING:
    from obsdiff.runtime.server.engine import Engine

log = logging.getLogger("obsdiff.worker")
SMALL = 1 << 16  # pixels of a batch that are written faster than a thread wakes up
IN_MEMORY = "the batch did not fit into memory"


def main(pipe: Connection, settings: Settings, level: int) -> None:
    """Runs until the server closes the pipe. Signals are for the server: it lets the worker finish what it draws."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_json(level)
    try:
        import tqdm  # type: ignore[import-untyped]

        tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed worker would leave behind
        from obsdiff.models.source import quiet_libraries
        from obsdiff.runtime.server.engine import Engine

        with quiet_libraries():
            engine = Engine(settings)
            info = engine.warm_up()
    except ObsdiffError as error:
        pipe.send(Failed(str(error), error.exit_code))
    except Exception as error:  # the server says it in one sentence; the log has the rest
        log.exception("start failed")
        pipe.send(Failed(f"{settings.path}: {type(error).__name__}: {str(error)[:300]}", 1))
    else:
        Worker(pipe, engine).run(Ready(info))


class Worker:
    """Draws, and looks into the pipe between steps; PNGs that take their time are written on threads of their own."""

    def __init__(self, pipe: Connection, engine: "Engine"):
        self.pipe, self.engine = pipe, engine
        self.poller = select.poll()  # the pipe's own poll() takes ten times as long, every step
        self.poller.register(pipe.fileno(), select.POLLIN)
        self.batches: deque[Draw] = deque()
        self.cancelled: set[tuple[int, int]] = set()
        self.sending = threading.Lock()
        self.encoders = ThreadPoolExecutor(2)

    def run(self, ready: Ready) -> None:
        self.send(ready)
        while True:
            while not self.batches:
                self.listen()
            batch = self.batches.popleft()
            start = time.perf_counter()
            steps, dropped = self.draw(batch)
            self.send(Done(batch.batch, time.perf_counter() - start, tuple(steps), dropped))
            self.cancelled.clear()

    def send(self, message: Any) -> None:
        try:
            with self.sending:
                self.pipe.send(message)
        except OSError:
            os._exit(0)

    def listen(self) -> None:
        """Takes the next message. Ends the process when the server is gone."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        if isinstance(message, Draw):
            self.batches.append(message)
        elif isinstance(message, Cancel):
            self.cancelled.add((message.batch, message.index))

    def draw(self, batch: Draw) -> tuple[list[float], int]:
        """Draws the batch; where that fails, in halves, so that one bad request harms no other. Returns the seconds
        of each step and how many pictures were let go."""
        from obsdiff.runtime.server.engine import Watch

        seconds: list[float] = []
        dropped = 0
        parts = [list(range(len(batch.prompts)))]
        while parts:
            part = [k for k in parts.pop(0) if (batch.batch, k) not in self.cancelled]
            if not part:
                continue
            watch = Watch(gone=self._gone(batch, part), step=self._watcher(batch, part))
            try:
                pictures = self.engine.draw(
                    [batch.prompts[k] for k in part], [batch.seeds[k] for k in part], batch.key, watch
                )
                small = sum(image.width * image.height for image in pictures.values()) <= SMALL
                for place, image in pictures.items():
                    if small:
                        self._encode(batch.batch, part[place], image)
                    else:
                        self.encoders.submit(self._encode, batch.batch, part[place], image)
            except Exception as error:
                if len(part) > 1:
                    parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                else:
                    self._refuse(batch, part[0], error)
            seconds += watch.seconds
            dropped += watch.dropped
        return seconds, dropped

    def _refuse(self, batch: Draw, index: int, error: Exception) -> None:
        if isinstance(error, InputError):
            return self.send(Refused(batch.batch, index, str(error), "client"))
        log.error("a picture failed", exc_info=error)
        short = IN_MEMORY if "out of memory" in str(error) or isinstance(error, MemoryError) else "drawing failed"
        self.send(Refused(batch.batch, index, short, "server"))
        from obsdiff.runtime.server.engine import check

        try:
            check(self.engine, batch.key)
        except Exception:  # a GPU that took an error takes no more work from this process: a new one starts afresh
            log.exception("the worker can draw no more and ends")
            os._exit(1)
        return None

    def _encode(self, batch: int, index: int, image: Any) -> None:
        from obsdiff.runtime.server.engine import encode

        try:
            self.send(Picture(batch, index, encode(image)))
        except Exception:
            log.exception("a picture could not be written")
            self.send(Refused(batch, index, "the picture could not be written", "server"))

    def _gone(self, batch: Draw, part: list[int]) -> Callable[[], set[int]]:
        def gone() -> set[int]:
            while self.poller.poll(0):
                self.listen()
            return {place for place, k in enumerate(part) if (batch.batch, k) in self.cancelled}

        return gone

    def _watcher(self, batch: Draw, part: list[int]) -> Callable[..., None]:
        def step(done: int, total: int, latents: Callable[[], dict[int, Any]]) -> None:
            if not batch.stream:
                return
            wanted = {place for place, k in enumerate(part) if is_preview(done, total, batch.previews[k])}
            shown = {}
            for place, one in latents().items() if wanted else ():
                if place in wanted and (png := self.engine.preview(one)):
                    shown[part[place]] = png
            self.send(Step(batch.batch, done, total, shown))

        return step


def is_preview(step: int, total: int, count: int) -> bool:
    """Whether a picture that gets `count` previews gets one after this step; none after the last, which is it."""
    return step < total and step * (count + 1) // total > (step - 1) * (count + 1) // total
