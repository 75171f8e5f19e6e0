"""NVML that is missing, broken or half there: nothing is read, and nothing fails."""

import sys
from types import SimpleNamespace

import pytest

from harness.machine.energy import EnergyMeter, NvmlReader
from harness.machine.monitor import InterferenceMonitor


def refuse(*_):
    """Fail as a library does whose driver was exchanged under it."""
    raise OSError("Driver/library version mismatch")


def library(**changes):
    """Return a module with those functions of pynvml that are used; `changes` replace some."""
    functions = {
        "NVMLError": type("NVMLError", (Exception,), {}),
        "NVML_PERF_POLICY_POWER": 0,
        "NVML_PERF_POLICY_THERMAL": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: "handle",
        "nvmlDeviceGetHandleByUUID": lambda name: "handle",
        "nvmlDeviceGetName": lambda handle: b"NVIDIA H100 80GB HBM3",
        "nvmlSystemGetDriverVersion": lambda: "580.159.04",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetViolationStatus": lambda handle, policy: SimpleNamespace(violationTime=7),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=11)],
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 3_000,
    }
    return SimpleNamespace(**{**functions, **changes})


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_a_library_that_does_not_start_is_none(name, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", library(**{name: refuse}))
    assert NvmlReader.open() is None
    meter = EnergyMeter("cuda")
    assert meter.joules() is None and meter.source == ""
    monitor = InterferenceMonitor(gpu=True)
    monitor.begin()
    assert not [reason for reason in monitor.end() if "GPU" in reason]


def test_each_reading_that_fails_is_left_out_and_the_others_stay(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    broken = {
        "nvmlSystemGetDriverVersion": refuse,
        "nvmlDeviceGetViolationStatus": refuse,
        "nvmlDeviceGetTotalEnergyConsumption": refuse,
    }
    monkeypatch.setitem(sys.modules, "pynvml", library(**broken))
    reader = NvmlReader.open()
    assert reader.identity() == {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
    sample = reader.sample()
    assert (sample.throttled, sample.processes) == ({}, frozenset({11}))
    assert reader.joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", library())
    reader = NvmlReader.open()
    assert reader.sample().throttled == {"power": 7, "heat": 7} and reader.joules() == 3.0
    assert reader.identity()["driver"] == "580.159.04"
