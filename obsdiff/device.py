"""Where tensors live: a user's --device, checked before anything is loaded, and what it is."""

import platform
from pathlib import Path
from typing import NamedTuple

from obsdiff.errors import InputError


class Device(NamedTuple):
    """What a measurement holds for: "cuda", a GPU's name and "sm_90"; "cpu", a processor's name and "AVX512"."""

    kind: str
    name: str
    target: str


def pick_device(device: str | None) -> str:
    """The device itself, or cuda where there is one, else cpu. Raises InputError when torch cannot use it here."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: torch cannot use it here: {str(error).splitlines()[0]}") from None
    return device


def gpu_sm(device: str) -> str:
    """The compute capability of a CUDA device, such as "90"; "" for any other device and where there is no GPU."""
    import torch

    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def describe(device: str) -> Device:
    """What the device is, for a device that torch can use here."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return Device(kind, torch.cuda.get_device_name(device), f"sm_{gpu_sm(device)}")
    return Device(kind, processor(), torch.backends.cpu.get_cpu_capability())


def processor() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
