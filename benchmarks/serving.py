"""What serving costs over calling the pipeline, and what batching gains: the embedded model on this machine.

One run, everything in turn, so that a machine's drift meets all alike: the pipeline in this process, a request
to a real server, a batch of 8 in this process, 8 clients at once. Then requests at half of the
rate at which one client alone would keep the server busy.

    python benchmarks/serving.py
"""

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from obsdiff.export.stage import export
from obsdiff.measure.environment import environment
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.server.engine import encode

PROMPT = "a photo of a red ankle boot"
CLIENTS = 8
TURNS = 4  # requests of each client in a crowd


class Client:
    """One connection to the server that asks for one picture at a time; the standard library's, which costs least."""

    def __init__(self, url: str):
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)

    def draw(self, seed: int, steps: int) -> float:
        """Seconds from request to the picture's bytes."""
        body = json.dumps({"prompt": PROMPT, "seed": seed, "num_inference_steps": steps})
        start = time.perf_counter()
        self._connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        found = json.loads(answer.read())
        if answer.status != 200 or not found["data"][0]["b64_json"]:
            raise RuntimeError(f"{answer.status}: {found}")
        return time.perf_counter() - start


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[str]:
    """A server on a free port, ready; gives its URL."""
    command = [sys.executable, "-m", "obsdiff", "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        url = ""
        for line in process.stderr:
            told = json.loads(line) if line.startswith("{") else {"message": line}
            url = told.get("url", url)
            if told["message"] == "model ready":
                break
        else:
            raise RuntimeError("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url
    finally:
        process.terminate()
        process.wait()


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def at_rate(url: str, rate: float, count: int, gaps: Sequence[float], steps: int) -> list[float]:
    """Seconds of each request when they are sent after these gaps (in units of 1 / rate), whatever is still on."""
    with ThreadPoolExecutor(32) as pool:
        asked = []

        def ask(seed: int, due: float) -> float:
            Client(url).draw(seed, steps)
            return time.perf_counter() - due

        due = time.perf_counter()
        for seed in range(count):
            due += gaps[seed] / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            asked.append(pool.submit(ask, seed, due))
        return [one.result() for one in asked]


def percentiles(seconds: Sequence[float]) -> str:
    p50, p90, p99 = (float(np.percentile(seconds, q)) * 1e3 for q in (50, 90, 99))
    return f"p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms, p99 / p50 {p99 / p50:.2f}"


def compare(bundle: Path, url: str, steps: int, rounds: int) -> float:
    """Prints overhead and throughput; returns the seconds of a request that is alone."""
    pipe = load(bundle)
    options = call_options(pipe, bundle, {"num_inference_steps": steps})
    pipe.set_progress_bar_config(disable=True)
    clients = [Client(url) for _ in range(CLIENTS)]
    kept: dict[str, list[float]] = {name: [] for name in ("direct", "alone", "png", "batch", "together")}

    def draw(count: int) -> list[Any]:
        images: list[Any] = generate(pipe, [PROMPT] * count, range(count), options)
        return images

    with ThreadPoolExecutor(CLIENTS) as pool:

        def crowd(count: int) -> None:
            list(pool.map(lambda client: [client.draw(seed, steps) for seed in range(count)], clients))

        for turn in range(-2, rounds):
            clients[0].draw(0, steps)  # what the server does when a crowd comes or goes is not measured here
            seconds = (
                timed(lambda: draw(1)),
                clients[0].draw(0, steps),
                timed(lambda: [encode(image) for image in draw(1)]),
                timed(lambda: draw(CLIENTS)),
                timed(lambda: crowd(1)) and timed(lambda: crowd(TURNS)) / TURNS,
            )
            for samples, value in zip(kept.values(), seconds, strict=True):
                if turn >= 0:
                    samples.append(value)
    direct, alone, png, batch, together = (np.array(samples) for samples in kept.values())
    ratios = (np.median(alone / direct), np.median(alone) / np.median(direct), alone.min() / direct.min())
    print(f"batch 1, {steps} steps, {rounds} rounds in turn:")
    print(f"  the pipeline     {percentiles(list(direct))}; with a PNG {np.median(png) * 1e3:.1f} ms")
    print(f"  the server       {percentiles(list(alone))}")
    print("  overhead         {:+.1%} (median of pairs), {:+.1%} (of medians), {:+.1%} (of the fastest)".format(
        *(ratio - 1 for ratio in ratios)))  # fmt: skip
    print(f"images per second, {CLIENTS} clients against one:")
    one, many = 1 / float(np.median(alone)), CLIENTS / float(np.median(together))
    print(f"  the server       {one:.2f} -> {many:.2f}: {many / one:.2f} times")
    bare = CLIENTS * float(np.median(direct)) / float(np.median(batch))
    print(f"  the pipeline     {1 / np.median(direct):.2f} -> {CLIENTS / np.median(batch):.2f} at batch {CLIENTS}: "
          f"{bare:.2f} times")  # fmt: skip
    return float(np.median(alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="of each pattern at half load")
    parser.add_argument("--bundle", type=Path, help="instead of one of the embedded model")
    args = parser.parse_args()
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        bundle = args.bundle or Path(name) / "bundle"
        if not args.bundle:
            export("fashion", bundle)
        with serving(bundle, "--max-batch-size", str(CLIENTS)) as url:
            alone = compare(bundle, url, args.steps, args.rounds)
            rate = 0.5 / alone
            print(f"half load, {rate:.2f} requests a second, {args.requests} requests:")
            draws = random.Random(0)  # noqa: S311
            for how, gaps in (
                ("evenly spaced", [1.0] * args.requests),
                ("Poisson", [draws.expovariate(1) for _ in range(args.requests)]),
            ):
                seconds = at_rate(url, rate, args.requests, gaps, args.steps)
                print(f"  {how:<16} {percentiles(seconds)}")
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    print(json.dumps(environment() | {"torch_threads": str(torch.get_num_threads())}))


if __name__ == "__main__":
    main()
