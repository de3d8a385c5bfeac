"""Load on an endpoint of OpenAI's images API: clients that wait for their answers, or arrivals that do not."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from obsdiff.errors import InputError, ObsdiffError, first_line
from obsdiff.measure.arrivals import arrivals
from obsdiff.progress import Progress

ROUTE = "/images/generations"
CAPTIONS = Path(__file__).parents[1] / "data" / "prompts" / "fashion.txt"
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Sample:
    """A request: when it was due and answered, in seconds from the level's start, and what went wrong."""

    start: float
    end: float
    error: str | None = None


@dataclass(frozen=True)
class Level:
    """One load: so many clients, or so many arrivals a second."""

    clients: int | None = None
    rate: float | None = None

    @property
    def words(self) -> str:
        return f"{self.clients} client{'s' * (self.clients != 1)}" if self.clients else f"{self.rate:g}/s"


def load_test(
    url: str,
    *,
    clients: Sequence[int] = (),
    rates: Sequence[float] = (),
    requests: int = 50,
    warmup: int = 1,
    key: str | None = None,
    timeout: float = 120,
    seed: int = 0,
    progress: Progress | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Sends as many requests at each level, one level after the other; the default level is one client.

    `fields` go into each request (model, size, num_inference_steps ...); whatever is None stays out, since strict
    endpoints refuse what they do not know. Prompts are the shipped captions. Returns `settings`, `interrupted` and
    `results`: for each level what `summarise` says. Ctrl-C ends it with what was measured so far.
    Raises InputError when the endpoint refuses the first request, ObsdiffError when it cannot be reached or fails.
    """
    if requests < 1 or min(clients, default=1) < 1 or not all(0 < rate < float("inf") for rate in rates):
        raise InputError("a load needs at least one request, and clients or rates above zero")
    progress = progress or Progress()
    endpoint = find_endpoint(url)
    levels = [Level(clients=count) for count in clients] + [Level(rate=rate) for rate in rates] or [Level(clients=1)]
    measured: list[tuple[Level, list[Sample]]] = []
    body = {name: value for name, value in fields.items() if value is not None}
    captions = CAPTIONS.read_text(encoding="utf-8").splitlines()

    def request(k: int) -> dict[str, Any]:
        return {"prompt": captions[k % len(captions)], "n": 1, **body}

    async def all_levels() -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=5)
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout) as client:
            for _ in range(max(1, warmup)):
                await _check(client, endpoint, request(0))
                progress.advance(1, f"warmed up {endpoint}")
            for level in levels:
                samples: list[Sample] = []
                measured.append((level, samples))
                await run_level(level, requests, seed, lambda k: _ask(client, endpoint, request(k)), keep(samples))

    def keep(samples: list[Sample]) -> Callable[[Sample], None]:
        def one(sample: Sample) -> None:
            samples.append(sample)
            progress.advance(1, f"{len(measured)}/{len(levels)} {measured[-1][0].words}")

        return one

    interrupted = False
    with progress.task(f"asking {endpoint}", max(1, warmup) + requests * len(levels)):
        try:
            asyncio.run(all_levels())
        except KeyboardInterrupt:
            if not any(samples for _, samples in measured):
                raise
            interrupted = True
    results = [summarise(level, samples) for level, samples in measured if samples]
    settings = {
        "url": endpoint,
        "requests": requests,
        "warmup": max(1, warmup),
        "timeout": timeout,
        "seed": seed,
        **body,
    }
    return {"settings": settings, "interrupted": interrupted, "results": results}


def find_endpoint(url: str) -> str:
    """The full address of the route, from a server's, its /v1's or the route's own. Raises InputError."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"--url {url}: {first_line(error)}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise InputError(f"--url {url}: give it whole, as in http://localhost:8000")
    path = parts.path.rstrip("/").removesuffix(ROUTE)
    return str(parts.copy_with(path=(path or "/v1") + ROUTE))


def read_key(path: Path) -> str:
    """The first key of a file as `obsdiff serve --api-key-file` takes it. Raises InputError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {path}: {getattr(error, 'strerror', None) or 'is no UTF-8 text'}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not keys[0].isascii():
        raise InputError(f"--api-key-file {path}: it holds no key")
    return keys[0]


async def run_level(
    level: Level,
    requests: int,
    seed: int,
    ask: Callable[[int], Awaitable[str | None]],
    keep: Callable[[Sample], None],
) -> None:
    """Asks for requests 0, 1, ... under a load. `ask` returns what went wrong; each sample is kept when it ends."""
    begin = time.perf_counter()

    async def timed(k: int, due: float) -> None:
        error = await ask(k)
        keep(Sample(due, time.perf_counter() - begin, error))

    if level.clients:
        numbers = iter(range(requests))

        async def client() -> None:
            for k in numbers:
                await timed(k, time.perf_counter() - begin)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(level.clients, requests)):
                group.create_task(client())
        return
    async with asyncio.TaskGroup() as group:
        for k, due in enumerate(arrivals(level.rate or 1.0, requests, seed)):
            await asyncio.sleep(due - (time.perf_counter() - begin))
            group.create_task(timed(k, due))  # from when it was due: a late start is the user's wait too


def summarise(level: Level, samples: Sequence[Sample]) -> dict[str, Any]:
    """Percentiles of the latency of what was answered, in milliseconds, images a second, and errors by kind.

    Percentiles are None where nothing was answered; the rate counts from the first request to the last answer.
    """
    times = np.array([(sample.end - sample.start) * 1e3 for sample in samples if sample.error is None])
    seconds = max(sample.end for sample in samples) - min(sample.start for sample in samples)
    names = {"median_ms": 50, "p90_ms": 90, "p99_ms": 99}
    return {
        "clients": level.clients,
        "rate": level.rate,
        "requests": len(samples),
        "answered": len(times),
        "errors": dict(Counter(sample.error for sample in samples if sample.error).most_common()),
        "seconds": seconds,
        "images_per_second": len(times) / seconds if seconds else 0.0,
        **{name: float(np.percentile(times, q)) if len(times) else None for name, q in names.items()},
        "latencies_ms": times.tolist(),
    }


def plot_load(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency against throughput: median and p99 of each level, closed loop and arrivals apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in (("clients", "#1f5fbf"), ("rate", "#c05621")):
        rows = [row for row in results if row[kind] is not None and row["answered"]]
        for name, style in (("median_ms", "-o"), ("p99_ms", "--s")):
            if rows:
                points = [(row["images_per_second"], row[name]) for row in rows]
                label = f"{name.removesuffix('_ms')}, {'closed loop' if kind == 'clients' else 'Poisson arrivals'}"
                axes.plot(*zip(*points, strict=True), style, color=colour, ms=4, lw=1.4, label=label)
        for row in rows:
            where = (row["images_per_second"], row["p99_ms"])
            words = Level(row["clients"], row["rate"]).words
            axes.annotate(words, where, (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="images a second", ylabel="latency [ms]")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def check_plot(path: Path) -> None:
    """Raises InputError, before anything is measured, for a plot that cannot be written."""
    if path.suffix.lower() not in PLOTS:
        raise InputError(f"--plot {path}: name it .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: the folder does not exist")


async def _check(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    """The first request, whose errors are the user's to mend."""
    try:
        response = await client.post(url, json=body)
    except httpx.TimeoutException:
        raise ObsdiffError(f"{url} did not answer in time") from None
    except httpx.HTTPError as error:
        raise ObsdiffError(f"{url} cannot be reached: {first_line(error)}") from None
    if problem := _problem(response):
        kind = InputError if 400 <= response.status_code < 500 and response.status_code != 429 else ObsdiffError
        raise kind(f"{url} answered {problem}{_message(response)}")


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str | None:
    """What went wrong, as few words as can be counted."""
    try:
        return _problem(await client.post(url, json=body))
    except httpx.TimeoutException:
        return "timeout"
    except httpx.HTTPError as error:
        return f"connection: {type(error).__name__}"


def _problem(response: httpx.Response) -> str | None:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    fields = answer if isinstance(answer, dict) else {}
    if response.is_success:
        data = fields.get("data")
        first = data[0] if isinstance(data, list) and data else None
        drawn = isinstance(first, dict) and (first.get("b64_json") or first.get("url"))
        return None if drawn else f"{response.status_code} without a picture"
    error = fields.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return f"{response.status_code} {code or response.reason_phrase}".strip()[:80]


def _message(response: httpx.Response) -> str:
    try:
        return f": {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return ""
