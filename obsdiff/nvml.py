"""The GPU's own account through NVML: clocks, power, temperature, what held it back, and who else was on it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

# What lowers a clock; that it is idle, or set by hand, is no reason to distrust a number.
THROTTLES = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat (hardware)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}
QUANTITIES = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")


@dataclass(frozen=True)
class Gpu:
    """NVML's handles for a device of torch: the board has clocks and power, its MIG part (or itself) the processes."""

    device: str
    board: Any
    part: Any


def find_gpu(device: str) -> Gpu | None:
    """The GPU that torch calls `device`; None for a CPU and where there is no NVML.

    By UUID: NVML counts the boards that CUDA_VISIBLE_DEVICES hides, and in another order.
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    names = [visible] if visible.startswith("MIG-") else []  # CUDA shows a process one MIG part, and this is it
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    for name in (*names, f"GPU-{uuid}", f"MIG-{uuid}"):
        part = _ask(pynvml.nvmlDeviceGetHandleByUUID, name)
        if part is not None:
            board = _ask(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, part) if name[:3] == "MIG" else part
            return Gpu(device, board or part, part)
    return None


def describe(gpu: Gpu) -> dict[str, str]:
    """What does not change while it works, as text: UUID, driver, MIG, limits; what NVML does not tell is out."""
    mig = _ask(pynvml.nvmlDeviceGetMigMode, gpu.board)
    power = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu.board)
    clock = _ask(pynvml.nvmlDeviceGetMaxClockInfo, gpu.board, pynvml.NVML_CLOCK_SM)
    found = {
        "gpu_uuid": _ask(pynvml.nvmlDeviceGetUUID, gpu.part),
        "driver": _ask(pynvml.nvmlSystemGetDriverVersion),
        "mig": None if mig is None else "on" if mig[0] else "off",
        "gpu_power_limit": None if power is None else f"{power / 1000:.0f} W",
        "gpu_clock_limit": None if clock is None else f"{clock} MHz",
    }
    return {name: value for name, value in found.items() if value is not None}


def sample(gpu: Gpu) -> dict[str, Any]:
    """QUANTITIES now, and the bits of THROTTLES as `reasons`; None for what NVML does not tell."""
    power = _ask(pynvml.nvmlDeviceGetPowerUsage, gpu.board)
    return {
        "sm_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, gpu.board, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, gpu.board, pynvml.NVML_CLOCK_MEM),
        "power_w": None if power is None else power / 1000,
        "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, gpu.board, pynvml.NVML_TEMPERATURE_GPU),
        "reasons": _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu.board) or 0,
    }


def other_processes(gpu: Gpu) -> dict[int, int]:
    """Bytes of GPU memory by the id of every other process that computes on it (0: NVML does not tell).

    In a container NVML counts in the host's ids, where this process has another: then the one whose memory is nearest
    to what torch holds is taken for this process.
    """
    listed = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu.part) or []
    found = {process.pid: process.usedGpuMemory or 0 for process in listed}
    own: int | None = os.getpid()
    if own not in found:
        held = torch.cuda.memory_reserved(gpu.device)
        own = min(found, key=lambda pid: abs(found[pid] - held), default=None)
    return {pid: size for pid, size in found.items() if pid != own}


def throttles(reasons: int) -> list[str]:
    return [words for bit, words in THROTTLES.items() if reasons & bit]


def summarise(samples: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Smallest, median and largest of QUANTITIES, and what held the clocks back; None without a sample."""
    if not samples:
        return None
    values = {name: sorted(one[name] for one in samples if one[name] is not None) for name in QUANTITIES}
    return {
        "samples": len(samples),
        **{
            name: {"min": some[0], "median": some[len(some) // 2], "max": some[-1]} if some else None
            for name, some in values.items()
        },
        "throttled": list(dict.fromkeys(words for one in samples for words in throttles(one["reasons"]))),
    }


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, None where this GPU, driver or user is not told."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None
