"""The asking half of obsdiff.measure.tune_worker: starts the process, asks it, and says how it ended."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.progress import Progress

LOOK = 1.0  # seconds between two looks whether the process still lives


class Worker:
    """One backend in a process of its own, for the length of a `with` block.

    What its libraries print goes to `log`. It has a session of its own: Ctrl-C is for the process that asks, and what
    the worker started ends with it. So do its temporary files, beside `log`: it is killed, and cannot tidy up.
    """

    def __init__(self, request: Mapping[str, Any], log: Path, timeout: float, progress: Progress):
        self.backend: str = request["backend"]
        self.timeout, self.progress, self.log = timeout, progress, log
        self.scratch = log.with_suffix(".tmp")
        self.scratch.mkdir()
        self.pipe, theirs = Pipe()
        with log.open("wb") as file:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "obsdiff.measure.tune_worker", str(theirs.fileno()), json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=[theirs.fileno()],
                env=_environment(self.scratch),
                start_new_session=True,
            )
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._kill()
        self.pipe.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ask(self, do: str, **words: Any) -> Any:
        """The worker's answer. Raises InputError for what it refuses, ObsdiffError when it fails, dies or hangs."""
        end = time.monotonic() + self.timeout
        try:
            self.pipe.send_bytes(json.dumps({"do": do, **words}).encode())
            while "done" not in (answer := self._receive(end)):
                if "refused" in answer:
                    raise InputError(answer["refused"])
                if "failed" in answer:
                    raise ObsdiffError(answer["failed"])
                if "note" in answer:
                    self.progress.advance(0, f"{self.backend}: {answer['note']}")
                else:
                    self.progress.message(answer["message"])
        except (EOFError, OSError):
            raise ObsdiffError(self._end()) from None
        return answer["done"]

    def _receive(self, end: float) -> dict[str, Any]:
        """The next message. Raises EOFError when the process is gone, though a child of it may hold its socket."""
        while not self.pipe.poll(LOOK):
            if self.ended and not self.pipe.poll():
                raise EOFError
            if time.monotonic() > end:
                self._kill()
                raise ObsdiffError(f"no answer within {self.timeout:g} seconds")
        message: dict[str, Any] = json.loads(self.pipe.recv_bytes())
        return message

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _end(self) -> str:
        """How the process ended, and the last that was printed there."""
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        words = f"its process ended with exit code {code}"
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
            words = f"its process was killed by {name}{memory}"
        return f"{words}{': ' + lines[-1].strip()[:200] if lines else ''}"


def _environment(scratch: Path) -> dict[str, str]:
    """This process's, with temporary files in `scratch`; what torch.compile keeps for later stays where it was."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    kept = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    return {**kept, **os.environ, "TMPDIR": str(scratch)}
