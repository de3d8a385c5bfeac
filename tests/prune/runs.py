"""Calibrations of a model without a prune around them, and a progress display that interrupts."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from obsdiff.cli import main
from obsdiff.models import walk
from obsdiff.models.source import find_source, load_pipeline
from obsdiff.models.walk import Stage
from obsdiff.progress import Progress
from obsdiff.prune.calibration import Calibration, encode_prompts, sampler_of
from obsdiff.prune.hessian import Hessians
from obsdiff.prune.recipe import make_recipe

SD3 = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"


class Interrupting(Progress):
    """Raises KeyboardInterrupt when it is told of progress for the n-th time."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Noting(Progress):
    """Keeps how much it was promised and told of, and what it was told."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.notes: list[str] = []

    def start(self, title: str, total: int) -> None:
        self.total += total

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.notes.append(note)

    def message(self, text: str) -> None:
        self.notes.append(text)


def make_run(model: str | Path, folder: Path, **options: Any) -> Calibration:
    """A calibration with a denoiser of its own, in float32 on the CPU."""
    source = find_source(model)
    pipe = load_pipeline(source, torch.float32)
    recipe = make_recipe(source, {"num_prompts": 4, "steps": 2, "batch_size": 2, "device": "cpu", **options})
    batches = encode_prompts(pipe, source.spec, recipe, "cpu")
    denoiser = pipe.components[source.spec.component]
    return Calibration(
        sampler_of(pipe, "cpu"), denoiser, source.spec, batches, recipe, "cpu", folder, lambda count, note: None
    )


def linear_packages(run: Calibration) -> list[list[Stage]]:
    """All linears, a package a block."""
    stages = walk.linear_stages(run.denoiser, run.spec)
    return [[stage for stage in stages if stage.block == block] for block in sorted({s.block for s in stages})]


def joined(parts: list[Hessians]) -> Hessians:
    return {names: hessians for part in parts for names, hessians in part.items()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(model: str | Path, out: Path, options: dict[str, Any]) -> list[str]:
    """What follows `-m obsdiff` for a prune with these options."""
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["prune", str(model), str(out), *flags]


class Rank:
    """`obsdiff ARGUMENTS` as one of several ranks on this machine: a process of its own with one thread."""

    def __init__(self, rank: int, port: int, arguments: list[str], folder: Path, world: int = 2):
        self._said = folder / f"rank-{rank}-{port}.txt"
        context = multiprocessing.get_context("forkserver")  # which imports torch and diffusers once for all ranks
        context.set_forkserver_preload(["obsdiff.prune.stage", "obsdiff.cli.prune", SD3])
        self.process = context.Process(target=_main, args=(rank, port, world, arguments, self._said))
        self.process.start()

    def end(self, seconds: float = 60) -> tuple[int | None, str]:
        """The exit code and what was said as an error; a process that hangs is killed, and its code is negative."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self._said.read_text()


def _main(rank: int, port: int, world: int, arguments: list[str], said: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, str(said))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    main(arguments)
