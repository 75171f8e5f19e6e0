"""The processors of this machine: their kind, which of them we may use, and the seconds that they
spent.
"""

import contextlib
import os
import platform
import sys
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def thread_count() -> int:
    """Return how many threads a computation here uses: OMP_NUM_THREADS, else the CPUs that may be
    used.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(told) if told.isascii() and told.isdigit() and int(told) else len(allowed_cpus())


def cpu_seconds(
    cpus: set[int], stat: Path = Path("/proc/stat")
) -> tuple[float | None, float | None]:
    """Return (busy, stolen) CPU seconds since boot on the given CPUs; (None, None) where the system
    does not tell.
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None, None
    busy = stolen = 0.0
    for line in lines:
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (
                int(value) for value in values[:8]
            )
            busy += (user + nice + system + irq + softirq) / _TICKS_PER_SECOND
            stolen += steal / _TICKS_PER_SECOND
    return busy, stolen


def process_seconds(pid: int) -> float | None:
    """Return the CPU seconds of a process, its finished children included; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(int(fields[at]) for at in (11, 12, 13, 14)) / _TICKS_PER_SECOND


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
    """Return the kind of machine, never its name: processor, its instruction sets that count,
    cores.
    """
    return f"{processor_label()}, {os.cpu_count()} cores"


def processor_label() -> str:
    """Return the kind of processor and its instruction sets that count; never a machine's name."""
    known = (
        parse_processor(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if sys.platform == "linux"
        else ""
    )
    return known or platform.processor() or platform.machine()


def parse_processor(cpuinfo: str) -> str:
    """Return the same from what Linux tells of its first processor; "" where it names neither model
    nor instructions.
    """
    told = {
        key.strip(): value.strip()
        for key, _, value in (
            line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines()
        )
    }
    has = (told.get("flags") or told.get("Features") or "").split()
    known = " ".join(one for one in _INSTRUCTIONS if one in has)
    name = told.get("model name") or (platform.machine() if known else "")
    return f"{name} ({known})" if known else name
