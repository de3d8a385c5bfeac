"""What else went on while something was timed: without it, nobody knows what a number is worth."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from obsdiff import nvml

PAUSE = 0.05  # seconds between two samples of a GPU
LISTED = 20  # samples between two lists of its processes, which are dearer
DRIFT = 0.03  # of the SM clock, between rows
BUSY = 0.1  # share of all cores that others may use

Span = tuple[float, float]


class Watch:
    """A context that watches the machine; `begin` and `end` of the spans are time.perf_counter's."""

    def __init__(self, device: str) -> None:
        self._cpu = torch.device(device).type == "cpu"
        self._gpu = nvml.find_gpu(device)
        self._samples: list[dict[str, Any]] = []
        self._others: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if self._gpu else None

    def __enter__(self) -> "Watch":
        self._before = _times()
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._after = _times()

    def conditions(self) -> dict[str, Any]:
        """The load averages and the share of the cores that other processes used; the GPU as a whole, if there is one.

        `gpu` has what nvml.summarise says, and `other_processes`: bytes of GPU memory by process id.
        """
        seconds = self._after["time"] - self._before["time"]
        others = (self._after["busy"] - self._before["busy"]) - (self._after["own"] - self._before["own"])
        found: dict[str, Any] = {
            "seconds": seconds,
            "load_average": {"start": self._before["load"], "end": self._after["load"]},
            "others_cpu_share": min(1.0, max(0.0, others / seconds / (psutil.cpu_count() or 1))) if seconds else 0.0,
        }
        if self._gpu:
            others_on_gpu = {str(pid): size for pid, size in self._others.items()}
            found["gpu"] = {**(nvml.summarise(list(self._samples)) or {}), "other_processes": others_on_gpu}
        return found

    def during(self, spans: Sequence[Span]) -> dict[str, Any] | None:
        """What nvml.summarise says of the samples in the spans; None without one."""
        inside = (one for one in self._samples if any(begin <= one["time"] <= end for begin, end in spans))
        return nvml.summarise(list(inside))

    def warnings(self, rows: Sequence[Mapping[str, Any] | None]) -> list[str]:
        """Sentences about what makes the numbers doubtful; `rows` are what `during` said of each row."""
        found = self.conditions()
        warnings = []
        if self._cpu and (share := found["others_cpu_share"]) > BUSY:
            warnings.append(
                f"other processes kept {share:.0%} of the cores busy: the times are worth little, "
                "so stop what else is running and measure again"
            )
        clocks = [row["sm_clock_mhz"]["median"] for row in rows if row and row["sm_clock_mhz"]]
        if clocks and max(clocks) - min(clocks) > DRIFT * max(clocks):
            warnings.append(
                f"the SM clock drifted between rows, from {min(clocks)} to {max(clocks)} MHz: "
                "lock it with nvidia-smi --lock-gpu-clocks"
            )
        if held := found.get("gpu", {}).get("throttled"):
            warnings.append(f"the GPU lowered its clocks: {', '.join(held)}")
        if self._others:
            who = ", ".join(f"{pid} ({size / 2**20:.0f} MiB)" for pid, size in self._others.items())
            warnings.append(f"other processes were on the GPU: {who}")
        return warnings

    def _sample(self) -> None:
        assert self._gpu
        count = 0
        while not self._stop.is_set():
            if count % LISTED == 0:
                for pid, size in nvml.other_processes(self._gpu).items():
                    self._others[pid] = max(size, self._others.get(pid, 0))
            self._samples.append({"time": time.perf_counter(), **nvml.sample(self._gpu)})
            count += 1
            self._stop.wait(PAUSE)


def _times() -> dict[str, Any]:
    """Seconds that all cores and this process have worked so far, and the load averages."""
    cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = sum(getattr(cores, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))  # guests count twice
    return {
        "time": time.perf_counter(),
        "busy": sum(cores) - idle,
        "own": own.user + own.system,
        "load": [round(value, 2) for value in psutil.getloadavg()],
    }
