"""What NVML says of the GPU that torch uses: found by UUID, silent where there is nothing to tell."""

import os
import time

import pynvml
import pytest
import torch
from fake_nvml import ANSWERS, UUID, FakeNvml, install

from obsdiff import nvml as gpu
from obsdiff.measure.conditions import Watch
from obsdiff.measure.environment import environment


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return install(monkeypatch)


def find(device: str = "cuda") -> gpu.Gpu:
    found = gpu.find_gpu(device)
    assert found
    return found


def test_the_fake_answers_what_the_real_module_has() -> None:
    assert all(callable(getattr(pynvml, name)) for name in ANSWERS)


def test_without_nvml_or_a_gpu_there_is_nothing_and_no_noise(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert gpu.find_gpu("cpu") is None
    nvml = install(monkeypatch)
    nvml.silent = {"nvmlInit"}
    assert gpu.find_gpu("cuda") is None
    nvml.silent, nvml.uuids = set(), []
    assert gpu.find_gpu("cuda") is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_nvml_without_a_driver_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(gpu, "pynvml", pynvml)
    assert gpu.find_gpu("cuda") is None


def test_the_board_is_found_by_its_uuid_and_described(nvml: FakeNvml) -> None:
    found = find("cuda:1")
    assert found == gpu.Gpu("cuda:1", f"handle of GPU-{UUID}", f"handle of GPU-{UUID}")
    assert gpu.describe(found) == {
        "gpu_uuid": f"GPU-{UUID}",
        "driver": "580.65.06",
        "mig": "off",
        "gpu_power_limit": "700 W",
        "gpu_clock_limit": "1980 MHz",
    }


@pytest.mark.parametrize("visible", ["", "MIG-7", "MIG-7,MIG-8"])
def test_a_mig_part_has_the_processes_and_its_board_the_clocks(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    """torch tells the part's UUID, or the board's; then CUDA_VISIBLE_DEVICES tells the part."""
    nvml.uuids = [f"GPU-{UUID}", "MIG-7"] if visible else [f"MIG-{UUID}"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = find()
    part = "handle of MIG-7" if visible else f"handle of MIG-{UUID}"
    assert (found.board, found.part) == ("board", part)
    assert gpu.describe(found)["mig"] == "on"
    nvml.calls.clear()
    gpu.sample(found)
    gpu.other_processes(found)
    asked = {name: arguments[0] for name, arguments in nvml.calls}
    assert asked.pop("nvmlDeviceGetComputeRunningProcesses") == part
    assert set(asked.values()) == {"board"}


def test_what_a_gpu_does_not_tell_is_absent(nvml: FakeNvml) -> None:
    found = find()
    nvml.silent = set(ANSWERS) - {"nvmlDeviceGetPowerUsage"}
    assert gpu.describe(found) == {}
    assert gpu.other_processes(found) == {}
    seen = gpu.summarise([gpu.sample(found)])
    assert seen
    assert seen["sm_clock_mhz"] is seen["temperature_c"] is None
    assert seen["power_w"] == {"min": 512.345, "median": 512.345, "max": 512.345}


def test_samples_become_the_smallest_the_median_and_the_largest(nvml: FakeNvml) -> None:
    found, samples = find(), []
    for clock, reasons in ((1500, 4), (1980, 1), (1700, 4 | 32 | 2)):
        nvml.clocks[pynvml.NVML_CLOCK_SM], nvml.reasons = clock, reasons
        samples.append(gpu.sample(found))
    seen = gpu.summarise(samples)
    assert seen
    assert seen["samples"] == 3
    assert seen["sm_clock_mhz"] == {"min": 1500, "median": 1700, "max": 1980}
    assert seen["memory_clock_mhz"]["max"] == 2600
    assert seen["throttled"] == ["power cap", "heat"]
    assert gpu.summarise([]) is None


def test_other_processes_are_told_from_this_one(nvml: FakeNvml) -> None:
    found = find()
    assert gpu.other_processes(found) == {}
    nvml.processes = {os.getpid(): 1 << 20, 77: 5 << 30}
    assert gpu.other_processes(found) == {77: 5 << 30}
    nvml.processes = {900_001: 5 << 30, 900_002: 3 << 30}  # a container: the host's ids, and torch holds 2 GiB
    assert gpu.other_processes(found) == {900_001: 5 << 30}


@pytest.mark.gpu
def test_the_real_gpu_is_found_and_sampled() -> None:
    found = find()
    facts = environment()
    assert facts["gpu_uuid"].startswith(("GPU-", "MIG-"))
    assert str(torch.cuda.get_device_properties(0).uuid) in facts["gpu_uuid"] or facts["mig"] == "on"
    assert facts["driver"][0].isdigit()
    matrix = torch.randn(4096, 4096, device="cuda")
    with Watch("cuda") as watch:
        begin = time.perf_counter()
        while time.perf_counter() - begin < 2:
            matrix @ matrix
            torch.cuda.synchronize()
    seen = watch.during([(begin, time.perf_counter())])
    assert seen
    assert seen["samples"] >= 10
    assert 100 < seen["sm_clock_mhz"]["median"] < 5000
    assert 10 < seen["power_w"]["max"] < 3000
    assert 10 < seen["temperature_c"]["max"] < 110
    assert os.getpid() not in gpu.other_processes(found)
