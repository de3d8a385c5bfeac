"""Latency of one or several pipelines, run by run in turn, so that a machine's drift meets all of them alike."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from obsdiff.device import pick_device
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.measure.environment import environment
from obsdiff.progress import Progress
from obsdiff.runtime.generate import call_options, generate, known_prompt
from obsdiff.runtime.pipeline import check_sides, load

PROMPT = "a photo of a red ankle boot"
STAGES = ("text_encoding", "denoising_loop", "denoiser_call", "decode")


def bench(
    paths: Sequence[str | Path],
    *,
    backend: str = "auto",
    batch_size: int = 1,
    runs: int = 10,
    warmup: int = 2,
    memory: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Draws the same batch with every path in turn and times it; the order rotates from run to run.

    Overrides are the pipeline's own options (num_inference_steps, height, ...). Returns `environment`, `settings` and
    `results`: for each path milliseconds per batch (median, p90, p99), per stage medians, images per second, and the
    peak memory of a fresh process that loads it and draws one batch (resident, or the GPU allocator's).
    Raises InputError when a path or an option is wrong.
    """
    if not paths or batch_size < 1 or runs < 1 or warmup < 0:
        raise InputError("a bench needs at least one path, one run and one picture")
    progress = progress or Progress()
    device = pick_device(device)
    for path in paths:
        check_sides(path, overrides)
    with progress.task("loading", len(paths) * (1 + memory + warmup + runs)):
        pipes, options = [], []
        for path in paths:
            progress.advance(1, f"loading {path}")
            pipes.append(load(path, backend, device))
            options.append(call_options(pipes[-1], path, overrides))
        peaks: list[int | None] = [None] * len(paths)
        if memory:
            for k, path in enumerate(paths):
                progress.advance(1, f"memory of {path}")
                peaks[k] = peak_memory(path, backend, device, batch_size, overrides)
        samples: list[list[dict[str, float]]] = [[] for _ in paths]
        for run in range(-warmup, runs):
            for turn in range(len(paths)):
                k = (turn + run) % len(paths)
                progress.advance(1, "warming up" if run < 0 else f"run {run + 1}/{runs}")
                sample = time_batch(pipes[k], batch_size, options[k])
                if run >= 0:
                    samples[k].append(sample)
    results = [
        {
            "path": str(path),
            "backend": getattr(pipe, "obsdiff_backend", "torch"),
            **summarise(sample, batch_size),
            "peak_memory_bytes": peak,
        }
        for path, pipe, sample, peak in zip(paths, pipes, samples, peaks, strict=True)
    ]
    settings = {"batch_size": batch_size, "runs": runs, "warmup": warmup, "device": device, **options[0]}
    return {"environment": environment(), "settings": settings, "results": results}


def time_batch(pipe: Any, batch_size: int, options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of one batch: total, and each of STAGES (denoiser_call is the median of the calls)."""
    marks: dict[str, list[tuple[float, float]]] = {"text_encoding": [], "denoiser_call": [], "decode": []}
    denoiser = pipe.components.get("transformer") or pipe.components["unet"]
    with (
        _timed(pipe, "encode_prompt", marks["text_encoding"]),
        _timed(denoiser, "forward", marks["denoiser_call"]),
        _timed(pipe.vae, "decode", marks["decode"]),
    ):
        start = _now()
        generate(pipe, [known_prompt(pipe, PROMPT)] * batch_size, range(batch_size), options)
        total = _now() - start
    spans = {name: sum(end - begin for begin, end in times) for name, times in marks.items()}
    calls = [end - begin for begin, end in marks["denoiser_call"]]
    encoded = marks["text_encoding"][-1][1] if marks["text_encoding"] else start
    loop = marks["decode"][0][0] - encoded
    return spans | {"total": total, "denoising_loop": loop, "denoiser_call": float(np.median(calls))}


def summarise(samples: Sequence[Mapping[str, float]], batch_size: int) -> dict[str, Any]:
    """Milliseconds per batch over the runs, and what they come to."""
    totals = np.array([sample["total"] for sample in samples])
    median, p90, p99 = (float(np.percentile(totals, q)) * 1e3 for q in (50, 90, 99))
    return {
        "median_ms": median,
        "p90_ms": p90,
        "p99_ms": p99,
        "stages_ms": {name: float(np.median([sample[name] for sample in samples])) * 1e3 for name in STAGES},
        "images_per_second": batch_size / median * 1e3,
        "runs_ms": [float(total) * 1e3 for total in totals],
    }


def peak_memory(path: str | Path, backend: str, device: str, batch_size: int, overrides: Mapping[str, Any]) -> int:
    """Bytes at the peak of a fresh process that loads the path and draws one batch."""
    request = json.dumps([str(path), backend, device, batch_size, dict(overrides)])
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "obsdiff.measure.memory", request], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ObsdiffError(f"measuring the memory of {path} failed: {reason}")
    return int(done.stdout.strip().splitlines()[-1])


@contextmanager
def _timed(owner: Any, name: str, marks: list[tuple[float, float]]) -> Iterator[None]:
    """Records when the method starts and ends, while the body runs; nothing where the owner has no such method."""
    if not hasattr(owner, name):
        yield
        return
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = _now()
        result = method(*args, **kwargs)
        marks.append((begin, _now()))
        return result

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


def _now() -> float:
    """Seconds, after the GPU has finished what was queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
