"""Progress in the terminal: a live bar in a terminal, plain lines elsewhere."""

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
    """Shows cells, stage, speed and time left.

    It writes to standard error, so that tables on standard output can be piped.
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
            on_progress=lambda cell, progress: self.progress(progress),
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

    def _end(self, result: CellResult) -> None:
        record = result.record
        if record is None:
            outcome = f"not computed ({result.note})"
        elif record.status != "success":
            outcome = f"{record.status}: {record.reason}"
        else:
            outcome = ", ".join(f"{score.task} {_value_of(score)}" for score in record.scores)
        when = "already finished" if result.cached else f"{time.monotonic() - self._began:.0f} s"
        self.say(f"{self._prefix}: {outcome} ({when})")

    def progress(self, progress: Progress) -> None:
        """Show progress: a redrawn bar, or a line at each new stage and every few seconds."""
        seconds, progress = time.monotonic(), replace(progress, detail=clean(progress.detail))
        changed = progress.stage + progress.detail.partition(" ")[0] != self._stage
        if changed:
            self._stage, self._stage_began, self._stage_done = (
                progress.stage + progress.detail.partition(" ")[0],
                seconds,
                progress.done,
            )
        speed = self._speed(progress, seconds)
        if self._live:
            self._live.update(
                self._task,
                description=f"{self._prefix} {progress.stage} {progress.detail}",
                completed=progress.done,
                total=progress.total or 1,
                speed=speed,
            )
        elif changed or seconds - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = seconds
            share = f"{100 * progress.done / progress.total:.0f} %" if progress.total else ""
            print(
                f"{self._prefix} {progress.stage} {share} {speed} {progress.detail}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def _speed(self, progress: Progress, current_seconds: float) -> str:
        seconds, done = current_seconds - self._stage_began, progress.done - self._stage_done
        if seconds < 0.5 or done <= 0 or not progress.unit:
            return ""
        seconds_left = (progress.total - progress.done) * seconds / done
        return f"{done / seconds:,.0f} {progress.unit}/s, {seconds_left:.0f} s left"


def _value_of(score: TaskScore) -> str:
    """Write a score with its unit: a share in per cent, a perplexity as it is."""
    return (
        columns.PERPLEXITY.text(score.value)
        if score.kind == "perplexity"
        else score.format_value(score.value)
    )
