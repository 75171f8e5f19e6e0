"""Counts what a training takes into its state.

These are seconds and joules (without those of saving), the work of teachers, and the student's own
writing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from harness.machine.energy import EnergyMeter
from harness.machine.memory import process_bytes
from methods.training.state import LoopState
from methods.training.terms import Objective


class CostMeter:
    """Keeps a state's counts of cost up to date; an earlier process's counts stay in them."""

    def __init__(self, state: LoopState, objective: Objective, device: str) -> None:
        self.state, self.objective = state, objective
        self.resumed_state = replace(state)  # the counts with which this process began
        self.counted_until = time.monotonic()
        self.energy = EnergyMeter(device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Bring the counts up to date, and leave out of them what is done inside."""
        self.count()
        yield
        self.counted_until = time.monotonic()
        self.energy.joules()  # read and dropped

    def count(self) -> None:
        """Bring the counts up to date."""
        timestamp = time.monotonic()
        self.state.seconds += timestamp - self.counted_until
        self.counted_until = timestamp
        joules, total = self.energy.joules(), self.state.energy_joules
        self.state.energy_joules = None if joules is None or total is None else total + joules
        self._count_models()

    def _count_models(self) -> None:
        """Add what live teachers and the writing student counted in this process."""
        state, resumed = self.state, self.resumed_state
        teachers, rollout = self.objective.live_teachers, self.objective.rollout
        state.teacher_seconds = resumed.teacher_seconds + sum(
            teacher.seconds for teacher in teachers
        )
        state.teacher_tokens = resumed.teacher_tokens + sum(teacher.tokens for teacher in teachers)
        if rollout is not None:
            state.written = resumed.written + rollout.written
            state.writing_seconds = resumed.writing_seconds + rollout.seconds

    @property
    def energy_source(self) -> str:
        """Name the counter that the joules come from; "" where none could be read."""
        return self.energy.source if self.state.energy_joules is not None else ""


def peak_bytes(device: str) -> int | None:
    """Return the peak memory so far: allocated on a GPU, resident on a CPU; None if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return process_bytes("VmHWM")
