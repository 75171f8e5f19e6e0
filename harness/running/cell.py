"""The process of one cell: `python -m harness.running.cell JOB.json`.

It makes the student, scores and times it, and writes the record. A job contains names of methods
and tasks, so this program looks them up, as the command line and the Python API do. Progress is
written to the original standard output, one JSON object per line; everything else that is printed
goes to the cell's log.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from harness.contract import Checkpoint, Progress
from harness.errors import Skipped
from harness.files.untrusted import read_as
from harness.machine.load import waiting_policy
from harness.machine.memory import release_memory
from harness.machine.process import end_with_parent
from harness.records.conditions import ModelReference
from harness.records.environment import current_environment
from harness.records.model_card import write_card
from harness.records.record import Environment, RunRecord, StageRecord, TaskScore, write_record
from harness.running.evaluation import evaluate
from harness.running.failure import failure_of
from harness.running.job import CellJob
from harness.running.loaded import LoadedJob
from harness.running.student import student_of_cell, with_data_notes


def main(argv: list[str]) -> int:
    """Run one cell; return 0 if its record says success, else 1."""
    send = _take_standard_output()
    end_with_parent(int(argv[2]))
    # if native code crashes, the log names the line of Python
    faulthandler.enable(file=sys.stderr)
    job = read_as(Path(argv[1]), CellJob)
    start_time = time.monotonic()

    def progress(message: Progress) -> None:
        send(asdict(message))

    try:
        record = _compute(job, progress, start_time)
    except Exception as problem:  # noqa: BLE001  a method may raise anything
        status = "skipped" if isinstance(problem, Skipped) else "failed"
        record = _record(job, start_time, status=status, **failure_of(job, problem)._asdict())
    _write_model_card(job, record)  # before the record: a cell with a record is never run again
    write_record(job.cell_folder / "record.json", record)
    return 0 if record.status == "success" else 1


def _write_model_card(job: CellJob, record: RunRecord) -> None:
    """Write a card beside the student's weights; if that fails, the row keeps its scores."""
    folder = job.stage_folders[-1] / "student" if job.stage_folders else None
    if record.status == "success" and folder is not None and folder.is_dir():
        try:
            write_card(folder, record)
        except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
            print(f"the model card could not be written: {problem}", file=sys.stderr)


def _take_standard_output() -> Callable[[dict[str, Any]], None]:
    """Redirect standard output to standard error, the log; return what sends progress.

    The function that is returned writes to the original standard output, at most ten lines a
    second besides the last of a stage.
    """
    stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    last_sent = 0.0

    def send(message: dict[str, Any]) -> None:
        nonlocal last_sent
        time_now = time.monotonic()
        if time_now - last_sent < 0.1 and message.get("done") != message.get("total"):
            return
        last_sent = time_now
        stream.write(json.dumps(message) + "\n")

    return send


def _compute(job: CellJob, progress: Callable[[Progress], None], start_time: float) -> RunRecord:
    """Make the student, evaluate it, and return the record."""
    import torch

    progress(Progress(stage="start", done=0, total=1))
    torch.set_num_threads(job.threads)
    loaded = LoadedJob.of(job, progress)
    student = student_of_cell(loaded)
    # scoring needs for its key-value cache the memory that training left with the allocator
    release_memory(job.conditions.device)
    cost = with_data_notes(loaded, student.cost)
    result = evaluate(loaded, student.checkpoint)
    return _record(
        job,
        start_time,
        status="success",
        path=result.path,
        student=_reference(student.checkpoint, parameters=result.parameters),
        scores=result.scores,
        fidelity=result.fidelity,
        measurements=result.measurements,
        cost=cost,
        stages=_with_last_scores(student.stages, result.scores) if len(student.stages) > 1 else (),
        data_digest=loaded.data_digest() if job.cell.trains else "",
        environment=_environment(job),
    )


def _with_last_scores(
    stages: tuple[StageRecord, ...], scores: tuple[TaskScore, ...]
) -> tuple[StageRecord, ...]:
    """Return the stages of a chain with the scores of the last one: those of the row itself."""
    values = {score.task: score.value for score in scores}
    return (*stages[:-1], stages[-1].model_copy(update={"scores": values}))


def _environment(job: CellJob) -> Environment:
    return current_environment(
        device=job.conditions.device,
        dtype=job.conditions.dtype,
        threads=job.threads,
        waiting=waiting_policy(os.environ),
        cores_in_use=job.cores_in_use,
    )


def _reference(checkpoint: Checkpoint, parameters: int | None = None) -> ModelReference:
    return ModelReference(
        name=checkpoint.name,
        digest=checkpoint.digest,
        parameters=parameters,
        weight_bytes=checkpoint.bytes_on_disk or None,
        note=checkpoint.note,
        parents=checkpoint.parents,
    )


def _record(job: CellJob, start_time: float, *, path: str = "", **fields: Any) -> RunRecord:
    return RunRecord(
        **job.cell.record_fields,
        conditions=job.conditions,
        path=path,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - start_time, 3),
        **fields,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
