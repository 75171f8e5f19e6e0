"""Checks a record against its digest, items and models, and on request its scores. No torch.

A record alone can only be checked against itself. In a store there are more files to compare it
with: the answers to every item, the weights of student and teacher, the job of its process.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import CellFailed, HarnessError
from harness.files.digests import digest_of
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed
from harness.models.checkpoint import folder_digest
from harness.records.conditions import first_difference
from harness.records.record import BadRecord, RunRecord, TaskScore, read_record
from harness.running.recomputation import PARTS_FILE
from harness.scoring.items import ItemRow, read_rows
from harness.scoring.outcomes import likelihoods_digest

if TYPE_CHECKING:
    from harness.running.job import CellJob


@dataclass(frozen=True)
class Verification:
    """The result of checking one record."""

    path: Path
    checked: tuple[str, ...]  # names of the checks that passed
    difference: str  # the first difference; "" if there is none

    def __str__(self) -> str:
        if self.difference:
            return f"{self.path}: DIFFERS: {self.difference}"
        return f"{self.path}: unchanged ({', '.join(self.checked) or 'nothing'})"


def verify(path: Path, *, score: bool = False) -> Verification:
    """Check one record; with `score`, also score its model again, which takes as long as before."""
    try:
        record = read_record(path)
    except BadRecord as problem:
        return Verification(path, (), str(problem).removeprefix(f"{path}: "))
    checked = ["its digest and its figures"]
    in_store = path.name == "record.json" and path.parent.parent.name == "cells"
    cell_folder = path.parent if in_store else None
    job = None if cell_folder is None else _read_job(cell_folder)
    for name, difference in _checks(record, cell_folder, job):
        if difference:
            return Verification(path, tuple(checked), difference)
        checked.append(name)
    if score:
        if job is None or record.status != "success":
            raise HarnessError(
                f"{path}: --score needs a row that succeeded, in the store of its run "
                "(results/runs/cells/KEY/record.json)"
            )
        if difference := _rescoring_difference(record, job):
            return Verification(path, tuple(checked), difference)
        checked.append("its scores, computed again")
    return Verification(path, tuple(checked), "")


def _checks(
    record: RunRecord, cell_folder: Path | None, job: "CellJob | None"
) -> Iterator[tuple[str, str]]:
    """Yield the name of each check that is possible, and the difference that it found, if any.

    A check is computed only when the caller asks for it.
    """
    if cell_folder is not None:
        yield "its key", _key_difference(record, cell_folder)
        if (cell_folder / PARTS_FILE).exists():
            yield "the parts of its key", _parts_difference(record, cell_folder / PARTS_FILE)
        if record.status == "success":
            yield "its items", _items_difference(record, cell_folder / "samples.jsonl")
        if (cell_folder / "job.json").exists():
            difference = _job_difference(record, cell_folder / "job.json")
            yield "its job", difference or _conditions_difference(record, job)
    if job is not None and (models := _stored_models(record, job)):
        differences = (_weights_difference(name, *model) for name, model in models.items())
        yield f"the weights of {', '.join(models)}", next(filter(None, differences), "")


def _key_difference(record: RunRecord, cell_folder: Path) -> str:
    key = record.key[:24]
    return "" if key == cell_folder.name else f"its key is {key}, its folder {cell_folder.name}"


def _read_job(cell_folder: Path) -> "CellJob | None":
    """Return the job of a cell; None if it is missing or this version cannot read it."""
    from harness.running.job import CellJob

    try:
        return CellJob.model_validate_json((cell_folder / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _parts_difference(record: RunRecord, path: Path) -> str:
    """Compare a record's key with the parts that are stored beside it: code, versions, data."""
    try:
        parts = read_signed(path)
        same = digest_of("cell", *parts["students"][-1:], parts["held"]) == record.key
    except (Unreadable, LookupError, TypeError) as problem:
        return f"{path.name} cannot be read ({' '.join(str(problem).split())[:100]})"
    return "" if same else f"{path.name} belongs to another key"


def _items_difference(record: RunRecord, samples: Path) -> str:
    """Compare the answers that are stored beside a record with its scores."""
    if not samples.exists():
        return f"{samples.name} is missing, the file with its answers"
    try:
        rows = read_rows(samples)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return (
            f"{samples.name} cannot be read ({type(problem).__name__}: "
            f"{' '.join(str(problem).split())[:100]})"
        )
    rows_by_task: dict[str, list[ItemRow]] = {}
    for row in rows:
        rows_by_task.setdefault(row.task, []).append(row)
    differences = (
        _task_difference(score, rows_by_task.get(score.task, [])) for score in record.scores
    )
    return next(filter(None, differences), "")


