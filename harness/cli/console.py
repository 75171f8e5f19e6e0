"""Progress in the terminal: a live line per run where there is a terminal, plain lines where there
is none.
"""

import sys
import time
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from harness.contract import Progress
from harness.escape import clean
from harness.planning.cells import PlannedCell
from harness.records import columns
from harness.records.record import TaskScore
from harness.running.runner import CellResult, RunCallbacks

SECONDS_BETWEEN_LINES = 15.0


class Console:
    """Shows cells, stage, speed and time left; writes to standard error, so that tables can be
    piped.
    """

    def __init__(self) -> None:
        self._live: Any = None
        self._task: Any = None
        self._stage = ""
        self._began = time.monotonic()
        self._stage_began = time.monotonic()
        self._stage_done = 0.0
        self._spoke = 0.0
        self._prefix = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._live = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                console=Terminal(stderr=True),
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task("starting", total=1, speed="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def callbacks(self) -> RunCallbacks:
        """Return the callbacks for the runner."""
        return RunCallbacks(
            on_start=self._begin,
            on_progress=lambda cell, one: self.progress(one),
            on_end=self._end,
            on_message=self.say,
        )

    def say(self, line: str) -> None:
        """Print a line that stays."""
        line = clean(line)
        if self._live:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _begin(self, cell: PlannedCell, number: int, total: int) -> None:
        seed = f" seed {cell.seed}" if cell.seed is not None else ""
        self._prefix = f"[{number}/{total}] {cell.label}{seed}"
        self._stage = ""
        self._began = time.monotonic()

    def _end(self, finished: CellResult) -> None:
        record = finished.record
        if record is None:
            outcome = f"left ({finished.note})"
        elif record.status != "success":
            outcome = f"{record.status}: {record.reason}"
        else:
            outcome = ", ".join(f"{score.task} {_value_of(score)}" for score in record.scores)
        when = "already finished" if finished.cached else f"{time.monotonic() - self._began:.0f} s"
        self.say(f"{self._prefix}: {outcome} ({when})")

    def progress(self, one: Progress) -> None:
        """Show one sign of life: a redrawn bar, or a line when the stage changes and every few
        seconds.
        """
        now, one = time.monotonic(), replace(one, detail=clean(one.detail))
        changed = one.stage + one.detail.partition(" ")[0] != self._stage
        if changed:
            self._stage, self._stage_began, self._stage_done = (
                one.stage + one.detail.partition(" ")[0],
                now,
                one.done,
            )
        speed = self._speed(one, now)
        if self._live:
            self._live.update(
                self._task,
                description=f"{self._prefix} {one.stage} {one.detail}",
                completed=one.done,
                total=one.total or 1,
                speed=speed,
            )
        elif changed or now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            share = f"{100 * one.done / one.total:.0f} %" if one.total else ""
            print(
                f"{self._prefix} {one.stage} {share} {speed} {one.detail}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def _speed(self, one: Progress, now: float) -> str:
        seconds, done = now - self._stage_began, one.done - self._stage_done
        if seconds < 0.5 or done <= 0 or not one.unit:
            return ""
        left = (one.total - one.done) * seconds / done
        return f"{done / seconds:,.0f} {one.unit}/s, {left:.0f} s left"


def _value_of(score: TaskScore) -> str:
    """Write a score with its unit: a share in per cent, a perplexity as it is."""
    return (
        columns.PERPLEXITY.text(score.value)
        if score.kind == "perplexity"
        else score.shown(score.value)
    )
