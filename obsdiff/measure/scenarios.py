"""Scenarios after MLPerf Inference in this process, for one pipeline or several: single-stream, offline, server."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from obsdiff.device import pick_device
from obsdiff.errors import InputError
from obsdiff.measure.arrivals import arrivals
from obsdiff.measure.conditions import Span, Watch
from obsdiff.measure.environment import environment
from obsdiff.measure.latency import PROMPT
from obsdiff.measure.pairs import Pair, backend_list, check_paths, load_pairs
from obsdiff.models.source import MANIFEST
from obsdiff.progress import Progress
from obsdiff.runtime.generate import generate, known_prompt

SCENARIOS = ("single-stream", "offline", "server")
QUANTILES = {"median_ms": 50, "p90_ms": 90, "p99_ms": 99}
BATCH = 8  # of what is no bundle, and of bundles whose range is wider
PROBES = 6  # of a search: it ends within 1/64 of the rate that the pipeline can do at all

Draw = Callable[[int, int], None]
"""Draws pictures `first` to `first + count`, in one batch."""


@dataclass
class Runner:
    """A pair at work: its largest batch, how long batches took (pictures, seconds), and the latencies in seconds."""

    pair: Pair
    batch: int
    batches: list[tuple[int, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rate: float | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)

    def draw(self, first: int, count: int) -> None:
        begin = time.perf_counter()
        prompts = [known_prompt(self.pair.pipe, PROMPT)] * count
        generate(self.pair.pipe, prompts, range(first, first + count), self.pair.options)
        end = time.perf_counter()
        self.batches.append((count, end - begin))
        self.spans.append((begin, end))

    def forget(self) -> None:
        self.batches, self.spans, self.times = [], [], []


def run_scenario(
    paths: Sequence[str | Path],
    scenario: str,
    *,
    rate: float | None = None,
    bound: float | None = None,
    requests: int = 50,
    warmup: int = 2,
    backend: str | Sequence[str] = "auto",
    build: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Draws as many pictures as requests with every path on every backend: one after the other (single-stream, judged
    by its p90), in the largest batches (offline, by its images a second), or as a Poisson process of that rate brings
    them (server, by its p99).

    Single-stream and offline take turns batch by batch. A server has the machine to itself while it runs; without a
    rate the highest is searched whose p99 keeps the bound, the probes of all taking turns, up to what the largest
    batches give, and `rate` is None where none that was tried keeps it.
    Offline has no latency, since everything is due at once: its percentiles are None, its `latencies_ms` those of the
    batch that each picture was in.
    Server draws together what waits when a batch begins, up to the largest batch, and its latency counts from
    arrival; `within_bound` says whether p99 keeps the bound in seconds, None without one.
    Returns `kind` "scenario", `scenario`, `results` (a row each, `ratio`: how many times as good as the first), and
    what bench returns beside them. Ctrl-C ends it with what was drawn so far.
    Raises InputError when a path or an option is wrong.
    """
    _check(paths, scenario, rate, bound)
    progress = progress or Progress()
    device = pick_device(device)
    backends = backend_list(backend)
    check_paths(paths, overrides)
    asked, search = len(paths) * len(backends), scenario == "server" and rate is None
    each = warmup + requests * (PROBES if search else 1)
    interrupted = False
    with progress.task("loading", asked * (1 + each)):
        pairs = load_pairs(paths, backends, device, overrides, progress, build)
        progress.advance((asked - len(pairs)) * each)
        alone = scenario == "single-stream"
        runners = [Runner(pair, 1 if alone else largest_batch(pair.path)) for pair in pairs]
        for runner in runners:
            for _ in range(warmup):
                runner.draw(0, min(runner.batch, requests))
                progress.advance(1, "warming up")
            runner.forget()
        with Watch(device) as watch:
            try:
                if search:
                    assert bound
                    _search(runners, requests, bound, progress)
                elif rate:
                    for runner in runners:
                        _serve(runner, rate, requests, progress, f"{rate:g}/s")
                else:
                    _take_turns(runners, requests, scenario, progress)
            except KeyboardInterrupt:
                if not runners[0].times:
                    raise
                interrupted = True
    during = [watch.during(runner.spans) for runner in runners]
    rows = [
        {**_row(runner, scenario, bound, search), "gpu": seen}
        for runner, seen in zip(runners, during, strict=True)
        if runner.times
    ]
    warnings = watch.warnings(during)
    for warning in warnings:
        progress.message(f"warning: {warning}")
    return {
        "kind": "scenario",
        "environment": environment(device),
        "settings": {
            "rate": rate,
            "bound": bound,
            "requests": requests,
            "warmup": warmup,
            "device": device,
            **pairs[0].options,
        },
        "conditions": watch.conditions(),
        "warnings": warnings,
        "interrupted": interrupted,
        "scenario": scenario,
        "results": [{**row, "ratio": _ratio(rows[0], row, scenario, search)} for row in rows],
    }


def _take_turns(runners: Sequence[Runner], requests: int, scenario: str, progress: Progress) -> None:
    """Each draws a batch in turn until all have drawn enough; the first changes from round to round."""
    done, turn = [0] * len(runners), 0
    while min(done) < requests:
        for k in ((turn + step) % len(runners) for step in range(len(runners))):
            if count := min(runners[k].batch, requests - done[k]):
                runners[k].draw(done[k], count)
                runners[k].times += [runners[k].batches[-1][1]] * count
                done[k] += count
                progress.advance(count, scenario)
        turn += 1


