"""How busy this machine is, and how our threads adapt to it. No torch.

Threads that meet at a barrier every few microseconds spin there, which is fast on an idle machine
and ruinous on a busy one: the thread that they wait for does not run while they burn its core. So
they wait passively unless the machine is idle. Their number decides the order of sums and stands in
keys, so it follows the model and never the load, which changes.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.machine.processor import CpuSeconds, allowed_cpus, cpu_seconds, thread_count

# Of a model. A thread with fewer waits longer than it works.
PARAMETERS_PER_THREAD = 500_000
IDLE_CORES = 0.25  # if others use more cores than this, the machine is busy
WINDOW_SECONDS = 0.25  # of one measurement of the load
# GNU's OpenMP reads the first and last, LLVM's the others.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
# Set beside these, so that a user's own settings are neither replaced nor removed.
_OUR_MARK = "HARNESS_WAITING"


@dataclass(frozen=True)
class MachineLoad:
    """How busy a machine is, without this process."""

    cores: int  # that we may use
    used: float | None  # cores that others use; None where the system does not tell

    @property
    def busy(self) -> bool:
        """Tell whether others use the machine; one that cannot tell is taken for idle."""
        return self.used is not None and self.used > IDLE_CORES

    @property
    def waiting(self) -> str:
        """How threads shall wait: `passive` on a busy machine, else `active`."""
        return "passive" if self.busy else "active"

    def __str__(self) -> str:
        if self.used is None:
            return f"{self.cores} cores"
        return f"{self.used:.1f} of {self.cores} cores in use"


UNKNOWN_LOAD = MachineLoad(1, None)


def measure_load(
    window: float = WINDOW_SECONDS,
    *,
    read: Callable[[set[int]], CpuSeconds] = cpu_seconds,
) -> MachineLoad:
    """Measure how busy the machine is while this process sleeps for `window` seconds."""
    cpus = allowed_cpus()
    before, start = read(cpus), time.monotonic()
    time.sleep(window)
    after, seconds = read(cpus), time.monotonic() - start
    if before.busy is None or after.busy is None or seconds <= 0:
        return MachineLoad(len(cpus), None)
    busy = after.busy - before.busy
    stolen = (after.stolen or 0.0) - (before.stolen or 0.0)
    return MachineLoad(len(cpus), max(0.0, (busy + stolen) / seconds))


def threads_for(parameters: int, *, cores: int | None = None) -> int:
    """Return how many threads compute a model: one for each half a million parameters.

    At most one a core. OMP_NUM_THREADS, where the user has set it, decides instead.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return thread_count()
    return max(
        1, min(parameters // PARAMETERS_PER_THREAD, physical_cores() if cores is None else cores)
    )


def physical_cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the physical cores that may be used, or the CPUs where the system does not tell."""
    cpus = allowed_cpus()
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add(
                (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
            )
        except OSError:
            return len(cpus)
    return len(siblings)


def waiting_variables(load: MachineLoad, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make a process's threads wait as the load demands.

    None where the user has already set one of them.
    """
    if not load.busy or any(name in environment for name in PASSIVE_WAITING):
        return {}
    return {**PASSIVE_WAITING, _OUR_MARK: "passive"}


def waiting_policy(environment: Mapping[str, str]) -> str:
    """Return how this process's threads wait, as we or the user have set it."""
    policy = environment.get("OMP_WAIT_POLICY", "").lower()
    return policy if policy in ("passive", "active") else "active"


def users_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that we have set.

    Timing keeps its own rule, however training's threads waited.
    """
    ours = {*PASSIVE_WAITING, _OUR_MARK} if _OUR_MARK in environment else set()
    return {name: value for name, value in environment.items() if name not in ours}
