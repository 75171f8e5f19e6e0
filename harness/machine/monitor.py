"""Watches what spoils a measurement (load by others, throttling, jumping clocks) and counts energy where a counter can be read.

Everything is read from the system, nothing is started: /proc and /sys on Linux, NVML through `pynvml` where it is installed.
What cannot be read is None or silent, never zero.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

FOREIGN_SHARE = 0.1  # of the CPUs we may use: more used by others makes a measurement dirty
STOLEN_SHARE = 0.05  # of the CPUs' time that a hypervisor gave to somebody else
CLOCK_JUMP = 0.5  # seconds between the wall clock and the steady one
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def device_bytes(device: str) -> int:
    """Return the memory that a device has in all: a GPU's own, or the machine's."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: str) -> int | None:
    """Return the memory that is free now, of the GPU or of the machine; None where nothing tells."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def threads_asked() -> int:
    """Return how many threads a computation here uses: OMP_NUM_THREADS, else the CPUs that may be used."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(told) if told.isascii() and told.isdigit() and int(told) else len(allowed_cpus())


@dataclass(frozen=True)
class _Sample:
    wall: float
    steady: float
    busy: float | None  # CPU seconds of everybody on our CPUs
    stolen: float | None
    own: float | None  # CPU seconds of the watched processes
    throttled: int | None  # events counted by the CPUs


@dataclass
class Watch:
    """One watched stretch of time: `begin`, then `end` for the reasons why it is dirty, "" where there is none."""

    processes: Iterable[int] = ()
    gpu: bool = False
    _before: _Sample | None = field(default=None, init=False)
    _nvml: "Nvml | None" = field(default=None, init=False)
    _gpu_before: tuple[dict[str, int], frozenset[int]] | None = field(default=None, init=False)

    def begin(self) -> None:
        """Take the readings that `end` compares with."""
        self._nvml = Nvml.open() if self.gpu else None
        self._gpu_before = self._nvml.sample() if self._nvml else None
        self._before = self._sample()

    def end(self) -> tuple[str, ...]:
        """Return what happened since `begin` that makes a timing doubtful."""
        before, after = self._before, self._sample()
        assert before is not None, "end() without begin()"
        found: list[str] = []
        passed = after.steady - before.steady
        if abs((after.wall - before.wall) - passed) > CLOCK_JUMP:
            found.append(f"the clock jumped by {after.wall - before.wall - passed:+.1f} s")
        cpus = len(allowed_cpus())
        if passed > 0 and before.busy is not None and after.busy is not None and before.own is not None and after.own is not None:
            foreign = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / passed
            if foreign > FOREIGN_SHARE * cpus:
                found.append(f"other processes used {foreign:.1f} of {cpus} cores")
        if passed > 0 and before.stolen is not None and after.stolen is not None:
            stolen = (after.stolen - before.stolen) / passed
            if stolen > STOLEN_SHARE * cpus:
                found.append(f"the hypervisor took {stolen:.1f} of {cpus} cores")
        if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
            found.append(f"the CPU throttled {after.throttled - before.throttled} times")
        if self._nvml is not None and self._gpu_before is not None:
            found += self._nvml.complaints(self._gpu_before, self._nvml.sample(), {os.getpid(), *self.processes})
        return tuple(found)

    def _sample(self) -> _Sample:
        busy, stolen = cpu_seconds(allowed_cpus())
        own = [process_seconds(pid) for pid in {os.getpid(), *self.processes}]
        return _Sample(time.time(), time.monotonic(), busy, stolen, sum(one for one in own if one is not None), throttle_events())


def cpu_seconds(cpus: set[int], stat: Path = Path("/proc/stat")) -> tuple[float | None, float | None]:
    """Return (busy, stolen) CPU seconds since boot on the given CPUs; (None, None) where the system does not tell."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None, None
    busy = stolen = 0.0
    for line in lines:
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in values[:8])
            busy += (user + nice + system + irq + softirq) / _TICK
            stolen += steal / _TICK
    return busy, stolen


def process_seconds(pid: int) -> float | None:
    """Return the CPU seconds of a process, its finished children included; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(int(fields[at]) for at in (11, 12, 13, 14)) / _TICK


