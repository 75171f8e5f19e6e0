"""Watches what spoils a measurement: load by others, throttling, jumping clocks.

Everything is read from the system, nothing is started: /proc and /sys on Linux, NVML through
`pynvml` where it is installed. What cannot be read is None or silent, never zero.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.machine.energy import NvmlReader
from harness.machine.processor import allowed_cpus, cpu_seconds, process_seconds, throttle_events

FOREIGN_SHARE = 0.1  # of the CPUs we may use: more used by others makes a measurement dirty
STOLEN_SHARE = 0.05  # of the CPUs' time that a hypervisor gave to somebody else
CLOCK_JUMP = 0.5  # seconds between the wall clock and the steady one


@dataclass(frozen=True)
class _MachineSample:
    wall: float
    steady: float
    busy: float | None  # CPU seconds of everybody on our CPUs
    stolen: float | None
    own: float | None  # CPU seconds of the watched processes
    throttled: int | None  # events counted by the CPUs


@dataclass
class InterferenceMonitor:
    """One watched stretch of time: `begin`, then `end` for the reasons why it is dirty, "" where
    there is none.
    """

    processes: Iterable[int] = ()
    gpu: bool = False
    _before: _MachineSample | None = field(default=None, init=False)
    _nvml: "NvmlReader | None" = field(default=None, init=False)
    _gpu_before: tuple[dict[str, int], frozenset[int]] | None = field(default=None, init=False)

    def begin(self) -> None:
        """Take the readings that `end` compares with."""
        self._nvml = NvmlReader.open() if self.gpu else None
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
        if (
            passed > 0
            and before.busy is not None
            and after.busy is not None
            and before.own is not None
            and after.own is not None
        ):
            foreign = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / passed
            if foreign > FOREIGN_SHARE * cpus:
                found.append(f"other processes used {foreign:.1f} of {cpus} cores")
        if passed > 0 and before.stolen is not None and after.stolen is not None:
            stolen = (after.stolen - before.stolen) / passed
            if stolen > STOLEN_SHARE * cpus:
                found.append(f"the hypervisor took {stolen:.1f} of {cpus} cores")
        if (
            before.throttled is not None
            and after.throttled is not None
            and after.throttled > before.throttled
        ):
            found.append(f"the CPU throttled {after.throttled - before.throttled} times")
        if self._nvml is not None and self._gpu_before is not None:
            found += self._nvml.complaints(
                self._gpu_before, self._nvml.sample(), {os.getpid(), *self.processes}
            )
        return tuple(found)

    def _sample(self) -> _MachineSample:
        busy, stolen = cpu_seconds(allowed_cpus())
        own = [process_seconds(pid) for pid in {os.getpid(), *self.processes}]
        return _MachineSample(
            time.time(),
            time.monotonic(),
            busy,
            stolen,
            sum(one for one in own if one is not None),
            throttle_events(),
        )
