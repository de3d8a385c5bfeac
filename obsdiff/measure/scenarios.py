"""Scenarios after MLPerf Inference for one pipeline in this process: single-stream, offline, server."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from obsdiff.device import pick_device
from obsdiff.errors import InputError
from obsdiff.measure.arrivals import arrivals
from obsdiff.measure.environment import environment
from obsdiff.measure.latency import PROMPT
from obsdiff.models.source import MANIFEST
from obsdiff.progress import Progress
from obsdiff.runtime.generate import call_options, generate, known_prompt
from obsdiff.runtime.pipeline import check_sides, load

SCENARIOS = ("single-stream", "offline", "server")
QUANTILES = {"median_ms": 50, "p90_ms": 90, "p99_ms": 99}
BATCH = 8  # of what is no bundle, and of bundles whose range is wider

Draw = Callable[[int, int], None]
"""Draws pictures `first` to `first + count`, in one batch."""


def run_scenario(
    path: str | Path,
    scenario: str,
    *,
    rate: float | None = None,
    bound: float | None = None,
    requests: int = 50,
    warmup: int = 2,
    backend: str = "auto",
    device: str | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Draws as many pictures as requests: one after the other (single-stream, judged by its p90), in the largest
    batches (offline, by its images a second), or as a Poisson process of that rate brings them (server, by its p99).

    Offline has no latency, since everything is due at once: its percentiles are None.
    Server draws together what waits when a batch begins, up to the largest batch, and its latency counts from
    arrival; `within_bound` says whether p99 keeps the bound in seconds, None without one.
    Raises InputError when the path or an option is wrong.
    """
    _check(scenario, rate, bound)
    progress = progress or Progress()
    check_sides(path, overrides)
    device = pick_device(device)
    batch = 1 if scenario == "single-stream" else largest_batch(path)
    with progress.task(f"loading {path}", 1 + warmup + requests):
        pipe = load(path, backend, device)
        options = call_options(pipe, path, overrides)
        prompt = known_prompt(pipe, PROMPT)
        progress.advance(1)

        def draw(first: int, count: int) -> None:
            generate(pipe, [prompt] * count, range(first, first + count), options)

        def shown(first: int, count: int) -> None:
            draw(first, count)
            progress.advance(count, scenario)

        for _ in range(warmup):
            draw(0, min(batch, requests))
            progress.advance(1, "warming up")
        due = arrivals(rate, requests) if rate else [0.0] * requests
        start = time.perf_counter()
        ends = drain(due, batch, shown)
        seconds = time.perf_counter() - start
    begins = [0.0, *ends[:-1]] if scenario == "single-stream" else due
    times = np.array(ends) - np.array(begins)
    quantiles = {name: float(np.percentile(times, q)) for name, q in QUANTILES.items()}
    return {
        "environment": environment(),
        "settings": {
            "path": str(path),
            "rate": rate,
            "bound": bound,
            "requests": requests,
            "warmup": warmup,
            **options,
        },
        "scenario": scenario,
        "backend": getattr(pipe, "obsdiff_backend", "torch"),
        "max_batch_size": batch,
        **{name: None if scenario == "offline" else value * 1e3 for name, value in quantiles.items()},
        "images_per_second": requests / seconds,
        "within_bound": None if bound is None else quantiles["p99_ms"] <= bound,
        "latencies_ms": (times * 1e3).tolist(),
    }


def drain(
    due: Sequence[float],
    batch: int,
    draw: Draw,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[float]:
    """When each picture was done. A batch takes what is due when it begins, in order, and never waits for company."""
    start, ends = now(), list[float]()
    while len(ends) < len(due):
        first = len(ends)
        if (early := due[first] - (now() - start)) > 0:
            sleep(early)
        time_now = max(now() - start, due[first])
        count = sum(moment <= time_now for moment in due[first : first + batch])
        draw(first, count)
        ends += [now() - start] * count
    return ends


def largest_batch(path: str | Path) -> int:
    """The most pictures that the bundle was exported for, at most BATCH. Raises InputError for a broken manifest."""
    from obsdiff.export.bundle import read_manifest

    if not (Path(path) / MANIFEST).exists():
        return BATCH
    return min(BATCH, read_manifest(Path(path)).max_batch or BATCH)


def _check(scenario: str, rate: float | None, bound: float | None) -> None:
    if scenario not in SCENARIOS:
        raise InputError(f"--scenario {scenario}: there are {', '.join(SCENARIOS)}")
    if scenario == "server" and rate is None:
        raise InputError("--scenario server needs --rate: arrivals a second")
    if scenario != "server" and (rate is not None or bound is not None):
        raise InputError(f"--rate and --bound go with --scenario server, not with {scenario}")