def _serve(runner: Runner, rate: float, requests: int, progress: Progress, note: str) -> None:
    """Requests as a Poisson process brings them; their latencies count from arrival. What was done is kept."""
    due = arrivals(rate, requests)
    runner.forget()
    runner.rate = rate

    def shown(first: int, count: int) -> None:
        runner.draw(first, count)
        progress.advance(count, note)

    drain(
        due, runner.batch, shown, time.perf_counter, time.sleep, keep=lambda k, end: runner.times.append(end - due[k])
    )


def _search(runners: Sequence[Runner], requests: int, bound: float, progress: Progress) -> None:
    """The highest rate of each whose p99 keeps the bound, by halving what is below its largest batches' rate."""
    limits = []
    for runner in runners:
        runner.draw(0, runner.batch)
        limits.append([0.0, runner.batch / runner.batches[-1][1]])
    best: list[tuple[list[float], list[tuple[int, float]], list[Span]] | None] = [None] * len(runners)
    try:
        for _ in range(PROBES):
            for k, runner in enumerate(runners):
                rate = sum(limits[k]) / 2
                _serve(runner, rate, requests, progress, f"{runner.pair.path}: {rate:.3g}/s")
                p99 = float(np.percentile(runner.times, 99))
                runner.probes.append({"rate": rate, "p99_ms": p99 * 1e3, "within_bound": p99 <= bound})
                limits[k][0 if p99 <= bound else 1] = rate
                if p99 <= bound:
                    best[k] = runner.times, runner.batches, runner.spans
    finally:  # Ctrl-C too: the row tells of the best probe, and of the last where none kept the bound
        for runner, found, (low, _) in zip(runners, best, limits, strict=True):
            runner.rate = low or None
            if found:
                runner.times, runner.batches, runner.spans = found


def _row(runner: Runner, scenario: str, bound: float | None, search: bool) -> dict[str, Any]:
    times = np.array(runner.times)
    quantiles = {name: float(np.percentile(times, q)) for name, q in QUANTILES.items()}
    seconds = sum(spent for _, spent in runner.batches)
    if scenario == "server":  # idle time counts: it is the arrivals' rate that was kept up with, or not
        seconds = runner.spans[-1][1] - runner.spans[0][0]
    return {
        **runner.pair.label,
        "max_batch_size": runner.batch,
        "requests": len(times),
        **{name: None if scenario == "offline" else value * 1e3 for name, value in quantiles.items()},
        "images_per_second": sum(count for count, _ in runner.batches) / seconds,
        "rate": runner.rate,
        "within_bound": None if bound is None else runner.rate is not None if search else quantiles["p99_ms"] <= bound,
        **({"probes": runner.probes} if search else {}),
        "latencies_ms": (times * 1e3).tolist(),
    }


def _ratio(first: Mapping[str, Any], row: Mapping[str, Any], scenario: str, search: bool) -> float | None:
    """By what the scenario is judged by; None where a search found no rate."""
    if scenario == "offline" or search:
        name = "rate" if search else "images_per_second"
        return row[name] / first[name] if row[name] and first[name] else None
    name = "p90_ms" if scenario == "single-stream" else "p99_ms"
    return first[name] / row[name]


def drain(
    due: Sequence[float],
    batch: int,
    draw: Draw,
    now: Callable[[], float],
    sleep: Callable[[float], None],
    keep: Callable[[int, float], None] = lambda _k, _end: None,
) -> list[float]:
    """When each picture was done. A batch takes what is due when it begins, in order, and never waits for company.

    `keep` is told of each picture when it is done: its number, and when.
    """
    start, ends = now(), list[float]()
    while len(ends) < len(due):
        first = len(ends)
        if (early := due[first] - (now() - start)) > 0:
            sleep(early)
        time_now = max(now() - start, due[first])
        count = sum(moment <= time_now for moment in due[first : first + batch])
        draw(first, count)
        ends += [now() - start] * count
        for k in range(first, first + count):
            keep(k, ends[k])
    return ends


def largest_batch(path: str | Path) -> int:
    """The most pictures that the bundle was exported for, at most BATCH. Raises InputError for a broken manifest."""
    from obsdiff.export.bundle import read_manifest

    if not (Path(path) / MANIFEST).exists():
        return BATCH
    return min(BATCH, read_manifest(Path(path)).max_batch or BATCH)


def _check(paths: Sequence[str | Path], scenario: str, rate: float | None, bound: float | None) -> None:
    if not paths:
        raise InputError("a scenario needs at least one path")
    if scenario not in SCENARIOS:
        raise InputError(f"--scenario {scenario}: there are {', '.join(SCENARIOS)}")
    if scenario == "server" and rate is None and bound is None:
        raise InputError(
            "--scenario server needs --rate, arrivals a second, or --bound, for the highest rate that keeps it"
        )
    if scenario != "server" and (rate is not None or bound is not None):
        raise InputError(f"--rate and --bound go with --scenario server, not with {scenario}")