def throttle_events(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Return how often the CPUs throttled since boot; None where no counter can be read."""
    counts = []
    for path in root.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            counts.append(int(path.read_text()))
    return sum(counts) if counts else None


class Nvml:
    """The few readings of NVML that matter here, of the first visible GPU."""

    _VIOLATIONS: ClassVar = {"power": "NVML_PERF_POLICY_POWER", "heat": "NVML_PERF_POLICY_THERMAL"}

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(cls) -> "Nvml | None":
        """Return NVML's readings, None where the package or a GPU is missing."""
        try:
            import pynvml as library
        except ImportError:
            return None
        try:
            library.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            by_name = not (visible.isascii() and visible.isdigit())
            handle = library.nvmlDeviceGetHandleByUUID(visible) if by_name else library.nvmlDeviceGetHandleByIndex(int(visible))
        except library.NVMLError:
            return None
        return cls(library, handle)

    def identity(self) -> dict[str, str]:
        """Return the GPU's name, its driver and its compute capability, as far as NVML says them; no context is made."""
        readings = {
            "name": lambda: self.library.nvmlDeviceGetName(self.handle),
            "driver": self.library.nvmlSystemGetDriverVersion,
            "capability": lambda: ".".join(map(str, self.library.nvmlDeviceGetCudaComputeCapability(self.handle))),
        }
        told: dict[str, str] = {}
        for word, reading in readings.items():
            with contextlib.suppress(self.library.NVMLError, AttributeError):
                value = reading()
                told[word] = value.decode() if isinstance(value, bytes) else str(value)
        return told

    def sample(self) -> tuple[dict[str, int], frozenset[int]]:
        """Return the nanoseconds for which the GPU has been held back, by cause, and the processes on it."""
        held: dict[str, int] = {}
        for word, name in self._VIOLATIONS.items():
            with contextlib.suppress(self.library.NVMLError, AttributeError):
                held[word] = int(self.library.nvmlDeviceGetViolationStatus(self.handle, getattr(self.library, name)).violationTime)
        found: frozenset[int] = frozenset()
        with contextlib.suppress(self.library.NVMLError):
            found = frozenset(one.pid for one in self.library.nvmlDeviceGetComputeRunningProcesses(self.handle))
        return held, found

    @staticmethod
    def complaints(before: tuple[dict[str, int], frozenset[int]], after: tuple[dict[str, int], frozenset[int]], own: set[int]) -> list[str]:
        """Compare two samples. In a container NVML may name processes by the host's numbers: then they are only counted."""
        found = [
            f"{word} held the GPU back for {(after[0][word] - nanoseconds) / 1e9:.1f} s"
            for word, nanoseconds in before[0].items() if after[0].get(word, nanoseconds) > nanoseconds
        ]  # fmt: skip
        seen = before[1] | after[1]
        foreign = len(seen - own) if seen & own else max(len(before[1]) - len(own), 0) + len(after[1] - before[1])
        return found + ([f"{foreign} other processes were on the GPU"] if foreign else [])

    def joules(self) -> float | None:
        """Return the energy that the GPU has used since its driver was loaded; None on GPUs that do not count."""
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except self.library.NVMLError:
            return None


def rapl_joules(root: Path = Path("/sys/class/powercap")) -> float | None:
    """Return the CPU packages' energy counters in joules (they wrap); None where they cannot be read (often: not by users)."""
    found: list[float] = []
    for zone in root.glob("intel-rapl:[0-9]*"):
        if zone.name.count(":") == 1:  # packages, not their parts
            with contextlib.suppress(OSError, ValueError):
                found.append(int((zone / "energy_uj").read_text()) / 1e6)
    return sum(found) if found else None


class EnergyMeter:
    """Joules by NVML's counter on a GPU, by RAPL's on a CPU; None where it cannot be read: a CPU's joules are not those of a GPU."""

    def __init__(self, device: str) -> None:
        on_gpu = device.startswith("cuda")
        self._nvml = Nvml.open() if on_gpu else None
        self.source = "NVML" if self._nvml else "" if on_gpu else "RAPL"
        self._before = self._read()

    def _read(self) -> float | None:
        if self._nvml:
            return self._nvml.joules()
        return rapl_joules() if self.source else None

    def joules(self) -> float | None:
        """Return the energy since this was last asked, or since the start; None where it was not counted, or the counter wrapped."""
        before, self._before = self._before, self._read()
        return None if self._before is None or before is None or self._before < before else self._before - before
