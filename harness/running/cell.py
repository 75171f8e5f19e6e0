"""The process of one cell: `python -m harness.running.cell JOB.json`. Makes the student, scores it,
measures it, records it.

It is the third composition root beside the command line and the Python door: names arrive, so the
tables are read here. Signs of life go to the original standard output, one JSON object a line;
everything else a library prints goes to the cell's log.
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
from harness.running.student import student_of_cell, with_untrained_tasks


def main(argv: list[str]) -> int:
    """Run one cell; 0 when its record says success, 1 when it says failed."""
    speak = _take_standard_output()
    end_with_parent(int(argv[2]))
    # where native code crashes, the log says in which of our lines
    faulthandler.enable(file=sys.stderr)
    job = read_as(Path(argv[1]), CellJob)
    began = time.monotonic()

    def progress(sign: Progress) -> None:
        speak(asdict(sign))

    try:
        record = _compute(job, progress, began)
    except Exception as problem:  # noqa: BLE001  a method may raise anything; the other cells must go on
        status = "skipped" if isinstance(problem, Skipped) else "failed"
        record = _record(job, began, status=status, **failure_of(job, problem)._asdict())
    _write_model_card(job, record)  # first: nobody comes back to a cell that has its record
    write_record(job.cell_folder / "record.json", record)
    return 0 if record.status == "success" else 1


def _write_model_card(job: CellJob, record: RunRecord) -> None:
    """Put a card beside the student's weights; a row that was scored is not lost for want of it."""
    folder = job.stage_folders[-1] / "student" if job.stage_folders else None
    if record.status == "success" and folder is not None and folder.is_dir():
        try:
            write_card(folder, record)
        except OSError as problem:
            print(f"no model card: {problem}", file=sys.stderr)


def _take_standard_output() -> Callable[[dict[str, Any]], None]:
    """Keep the real standard output for our lines; send everybody else's to the log (standard
    error).
    """
    stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    last = 0.0

    def speak(message: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.1 and message.get("done") != message.get("total"):
            return
        last = now
        stream.write(json.dumps(message) + "\n")

    return speak


def _compute(job: CellJob, progress: Callable[[Progress], None], began: float) -> RunRecord:
    """Make the student, evaluate it, and return the record of both."""
    import torch

    progress(Progress(stage="start", done=0, total=1))
    torch.set_num_threads(job.threads)
    loaded = LoadedJob.of(job, progress)
    student = student_of_cell(loaded)
    # what training left with the allocator would be missing for the answers' keys and values
    release_memory(job.conditions.device)
    cost = with_untrained_tasks(loaded, student.cost)
    result = evaluate(loaded, student.checkpoint)
    return _record(
        job,
        began,
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
    """Fill in what the last stage scored: the row's own scores."""
    return (
        *stages[:-1],
        stages[-1].model_copy(update={"scores": {score.task: score.value for score in scores}}),
    )


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


def _record(job: CellJob, began: float, *, path: str = "", **fields: Any) -> RunRecord:
    cell = job.cell
    return RunRecord(
        key=cell.key,
        label=cell.label,
        method=cell.method,
        family=cell.family,
        is_control=cell.is_control,
        controls=cell.controls,
        handed_on=cell.handed_on,
        trains=cell.trains,
        starts_from=cell.stages[0].starts_from if cell.stages else "",
        settings=cell.settings,
        conditions=job.conditions,
        seed=cell.seed,
        path=path,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - began, 3),
        **fields,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
