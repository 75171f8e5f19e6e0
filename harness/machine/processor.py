"""The processors of this machine: their kind, which ones we may use, and their CPU seconds."""

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def thread_count() -> int:
    """Return how many threads a computation uses: OMP_NUM_THREADS, else the CPUs we may use."""
    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return (
        int(variable)
        if variable.isascii() and variable.isdigit() and int(variable)
        else len(allowed_cpus())
    )


class CpuSeconds(NamedTuple):
    """CPU seconds since boot, None where they cannot be read."""

    busy: float | None
    stolen: float | None  # by a hypervisor, for other machines


def cpu_seconds(cpus: set[int], stat: Path = Path("/proc/stat")) -> CpuSeconds:
    """Return the CPU seconds since boot on these CPUs, each None where it cannot be read."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return CpuSeconds(None, None)
    busy = stolen = 0.0
    for line in lines:
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (
                int(value) for value in values[:8]
            )
            busy += (user + nice + system + irq + softirq) / _TICKS_PER_SECOND
            stolen += steal / _TICKS_PER_SECOND
    return CpuSeconds(busy, stolen)


def process_seconds(pid: int) -> float | None:
    """Return the CPU seconds of a process, its finished children included; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(int(fields[index]) for index in (11, 12, 13, 14)) / _TICKS_PER_SECOND


def throttle_events(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Return how often the CPUs throttled since boot; None where no counter can be read."""
    counts = []
    for path in root.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            counts.append(int(path.read_text()))
    return sum(counts) if counts else None


# What decides how fast a product of matrices is, from the oldest to the newest: two processors of
# one name may differ in them.
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def machine_label() -> str:
    """Return the kind of machine, never its name: processor, instruction sets, cores."""
    return f"{processor_label()}, {os.cpu_count()} cores"


def processor_label() -> str:
    """Return the kind of processor and its fast instruction sets; never a machine's name."""
    label = (
        parse_processor(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if sys.platform == "linux"
        else ""
    )
    return label or platform.processor() or platform.machine()


def parse_processor(cpuinfo: str) -> str:
    """Return the processor label from Linux's `cpuinfo`, "" where it names no processor."""
    fields = {
        key.strip(): value.strip()
        for key, _, value in (
            line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines()
        )
    }
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    instructions = " ".join(name_of_set for name_of_set in _INSTRUCTIONS if name_of_set in flags)
    name = fields.get("model name") or (platform.machine() if instructions else "")
    return f"{name} ({instructions})" if instructions else name
