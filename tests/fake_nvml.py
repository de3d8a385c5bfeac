"""An NVML with one board, whole or cut by MIG, and the names of the real pynvml."""

import os
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from obsdiff import nvml as gpu

UUID = "11111111-2222-3333-4444-555555555555"


class FakeNvml(ModuleType):
    """Answers by name; `state` is what the tests change."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.calls: list[tuple[str, Any]] = []
        self.clocks = {pynvml.NVML_CLOCK_SM: 1700, pynvml.NVML_CLOCK_MEM: 2600}
        self.reasons = pynvml.nvmlClocksEventReasonGpuIdle
        self.processes = {os.getpid(): 3 << 30}
        self.uuids = [f"GPU-{UUID}"]
        self.silent: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # an AttributeError where the real module has no such name
        return self._answer(name) if name.startswith("nvml") and callable(real) else real

    def _answer(self, name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if name in self.silent:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return ANSWERS[name](self, *arguments)

        return answer


def _by_uuid(nvml: FakeNvml, uuid: str) -> str:
    if uuid not in nvml.uuids:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return f"handle of {uuid}"


def _listed(nvml: FakeNvml, handle: str) -> list[Any]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in nvml.processes.items()]


ANSWERS: dict[str, Any] = {
    "nvmlInit": lambda nvml: None,
    "nvmlDeviceGetHandleByUUID": _by_uuid,
    "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda nvml, handle: "board",
    "nvmlDeviceGetMigMode": lambda nvml, handle: [int(handle == "board")] * 2,
    "nvmlDeviceGetEnforcedPowerLimit": lambda nvml, handle: 700_000,
    "nvmlDeviceGetMaxClockInfo": lambda nvml, handle, kind: 1980,
    "nvmlDeviceGetUUID": lambda nvml, handle: handle.removeprefix("handle of "),
    "nvmlSystemGetDriverVersion": lambda nvml: "580.65.06",
    "nvmlDeviceGetClockInfo": lambda nvml, handle, kind: nvml.clocks[kind],
    "nvmlDeviceGetPowerUsage": lambda nvml, handle: 512_345,
    "nvmlDeviceGetTemperature": lambda nvml, handle, sensor: 61,
    "nvmlDeviceGetCurrentClocksEventReasons": lambda nvml, handle: nvml.reasons,
    "nvmlDeviceGetComputeRunningProcesses": _listed,
}


def install(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Puts it in the place of the real one, and a GPU into torch."""
    nvml = FakeNvml()
    monkeypatch.setattr(gpu, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return nvml
