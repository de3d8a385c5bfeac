"""What went on while something was timed, and when that makes the numbers doubtful."""

import subprocess
import sys
import time
from typing import Any

import psutil
import pynvml
import pytest
from fake_nvml import install

from obsdiff.measure import conditions
from obsdiff.measure.conditions import Watch


def times(time: float, busy: float, own: float) -> dict[str, Any]:
    return {"time": time, "busy": busy, "own": own, "load": [0.5, 0.4, 0.3]}


@pytest.mark.parametrize(("others", "warned"), [(0.0, False), (0.04, False), (0.5, True)])
def test_a_share_of_the_cores_is_what_others_used(monkeypatch: pytest.MonkeyPatch, others: float, warned: bool) -> None:
    cores = psutil.cpu_count()
    both = iter([times(100, 1000, 50), times(110, 1000 + 7 + others * 10 * cores, 57)])
    monkeypatch.setattr(conditions, "_times", lambda: next(both))
    with Watch("cpu") as watch:
        pass
    found = watch.conditions()
    assert found["seconds"] == 10
    assert found["others_cpu_share"] == pytest.approx(others)
    assert found["load_average"] == {"start": [0.5, 0.4, 0.3], "end": [0.5, 0.4, 0.3]}
    assert "gpu" not in found
    warnings = watch.warnings([None])
    assert bool(warnings) == warned
    assert not warned or "other processes kept 50% of the cores busy" in warnings[0]


def test_the_work_of_another_process_is_seen() -> None:
    with Watch("cpu") as watch:
        code = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
        subprocess.run([sys.executable, "-c", code], check=True)
    found = watch.conditions()
    assert found["others_cpu_share"] * found["seconds"] * psutil.cpu_count() > 0.35


def test_a_gpu_is_sampled_for_each_row_and_what_is_odd_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch)
    monkeypatch.setattr(conditions, "PAUSE", 0.002)
    spans = []
    with Watch("cuda") as watch:
        for clock in (1980, 1700):
            nvml.clocks[pynvml.NVML_CLOCK_SM] = clock
            time.sleep(0.01)
            begin = time.perf_counter()
            time.sleep(0.05)
            spans.append([(begin, time.perf_counter())])
        nvml.reasons = pynvml.nvmlClocksEventReasonHwThermalSlowdown
        nvml.processes[4711] = 1 << 30
        time.sleep(0.2)
    rows = [watch.during(span) for span in spans]
    assert [row["sm_clock_mhz"]["median"] for row in rows if row] == [1980, 1700]
    assert watch.during([(0, 1)]) is None
    found = watch.conditions()["gpu"]
    assert found["sm_clock_mhz"]["min"] == 1700
    assert found["other_processes"] == {"4711": 1 << 30}
    drift, throttle, process = watch.warnings(rows)
    assert "from 1700 to 1980 MHz" in drift
    assert throttle == "the GPU lowered its clocks: heat (hardware)"
    assert process == "other processes were on the GPU: 4711 (1024 MiB)"


def test_a_quiet_gpu_is_no_cause_for_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with Watch("cuda") as watch:
        time.sleep(0.06)
    assert watch.conditions()["gpu"]["samples"] >= 1
    assert watch.warnings([watch.during([(0, time.perf_counter())])]) == []
