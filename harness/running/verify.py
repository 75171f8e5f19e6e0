"""Checks a record against everything that stands beside it: its digest, its items, its models, and,
where asked, its scores anew. No torch.

A record alone can only be checked against itself. In a store it has company: the answers of every
item, the student's and the teacher's weights, what its process was told.
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
    """What was found of one record: what was checked, and the first difference, "" where there is
    none.
    """

    path: Path
    checked: tuple[str, ...]
    difference: str

    def __str__(self) -> str:
        checked = ", ".join(self.checked) or "nothing"
        return (
            f"{self.path}: DIFFERS: {self.difference}"
            if self.difference
            else f"{self.path}: whole ({checked})"
        )


def verify(path: Path, *, score: bool = False) -> Verification:
    """Check one record; with `score` also ask its model every question again, which takes as long
    as it took then.
    """
    try:
        record = read_record(path)
    except BadRecord as problem:
        return Verification(path, (), str(problem).removeprefix(f"{path}: "))
    checked = ["its digest and its figures"]
    cell = (
        path.parent if path.name == "record.json" and path.parent.parent.name == "cells" else None
    )
    job = None if cell is None else _read_job(cell)
    for name, difference in _checks(record, cell, job):
        if difference:
            return Verification(path, tuple(checked), difference)
        checked.append(name)
    if score:
        if job is None or record.status != "success":
            raise HarnessError(
                f"{path}: --score needs a row that succeeded, in the store where it was made "
                "(results/runs/cells/KEY/record.json)"
            )
        if difference := _rescoring_difference(record, job):
            return Verification(path, tuple(checked), difference)
        checked.append("its scores, computed again")
    return Verification(path, tuple(checked), "")


def _checks(
    record: RunRecord, cell: Path | None, job: "CellJob | None"
) -> Iterator[tuple[str, str]]:
    """Yield the name of each check that a record's company allows, and what it found; nothing is
    computed before it is asked for.
    """
    if cell is not None:
        yield (
            "its key",
            ""
            if record.key[:24] == cell.name
            else f"its key is {record.key[:24]}, its folder {cell.name}",
        )
        if (cell / PARTS_FILE).exists():
            yield "the parts of its key", _parts_difference(record, cell / PARTS_FILE)
        if record.status == "success":
            yield "its items", _items_difference(record, cell / "samples.jsonl")
        if (cell / "job.json").exists():
            yield (
                "what its process was told",
                _job_difference(record, cell / "job.json") or _conditions_difference(record, job),
            )
    if job is not None and (here := _stored_models(record, job)):
        yield (
            f"the weights of {', '.join(here)}",
            next(filter(None, (_weights_difference(name, *one) for name, one in here.items())), ""),
        )


def _read_job(cell: Path) -> "CellJob | None":
    """Return what a cell's process was told; None where that is not kept or cannot be read by this
    version.
    """
    from harness.running.job import CellJob

    try:
        return CellJob.model_validate_json((cell / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _parts_difference(record: RunRecord, path: Path) -> str:
    """Compare a record's key with what is kept of its making: code, versions, data."""
    try:
        parts = read_signed(path)
        same = digest_of("cell", *parts["students"][-1:], parts["held"]) == record.key
    except (Unreadable, LookupError, TypeError) as problem:
        return f"{path.name} cannot be read ({' '.join(str(problem).split())[:100]})"
    return "" if same else f"{path.name} is of another key"


