"""What else this machine does, and how our threads take it: their number follows the model, how
they wait follows the load. No torch.

Threads that meet at a barrier every few microseconds spin there, which is fast on an idle machine
and ruinous on a busy one: the thread that they wait for does not run while they burn its core. So
they wait passively unless the machine is idle. How many they are decides the order of sums and
stands in keys: it must not follow a load that is another one tomorrow.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.machine.processor import allowed_cpus, cpu_seconds, thread_count

PARAMETERS_PER_THREAD = 500_000  # of a model: below it, a second thread waits longer than it works
IDLE_CORES = 0.25  # cores that others may use: beyond it the machine is busy
WINDOW_SECONDS = 0.25  # seconds of one look at the machine
PASSIVE_WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
}  # GNU's OpenMP reads the first and last, LLVM's the others
# set beside them: a user's own settings are neither replaced nor taken away
_OUR_MARK = "HARNESS_WAITING"


@dataclass(frozen=True)
class MachineLoad:
    """How busy a machine is, this process not counted."""

    cores: int  # that may be used
    used: float | None  # cores that are busy; None where the system does not tell

    @property
    def busy(self) -> bool:
        """Tell whether others use the machine; one that does not tell is taken for idle, as it was
        before anybody looked.
        """
        return self.used is not None and self.used > IDLE_CORES

    @property
    def waiting(self) -> str:
        """How threads shall wait: `passive` on a busy machine, else `active`."""
        return "passive" if self.busy else "active"

    def __str__(self) -> str:
        return (
            f"{self.used:.1f} of {self.cores} cores in use"
            if self.used is not None
            else f"{self.cores} cores"
        )


UNKNOWN_LOAD = MachineLoad(1, None)


def measure_load(
    window: float = WINDOW_SECONDS,
    *,
    read: Callable[[set[int]], tuple[float | None, float | None]] = cpu_seconds,
) -> MachineLoad:
    """Look at the machine for a moment, in which this process sleeps: what is busy then is somebody
    else's.
    """
    cpus = allowed_cpus()
    before, began = read(cpus), time.monotonic()
    time.sleep(window)
    after, passed = read(cpus), time.monotonic() - began
    if before[0] is None or after[0] is None or passed <= 0:
        return MachineLoad(len(cpus), None)
    # by others here, and by other machines
    taken = sum((now or 0.0) - (then or 0.0) for then, now in zip(before, after, strict=True))
    return MachineLoad(len(cpus), max(0.0, taken / passed))


def threads_for(parameters: int, *, cores: int | None = None) -> int:
    """Return how many threads compute a model: one for each half a million parameters, at most a
    core each.

    OMP_NUM_THREADS, where the user has set it, decides instead.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return thread_count()
    return max(
        1, min(parameters // PARAMETERS_PER_THREAD, physical_cores() if cores is None else cores)
    )


def physical_cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the cores that may be used, each counted once however many threads it runs; the CPUs
    where the system does not tell.
    """
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
    """Return the variables by which a process's threads wait as the load wants; none where the user
    has said how they shall.
    """
    if not load.busy or any(name in environment for name in PASSIVE_WAITING):
        return {}
    return {**PASSIVE_WAITING, _OUR_MARK: "passive"}


def waiting_policy(environment: Mapping[str, str]) -> str:
    """Return how this process's threads wait: as we, or the user, have set it."""
    told = environment.get("OMP_WAIT_POLICY", "").lower()
    return told if told in ("passive", "active") else "active"


def users_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as the user gave it: timing keeps its own rule, whatever training
    waited like.
    """
    drop = {*PASSIVE_WAITING, _OUR_MARK} if _OUR_MARK in environment else set()
    return {name: value for name, value in environment.items() if name not in drop}
