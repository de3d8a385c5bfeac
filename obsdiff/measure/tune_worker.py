"""A process of its own that runs one backend for obsdiff.measure.tune: what crashes it harms nobody else.

It is asked in JSON over the socket whose number it is given, one question at a time, until its end is closed.
"""

import json
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.export import parity
from obsdiff.export.bundle import CONFIG, read_manifest
from obsdiff.files import read_json, write_tensors
from obsdiff.models import graph
from obsdiff.models.source import quiet_libraries
from obsdiff.progress import Progress
from obsdiff.runtime.backends import Denoise, load_backend

TURN = 0.1  # seconds of calls in one turn, at least one call
CALLS = 50  # at most

Shapes = list[dict[str, int]]


class Told(Progress):
    """Progress that is told to the process that asks."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def start(self, title: str, total: int) -> None:
        self.advance(0, title)

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            send(self.pipe, note=note)

    def message(self, text: str) -> None:
        send(self.pipe, message=text)


class Candidate:
    """One backend of a bundle. Its methods are what the process may be asked."""

    denoise: Denoise

    def __init__(self, pipe: Connection, bundle: str, backend: str, device: str, threads: int, build: bool):
        torch.set_num_threads(threads)
        self.bundle, self.backend, self.device, self.build = Path(bundle), backend, device, build
        self.manifest = read_manifest(self.bundle)
        self.config = read_json(self.bundle / CONFIG)
        self.told = Told(pipe)
        self.inputs: dict[str, dict[str, Tensor]] = {}

    def load(self) -> float:
        """Loads the backend, and builds its engine where that is allowed; returns seconds."""
        start = time.perf_counter()
        with quiet_libraries():
            self.denoise = load_backend(
                self.backend, self.bundle, self.manifest, self.device, build=self.build, progress=self.told
            )
        return time.perf_counter() - start

    def reference(self, shapes: Shapes, path: str) -> None:
        """Writes what this backend gives for the inputs that parity.compare uses. Raises ObsdiffError for NaN."""
        found = {}
        for seed, axes in enumerate(shapes):
            found[str(seed)] = self.denoise(**self._inputs(axes, seed)).float().cpu().contiguous()
            if not found[str(seed)].isfinite().all():
                raise ObsdiffError(f"it gives NaN or infinity in {self.manifest.precision} at {parity.say_axes(axes)}")
        write_tensors(Path(path), found)

    def check(self, shapes: Shapes, path: str) -> dict[str, Any]:
        """How far this backend is from a reference. Raises ObsdiffError when it is not the same function."""
        outputs = load_file(path)
        return parity.compare(
            self.denoise,
            [outputs[str(seed)] for seed in range(len(shapes))],
            self.manifest.spec,
            self.config,
            shapes,
            self.manifest.precision,
            name=f"{self.backend} backend",
            device=self.device,
        ).model_dump()

    def time(self, axes: dict[str, int]) -> float:
        """The median of a turn's calls at the shape, in milliseconds, after one that is not counted."""
        inputs = self.inputs.setdefault(parity.say_axes(axes), self._inputs(axes, 0))
        self._seconds(inputs)  # the other one's turn left cold caches
        calls: list[float] = []
        while not calls or (sum(calls) < TURN and len(calls) < CALLS):
            calls.append(self._seconds(inputs))
        return median(calls) * 1e3

    def _seconds(self, inputs: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        self.denoise(**inputs)
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _inputs(self, axes: dict[str, int], seed: int) -> dict[str, Tensor]:
        dtype = parity.DTYPES[self.manifest.precision]
        return graph.random_inputs(self.manifest.spec, self.config, axes, dtype, self.device, seed)


def send(pipe: Connection, **answer: Any) -> None:
    pipe.send_bytes(json.dumps(answer).encode())


def main(number: str, request: str) -> None:
    """Answers `done` with a value, `refused` with what the user can mend, or `failed` with what went wrong."""
    pipe = Connection(int(number))
    candidate = Candidate(pipe, **json.loads(request))
    while True:
        try:
            asked = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            send(pipe, done=getattr(candidate, asked.pop("do"))(**asked))
        except InputError as error:
            send(pipe, refused=str(error))
        except Exception as error:  # a backend's library may raise anything: the one that asked goes on with the next
            send(pipe, failed=first_line(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
