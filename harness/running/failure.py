"""Describes why a cell failed: one line for the table, a traceback for the record. No torch."""

import traceback
from pathlib import Path
from typing import NamedTuple

from harness.errors import CellFailed, HarnessError, says_no_memory
from harness.files.places import no_space_message
from harness.running.job import CellJob


class Failure(NamedTuple):
    """What a record says of an exception."""

    reason: str  # one line
    trace: str  # the traceback; "" if the reason says everything


def failure_of(job: CellJob, problem: Exception) -> Failure:
    """Return what a record says of the exception that is being handled.

    A full disk and lack of memory are recognised, and the reason says what to do about them.
    """
    if isinstance(problem, (CellFailed, HarnessError)):
        return Failure(str(problem), "")
    if full := no_space_message(problem, _output_folders(job)):
        return Failure(f"{full}; free some and run again", "")
    if isinstance(problem, MemoryError) or says_no_memory(str(problem)):
        message = " ".join(str(problem).split())[:300]
        return Failure(f"out of memory {_memory_advice(job)} ({message})", traceback.format_exc())
    message = str(problem).strip()
    return Failure(
        f"{type(problem).__name__}: {message.splitlines()[0] if message else 'no message'}",
        traceback.format_exc(),
    )


def _output_folders(job: CellJob) -> dict[str, Path]:
    """Return the folders that a cell writes to, by their flags."""
    return {"--out": job.cell_folder, "--cache": job.cache}


def _memory_advice(job: CellJob) -> str:
    """Say in which stage a cell ran out of memory, and which setting reduces what it needs.

    It is the first stage without a student; if all have one, scoring.
    """
    unfinished = (
        stage
        for stage, folder in zip(job.cell.stages, job.stage_folders, strict=True)
        if not (folder / "done.json").exists()
    )
    stage = next(unfinished, None)
    if stage is None:
        return "in scoring; type a smaller --batch-size"
    if not stage.trains:
        return f"in {stage.method}; give a smaller model, or a device with more memory"
    name = stage.method
    return (
        f"in training; type --set {name}.micro_batch_size=1 and --set "
        f"{name}.gradient_checkpointing=true, or give a smaller --student"
    )