def _items_difference(record: RunRecord, samples: Path) -> str:
    """Compare the answers beside a record with what it says of them."""
    if not samples.exists():
        return f"{samples.name} is missing, where its answers were kept"
    try:
        rows = read_rows(samples)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return (
            f"{samples.name} cannot be read ({type(problem).__name__}: "
            f"{' '.join(str(problem).split())[:100]})"
        )
    by_task: dict[str, list[ItemRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    return next(
        filter(
            None, (_task_difference(score, by_task.get(score.task, [])) for score in record.scores)
        ),
        "",
    )


def _task_difference(score: TaskScore, rows: Sequence[ItemRow]) -> str:
    if len(rows) != score.n:
        return f"{score.task}: {len(rows)} answers are kept, the record says {score.n}"
    for extractor, marks in score.outcomes.items():
        if not all(extractor in row.correct for row in rows):
            continue
        at = next(
            (at for at, row in enumerate(rows) if str(int(row.correct[extractor])) != marks[at]),
            None,
        )
        if at is not None:
            return (
                f"{score.task}: item {rows[at].item} is "
                f"{_right_or_wrong(rows[at].correct[extractor])} as kept, not so in the record "
                f"({extractor})"
            )
    if digest_of([row.answer for row in rows]) != score.answers_digest:
        return f"{score.task}: the kept answers are not those of the record (their digest differs)"
    if score.likelihoods_digest and likelihoods_digest(rows) != score.likelihoods_digest:
        return (
            f"{score.task}: the kept log-probabilities are not those of the record (their digest "
            "differs)"
        )
    return ""


def _right_or_wrong(right: bool) -> str:
    return "right" if right else "wrong"


def _job_difference(record: RunRecord, path: Path) -> str:
    """Compare the key that a cell's process was told; the rest of it changes from version to
    version.
    """
    try:
        key = json.loads(path.read_text(encoding="utf-8"))["cell"]["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        return f"{path.name} cannot be read ({type(problem).__name__})"
    return "" if key == record.key else f"{path.name} is of another cell"


def _conditions_difference(record: RunRecord, job: "CellJob | None") -> str:
    """Compare the conditions that a process was given with those of its record; a job of another
    version cannot be read.
    """
    name = "" if job is None else first_difference(job.conditions, record.conditions)
    return f"its process was told another {name} than the record says" if name else ""


def _stored_models(record: RunRecord, job: "CellJob") -> dict[str, tuple[Path, str]]:
    """Return the folders of a record's models and the digests that it gives them; what is gone, or
    the Hub's, cannot be compared.
    """
    expected = {
        f"teacher {told.name}": (planned.path, told.digest)
        for told, planned in zip(record.conditions.teachers, job.teachers, strict=False)
    }
    if job.stage_folders and record.student is not None:
        expected["student"] = (job.stage_folders[-1] / "student", record.student.digest)
    return {
        name: (path, digest)
        for name, (path, digest) in expected.items()
        if path.is_dir() and not digest.startswith("hub:")
    }


def _weights_difference(name: str, path: Path, digest: str) -> str:
    return (
        ""
        if folder_digest(path) == digest
        else f"{name}: the weights in {path} are not those of the record (their digest differs)"
    )


def _rescoring_difference(record: RunRecord, job: "CellJob") -> str:
    """Ask a record's model every question again and return the first figure or item that comes out
    another one.
    """
    from harness.running.evaluation import score_again

    try:
        scores: Mapping[str, TaskScore] = {score.task: score for score in score_again(job)}
    except CellFailed as problem:
        return f"it cannot be scored again: {problem}"
    for old in record.scores:
        new = scores.get(old.task)
        if new is None or new.n != old.n or new.items_digest != old.items_digest:
            return f"{old.task}: its items are other ones now"
        for extractor, marks in old.outcomes.items():
            now = new.outcomes.get(extractor, "")
            at = next(
                (at for at, pair in enumerate(zip(marks, now, strict=False)) if pair[0] != pair[1]),
                None,
            )
            if at is not None:
                return (
                    f"{old.task}: item {at} comes out {_right_or_wrong(now[at] == '1')} now, "
                    f"{_right_or_wrong(marks[at] == '1')} in the record ({extractor})"
                )
        if new.answers_digest != old.answers_digest:
            return (
                f"{old.task}: an answer comes out another one now, right and wrong as in the record"
            )
        if abs(new.value - old.value) > 1e-6 * max(1.0, abs(old.value)):
            return (
                f"{old.task}: its figure comes out as {new.value:g} now, {old.value:g} in the "
                "record"
            )
    return ""
