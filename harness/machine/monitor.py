"""Watches for what spoils a measurement: load by others, throttling, clock jumps.

Everything is read from the system, nothing is started: /proc and /sys on Linux, NVML through
`pynvml` where it is installed. What cannot be read is None or silent, never zero.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.machine.energy import GpuSample, NvmlReader
from harness.machine.processor import allowed_cpus, cpu_seconds, process_seconds, throttle_events

# What makes a measurement doubtful, if it is exceeded.
FOREIGN_SHARE = 0.1  # of the CPUs we may use, used by others
STOLEN_SHARE = 0.05  # of the CPUs' time, given to others by a hypervisor
CLOCK_JUMP = 0.5  # seconds by which the wall clock and the steady one differ


@dataclass(frozen=True)
class _MachineSample:
    """What was read at one time: clocks and CPU times in seconds, None where unreadable."""

    wall: float
    steady: float
    busy: float | None  # of all processes on our CPUs
    stolen: float | None  # by a hypervisor
    own: float | None  # of the watched processes
    throttled: int | None  # events counted by the CPUs


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


@dataclass
class InterferenceMonitor:
    """Watches for interference between `begin` and `end`."""

    processes: Iterable[int] = ()
    gpu: bool = False
    _before: _MachineSample | None = field(default=None, init=False)
    _nvml: "NvmlReader | None" = field(default=None, init=False)
    _gpu_before: GpuSample | None = field(default=None, init=False)

    def begin(self) -> None:
        """Take the readings that `end` compares with."""
        self._nvml = NvmlReader.open() if self.gpu else None
        self._gpu_before = self._nvml.sample() if self._nvml else None
        self._before = self._sample()

    def end(self) -> tuple[str, ...]:
        """Return what happened since `begin` that makes a timing doubtful; empty for nothing."""
        before, after = self._before, self._sample()
        assert before is not None, "end() without begin()"
        reasons: list[str] = []
        seconds = after.steady - before.steady
        if abs((after.wall - before.wall) - seconds) > CLOCK_JUMP:
            reasons.append(f"the clock jumped by {after.wall - before.wall - seconds:+.1f} s")
        cpus = len(allowed_cpus())
        busy, ours = _change(before.busy, after.busy), _change(before.own, after.own)
        if seconds > 0 and busy is not None and ours is not None:
            foreign = max(0.0, busy - ours) / seconds
            if foreign > FOREIGN_SHARE * cpus:
                reasons.append(f"other processes used {foreign:.1f} of {cpus} cores")
        stolen = _change(before.stolen, after.stolen)
        if seconds > 0 and stolen is not None and stolen / seconds > STOLEN_SHARE * cpus:
            reasons.append(f"the hypervisor took {stolen / seconds:.1f} of {cpus} cores")
        throttled = _change(before.throttled, after.throttled)
        if throttled is not None and throttled > 0:
            reasons.append(f"the CPU throttled {throttled} times")
        if self._nvml is not None and self._gpu_before is not None:
            pids = {os.getpid(), *self.processes}
            reasons += self._nvml.interference(self._gpu_before, self._nvml.sample(), pids)
        return tuple(reasons)

    def _sample(self) -> _MachineSample:
        """Read the clocks and counters once."""
        cpu = cpu_seconds(allowed_cpus())
        our_seconds = [process_seconds(pid) for pid in {os.getpid(), *self.processes}]
        return _MachineSample(
            wall=time.time(),
            steady=time.monotonic(),
            busy=cpu.busy,
            stolen=cpu.stolen,
            own=sum(seconds for seconds in our_seconds if seconds is not None),
            throttled=throttle_events(),
        )
