"""Joules, by NVML's counter on a GPU and by RAPL's on a CPU; None where neither can be read."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

# Share of the time between two samples for which a GPU may be held back before that is said. A card
# at its power limit is held back for moments of any heavy work; so short they change no figure.
HELD_BACK_SHARE = 0.05


class GpuSample(NamedTuple):
    """What NVML says of a GPU at one time."""

    throttled: dict[str, int]  # nanoseconds since boot, by cause
    processes: frozenset[int]  # ids of the processes on it
    steady: float = 0.0  # seconds of the steady clock


class NvmlReader:
    """The few readings of NVML that are needed here, of the first visible GPU."""

    _VIOLATIONS: ClassVar = {"power": "NVML_PERF_POLICY_POWER", "heat": "NVML_PERF_POLICY_THERMAL"}

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(cls) -> "NvmlReader | None":
        """Return a reader of NVML, None where its package or a GPU is missing, or it fails.

        Whatever it raises, no row fails for a reading that nobody needs for its scores.
        """
        try:
            import pynvml as library
        except Exception:  # noqa: BLE001  a package for another system may raise anything
            return None
        try:
            library.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            by_name = not (visible.isascii() and visible.isdigit())
            handle = (
                library.nvmlDeviceGetHandleByUUID(visible)
                if by_name
                else library.nvmlDeviceGetHandleByIndex(int(visible))
            )
        except Exception:  # noqa: BLE001  so may a driver that was exchanged under it
            return None
        return cls(library, handle)

    def identity(self) -> dict[str, str]:
        """Return the GPU's name, driver and compute capability, as far as NVML knows them.

        No CUDA context is made.
        """
        readings = {
            "name": lambda: self.library.nvmlDeviceGetName(self.handle),
            "driver": self.library.nvmlSystemGetDriverVersion,
            "capability": lambda: ".".join(
                map(str, self.library.nvmlDeviceGetCudaComputeCapability(self.handle))
            ),
        }
        identity: dict[str, str] = {}
        for name, reading in readings.items():
            with contextlib.suppress(Exception):
                value = reading()
                identity[name] = value.decode() if isinstance(value, bytes) else str(value)
        return identity

    def memory_bytes(self) -> int | None:
        """Return the GPU's memory; None of a GPU in parts (MIG), and where NVML does not tell."""
        try:
            parted = self.library.nvmlDeviceGetMigMode(self.handle)[0]
        except (self.library.NVMLError, AttributeError):
            parted = 0  # a GPU that cannot be parted
        if parted:
            return None
        try:
            return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).total)
        except (self.library.NVMLError, AttributeError):
            return None

    def sample(self) -> GpuSample:
        """Return for how long the GPU was throttled so far, and which processes are on it."""
        throttled: dict[str, int] = {}
        for cause, name in self._VIOLATIONS.items():
            with contextlib.suppress(Exception):
                policy = getattr(self.library, name)
                status = self.library.nvmlDeviceGetViolationStatus(self.handle, policy)
                throttled[cause] = int(status.violationTime)
        processes: frozenset[int] = frozenset()
        with contextlib.suppress(Exception):
            running = self.library.nvmlDeviceGetComputeRunningProcesses(self.handle)
            processes = frozenset(process.pid for process in running)
        return GpuSample(throttled, processes, time.monotonic())

    @staticmethod
    def interference(before: GpuSample, after: GpuSample, our_pids: set[int]) -> list[str]:
        """Return what disturbed our processes on the GPU between two samples.

        Being held back counts from a twentieth of the time between them (`HELD_BACK_SHARE`). In a
        container NVML may name processes by the host's ids. Then they are only counted.
        """
        held_back = {
            cause: (after.throttled.get(cause, nanoseconds) - nanoseconds) / 1e9
            for cause, nanoseconds in before.throttled.items()
        }
        reasons = [
            f"{cause} held the GPU back for {seconds:.1f} s"
            for cause, seconds in held_back.items()
            if seconds > HELD_BACK_SHARE * (after.steady - before.steady)
        ]
        processes = before.processes | after.processes
        if processes & our_pids:
            foreign = len(processes - our_pids)
        else:
            started = len(after.processes - before.processes)
            foreign = max(len(before.processes) - len(our_pids), 0) + started
        if foreign:
            reasons.append(f"{foreign} other processes were on the GPU")
        return reasons

    def joules(self) -> float | None:
        """Return the GPU's energy since its driver was loaded, None if it does not count it."""
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except Exception:  # noqa: BLE001  the counter is missing, or what reads it is broken
            return None


def rapl_joules(root: Path = Path("/sys/class/powercap")) -> float | None:
    """Return the CPU packages' energy counters in joules, None where they cannot be read.

    They wrap around, and many systems let only root read them.
    """
    joules: list[float] = []
    for zone in root.glob("intel-rapl:[0-9]*"):
        if zone.name.count(":") == 1:  # packages, not their parts
            with contextlib.suppress(OSError, ValueError):
                joules.append(int((zone / "energy_uj").read_text()) / 1e6)
    return sum(joules) if joules else None


class EnergyMeter:
    """Joules by NVML's counter on a GPU, by RAPL's on a CPU; None where it cannot be read.

    A GPU's run never falls back to the CPU's counter.
    """

    def __init__(self, device: str) -> None:
        on_gpu = device.startswith("cuda")
        self._nvml = NvmlReader.open() if on_gpu else None
        self.source = "NVML" if self._nvml else "" if on_gpu else "RAPL"
        self._before = self._read()

    def _read(self) -> float | None:
        if self._nvml:
            return self._nvml.joules()
        return rapl_joules() if self.source else None

    def joules(self) -> float | None:
        """Return the energy since the last call, or since the start.

        None where it was not counted, or the counter wrapped around.
        """
        before, self._before = self._before, self._read()
        return (
            None
            if self._before is None or before is None or self._before < before
            else self._before - before
        )
