"""The server's half of a worker: starts its process, passes messages, and says when it died."""

import asyncio
import logging
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from obsdiff.runtime.server import process
from obsdiff.runtime.server.messages import Settings

log = logging.getLogger("obsdiff.server")
LAST = 5.0  # seconds for the system to clear a process away


class WorkerProcess:
    """One life of a worker. `on_message` and `on_exit` are called on the event loop; nothing comes after the exit."""

    def __init__(
        self, settings: Settings, on_message: Callable[[Any], None], on_exit: Callable[["WorkerProcess"], None]
    ):
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_exit = on_message, on_exit
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        level = logging.getLogger().level
        self.process = context.Process(target=process.main, args=(theirs, settings, level), name=settings.path)
        self.process.start()
        theirs.close()  # so that the worker's end is closed when it dies
        threading.Thread(target=self._read, args=(self._pipe,), daemon=True).start()

    def send(self, message: Any) -> None:
        """To a worker that has died nothing is sent: its exit is about to be told."""
        try:
            self._pipe.send(message)
        except OSError:
            log.debug("the worker is gone")

    def kill(self) -> None:
        self.process.kill()

    async def stop(self) -> None:
        """Ends the worker, whatever it does: whoever calls this has waited for what was asked of it."""
        self._on_message, self._on_exit = (lambda _message: None), (lambda _worker: None)
        self.process.kill()
        await asyncio.to_thread(self.process.join, LAST)

    def _read(self, pipe: Connection) -> None:
        try:
            while True:
                self._tell(lambda message: self._on_message(message), pipe.recv())
        except (EOFError, OSError):
            pipe.close()
        self.process.join(LAST)
        self._tell(lambda worker: self._on_exit(worker), self)

    def _tell(self, call: Callable[[Any], None], value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, value)
        except RuntimeError:  # the loop has ended
            log.debug("the server is gone")