def _task_difference(score: TaskScore, rows: Sequence[ItemRow]) -> str:
    """Compare the stored answers to one task with its score: count, marks and digests."""
    if len(rows) != score.n:
        return f"{score.task}: {len(rows)} answers are stored, the record says {score.n}"
    for extractor, marks in score.outcomes.items():
        if not all(extractor in row.correct for row in rows):
            continue
        for row, mark in zip(rows, marks, strict=False):
            correct = row.correct[extractor]
            if str(int(correct)) != mark:
                return (
                    f"{score.task}: the stored answer to item {row.item} is "
                    f"{_right_or_wrong(correct)}, {_right_or_wrong(not correct)} in the record "
                    f"({extractor})"
                )
    if digest_of([row.answer for row in rows]) != score.answers_digest:
        return f"{score.task}: the stored answers are not those of the record (digests differ)"
    if score.likelihoods_digest and likelihoods_digest(rows) != score.likelihoods_digest:
        return (
            f"{score.task}: the stored log-probabilities are not those of the record (digests "
            "differ)"
        )
    return ""


def _right_or_wrong(correct: bool) -> str:
    return "right" if correct else "wrong"


def _job_difference(record: RunRecord, path: Path) -> str:
    """Compare the key in a cell's job with the record's.

    Only the key: the other fields of a job change from version to version.
    """
    try:
        key = json.loads(path.read_text(encoding="utf-8"))["cell"]["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        return f"{path.name} cannot be read ({type(problem).__name__})"
    return "" if key == record.key else f"{path.name} belongs to another cell"


def _conditions_difference(record: RunRecord, job: "CellJob | None") -> str:
    """Compare the conditions in a cell's job with the record's; "" if there is no job to read."""
    name = "" if job is None else first_difference(job.conditions, record.conditions)
    return f"the {name} in its job is not the {name} in the record" if name else ""


def _stored_models(record: RunRecord, job: "CellJob") -> dict[str, tuple[Path, str]]:
    """Return folder and digest of each model of a record.

    Models whose folder is gone, and models of the Hub, are left out: they cannot be compared.
    """
    models = {
        f"teacher {reference.name}": (planned.path, reference.digest)
        for reference, planned in zip(record.conditions.teachers, job.teachers, strict=False)
    }
    if job.stage_folders and record.student is not None:
        models["student"] = (job.stage_folders[-1] / "student", record.student.digest)
    if (outside := job.cell.checkpoint) is not None and outside.base is None:
        models["checkpoint"] = (outside.path, outside.digest)
    return {
        name: (path, digest)
        for name, (path, digest) in models.items()
        if path.is_dir() and not digest.startswith("hub:")
    }


def _weights_difference(name: str, path: Path, digest: str) -> str:
    if folder_digest(path) == digest:
        return ""
    return f"{name}: the weights in {path} are not those of the record (digests differ)"


def _rescoring_difference(record: RunRecord, job: "CellJob") -> str:
    """Score a record's model again and return the first difference in items, answers or figures."""
    from harness.running.evaluation import score_again

    try:
        scores: Mapping[str, TaskScore] = {score.task: score for score in score_again(job)}
    except CellFailed as problem:
        return f"it cannot be scored again: {problem}"
    differences = (_score_difference(score, scores.get(score.task)) for score in record.scores)
    return next(filter(None, differences), "")


def _score_difference(old: TaskScore, new: TaskScore | None) -> str:
    """Compare a task's score in a record with the score that was computed again."""
    if new is None or new.n != old.n or new.items_digest != old.items_digest:
        return f"{old.task}: the task has other items now"
    for extractor, old_marks in old.outcomes.items():
        new_marks = new.outcomes.get(extractor, "")
        for item, (old_mark, new_mark) in enumerate(zip(old_marks, new_marks, strict=False)):
            if old_mark != new_mark:
                return (
                    f"{old.task}: item {item} is {_right_or_wrong(new_mark == '1')} now, "
                    f"{_right_or_wrong(old_mark == '1')} in the record ({extractor})"
                )
    if new.answers_digest != old.answers_digest:
        return f"{old.task}: an answer is different now, though as right or wrong as in the record"
    if abs(new.value - old.value) > 1e-6 * max(1.0, abs(old.value)):
        return f"{old.task}: its figure is {new.value:g} now, {old.value:g} in the record"
    return ""
