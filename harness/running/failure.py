"""Why a cell, or an optional part of it, came to nothing: one line for the table, a traceback for
the record. No torch.
"""

import traceback
from pathlib import Path
from typing import NamedTuple

from harness.errors import CellFailed, HarnessError, says_no_memory
from harness.files.places import no_space_message
from harness.running.job import CellJob


class Failure(NamedTuple):
    """What a record says of an exception."""

    reason: str  # one line
    trace: str  # "" where the reason says everything


def failure_of(job: CellJob, problem: Exception) -> Failure:
    """Return what a record says of an exception that is being handled: lack of space and of memory
    with what to do about it.
    """
    if isinstance(problem, (CellFailed, HarnessError)):
        return Failure(str(problem), "")
    if full := no_space_message(problem, _output_folders(job)):
        return Failure(f"{full}; free some and run again", "")
    if isinstance(problem, MemoryError) or says_no_memory(str(problem)):
        message = " ".join(str(problem).split())[:300]
        return Failure(f"out of memory {_what_ran_out(job)} ({message})", traceback.format_exc())
    message = str(problem).strip()
    return Failure(
        f"{type(problem).__name__}: {message.splitlines()[0] if message else 'no message'}",
        traceback.format_exc(),
    )


def _output_folders(job: CellJob) -> dict[str, Path]:
    """Return the folders that a cell writes to, by what the user calls them."""
    return {"--out": job.cell_folder, "--cache": job.cache}


def _what_ran_out(job: CellJob) -> str:
    """Say what a cell that ran out of memory was at, and what makes that smaller: the first stage
    without a student, else scoring.
    """
    unmade = (
        stage
        for stage, folder in zip(job.cell.stages, job.stage_folders, strict=True)
        if not (folder / "done.json").exists()
    )
    stage = next(unmade, None)
    if stage is None:
        return "in scoring; type a smaller --batch-size"
    if not stage.trains:
        return f"in {stage.method}; give a smaller model, or a larger device"
    name = stage.method
    return (
        f"in training; type --set {name}.micro_batch_size=1 and --set "
        f"{name}.gradient_checkpointing=true, or give a smaller --student"
    )
