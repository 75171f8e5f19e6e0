"""Joules, by NVML's counter on a GPU and by RAPL's on a CPU; None where neither can be read."""

import contextlib
import os
from pathlib import Path
from typing import Any, ClassVar


class NvmlReader:
    """The few readings of NVML that matter here, of the first visible GPU."""

    _VIOLATIONS: ClassVar = {"power": "NVML_PERF_POLICY_POWER", "heat": "NVML_PERF_POLICY_THERMAL"}

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(cls) -> "NvmlReader | None":
        """Return NVML's readings, None where the package or a GPU is missing."""
        try:
            import pynvml as library
        except ImportError:
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
        except library.NVMLError:
            return None
        return cls(library, handle)

    def identity(self) -> dict[str, str]:
        """Return the GPU's name, its driver and its compute capability, as far as NVML says them;
        no context is made.
        """
        readings = {
            "name": lambda: self.library.nvmlDeviceGetName(self.handle),
            "driver": self.library.nvmlSystemGetDriverVersion,
            "capability": lambda: ".".join(
                map(str, self.library.nvmlDeviceGetCudaComputeCapability(self.handle))
            ),
        }
        told: dict[str, str] = {}
        for word, reading in readings.items():
            with contextlib.suppress(self.library.NVMLError, AttributeError):
                value = reading()
                told[word] = value.decode() if isinstance(value, bytes) else str(value)
        return told

    def sample(self) -> tuple[dict[str, int], frozenset[int]]:
        """Return the nanoseconds for which the GPU has been held back, by cause, and the processes
        on it.
        """
        held: dict[str, int] = {}
        for word, name in self._VIOLATIONS.items():
            with contextlib.suppress(self.library.NVMLError, AttributeError):
                held[word] = int(
                    self.library.nvmlDeviceGetViolationStatus(
                        self.handle, getattr(self.library, name)
                    ).violationTime
                )
        found: frozenset[int] = frozenset()
        with contextlib.suppress(self.library.NVMLError):
            found = frozenset(
                one.pid for one in self.library.nvmlDeviceGetComputeRunningProcesses(self.handle)
            )
        return held, found

    @staticmethod
    def complaints(
        before: tuple[dict[str, int], frozenset[int]],
        after: tuple[dict[str, int], frozenset[int]],
        own: set[int],
    ) -> list[str]:
        """Compare two samples. In a container NVML may name processes by the host's numbers: then
        they are only counted.
        """
        found = [
            f"{word} held the GPU back for {(after[0][word] - nanoseconds) / 1e9:.1f} s"
            for word, nanoseconds in before[0].items()
            if after[0].get(word, nanoseconds) > nanoseconds
        ]
        seen = before[1] | after[1]
        foreign = (
            len(seen - own)
            if seen & own
            else max(len(before[1]) - len(own), 0) + len(after[1] - before[1])
        )
        return found + ([f"{foreign} other processes were on the GPU"] if foreign else [])

    def joules(self) -> float | None:
        """Return the energy that the GPU has used since its driver was loaded; None on GPUs that do
        not count.
        """
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except self.library.NVMLError:
            return None


def rapl_joules(root: Path = Path("/sys/class/powercap")) -> float | None:
    """Return the CPU packages' energy counters in joules (they wrap); None where they cannot be
    read (often: not by users).
    """
    found: list[float] = []
    for zone in root.glob("intel-rapl:[0-9]*"):
        if zone.name.count(":") == 1:  # packages, not their parts
            with contextlib.suppress(OSError, ValueError):
                found.append(int((zone / "energy_uj").read_text()) / 1e6)
    return sum(found) if found else None


class EnergyMeter:
    """Joules by NVML's counter on a GPU, by RAPL's on a CPU; None where it cannot be read: a CPU's
    joules are not those of a GPU.
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
        """Return the energy since this was last asked, or since the start; None where it was not
        counted, or the counter wrapped.
        """
        before, self._before = self._before, self._read()
        return (
            None
            if self._before is None or before is None or self._before < before
            else self._before - before
        )
