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
from obsdiff.measure.conditions import Span, Watch
from obsdiff.measure.environment import environment
from obsdiff.measure.pairs import Pair, backend_list, check_paths, load_pairs
from obsdiff.measure.ratios import paired_ratio
from obsdiff.progress import Progress
from obsdiff.runtime.generate import generate, known_prompt

PROMPT = "a photo of a red ankle boot"
STAGES = ("text_encoding", "denoising_loop", "denoiser_call", "decode")


def bench(
    paths: Sequence[str | Path],
    *,
    backend: str | Sequence[str] = "auto",
    build: bool = True,
    batch_size: int = 1,
    runs: int = 10,
    warmup: int = 2,
    memory: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Draws the same batch with every path on every backend in turn and times it; the order rotates from run to run.

    Overrides are the pipeline's own options (num_inference_steps, height, ...). Returns `kind` "bench", `environment`,
    `settings`, `conditions` (see Watch.conditions), `warnings`, `interrupted`, and `results`: for each path and backend
    milliseconds per batch (median, p90, p99), per stage medians, images per second, `ratio` (how many times as fast as
    the first, see paired_ratio), what the GPU did, and the peak memory of a fresh process that loads it and draws one
    batch (resident, or the GPU allocator's). Ctrl-C during the runs ends it with those that were whole.
    Raises InputError when a path or an option is wrong; a backend that one path has nothing for is left out for it.
    """
    if not paths or batch_size < 1 or runs < 1 or warmup < 0:
        raise InputError("a bench needs at least one path, one run and one picture")
    progress = progress or Progress()
    device = pick_device(device)
    backends = backend_list(backend)
    check_paths(paths, overrides)
    asked, each = len(paths) * len(backends), memory + warmup + runs
    with progress.task("loading", asked * (1 + each)):
        pairs = load_pairs(paths, backends, device, overrides, progress, build)
        progress.advance((asked - len(pairs)) * each)
        peaks: list[int | None] = [None] * len(pairs)
        for k, pair in enumerate(pairs if memory else []):
            progress.advance(1, f"memory of {pair.path}")
            peaks[k] = peak_memory(pair.path, pair.asked, device, batch_size, overrides)
        watch = Watch(device)
        samples, spans, interrupted = _time_all(pairs, batch_size, runs, warmup, watch, progress)
    during = [watch.during(span) for span in spans]
    results = [
        {
            **pair.label,
            **summarise(sample, batch_size),
            **_ratio(samples[0], sample),
            "gpu": seen,
            "peak_memory_bytes": peak,
        }
        for pair, sample, seen, peak in zip(pairs, samples, during, peaks, strict=True)
        if sample
    ]
    settings = {"batch_size": batch_size, "runs": runs, "warmup": warmup, "device": device, **pairs[0].options}
    warnings = watch.warnings(during)
    for warning in warnings:
        progress.message(f"warning: {warning}")
    return {
        "kind": "bench",
        "environment": environment(device),
        "settings": settings,
        "conditions": watch.conditions(),
        "warnings": warnings,
        "interrupted": interrupted,
        "results": results,
    }


def _time_all(
    pairs: Sequence[Pair], batch_size: int, runs: int, warmup: int, watch: Watch, progress: Progress
) -> tuple[list[list[dict[str, float]]], list[list[Span]], bool]:
    """Every pair's samples, when they were taken, and whether Ctrl-C ended it; `watch` watches all but the warm-up."""
    interrupted = False
    samples: list[list[dict[str, float]]] = [[] for _ in pairs]
    spans: list[list[Span]] = [[] for _ in pairs]

    def rounds(numbers: range) -> None:
        for run in numbers:
            for turn in range(len(pairs)):
                k = (turn + run) % len(pairs)
                progress.advance(1, "warming up" if run < 0 else f"run {run + 1}/{runs}")
                begin = time.perf_counter()
                sample = time_batch(pairs[k].pipe, batch_size, pairs[k].options)
                if run >= 0:
                    samples[k].append(sample)
                    spans[k].append((begin, time.perf_counter()))

    rounds(range(-warmup, 0))
    with watch:
        try:
            rounds(range(runs))
        except KeyboardInterrupt:
            if not samples[0]:
                raise
            interrupted = True
    return samples, spans, interrupted


def _ratio(first: Sequence[Mapping[str, float]], sample: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    ratio, interval = paired_ratio(*([one["total"] for one in side] for side in (first, sample)))
    return {"ratio": ratio, "ratio_interval": interval and list(interval)}


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
        if (refusal := f"{InputError.__module__}.{InputError.__name__}: ") in reason:
            raise InputError(f"measuring the memory of {path} failed: {reason.partition(refusal)[2]}")
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
