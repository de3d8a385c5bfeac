"""A real server in a process of its own, as its users start it."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

PROMPT = "a red ankle boot"
LONG = {"prompt": PROMPT, "num_inference_steps": 150}
"""What keeps the small model busy for a moment."""


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> Any:
    """The first true value of the condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value


def pixels(b64: str) -> np.ndarray[Any, Any]:
    """int16 [h, w, 3] of a picture as the API gives it."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"), dtype=np.int16)


class Server:
    """`obsdiff serve` on a free port, and what it logged."""

    def __init__(self, *arguments: object):
        command = [sys.executable, "-m", "obsdiff", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: self.logged("listening") or self.process.poll() is not None)
        self.url = self.logged("listening")[0]["url"] if self.logged("listening") else ""
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def logged(self, message: str) -> list[dict[str, Any]]:
        """What was logged under that message so far."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in found if line["message"] == message]

    def ready(self) -> "Server":
        wait_for(lambda: self.process.poll() is not None or self.http.get("/health/ready").status_code == 200)
        assert self.process.poll() is None, self.lines
        return self

    def worker(self) -> int:
        """The process id of the newest worker."""
        return int(self.logged("worker started")[-1]["pid"])

    def draw(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 2, **body})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            inside = all(f'{key}="{label}"' in sample for key, label in labels.items())
            if sample.partition("{")[0] == name and inside:
                total += float(value)
        return total

    def end(self) -> int:
        """Waits for the exit code, and for the last line of the log."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def add_key_file(folder: Path, *keys: str) -> Path:
    path = folder / "keys"
    path.write_text("# who may draw\n\n" + "".join(f"{key}\n" for key in keys))
    return path
