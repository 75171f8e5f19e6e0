"""Scores an export on items of its row, by the ordinary scorer, and compares answer by answer."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.contract import Checkpoint, Progress
from harness.deploying.plain_form import copy_model_files
from harness.deploying.row import StoredRow
from harness.errors import HarnessError
from harness.files.untrusted import read_as
from harness.machine.gpu import choose_device
from harness.models.checkpoint import INDEX, describe, weight_files
from harness.models.outside import resolve_outside
from harness.running.evaluation import score_checkpoint
from harness.running.job import CellJob
from harness.scoring.items import ItemRow, read_rows

NUMBER_TOLERANCE = 0.02  # by which a number of an item may differ, relative to the row's


@dataclass(frozen=True)
class Rescoring:
    """How many items of an export are as in its row's record."""

    items: int
    agreeing: int  # right in both or wrong in both; of numbers: within 2 %
    same_answers: int  # word for word, or the same choice
    tolerance: float  # the share of items that may disagree
    first: str  # the first item that disagrees; "" for none

    @property
    def allowed(self) -> int:
        """How many items may disagree."""
        return int(self.tolerance * self.items)

    @property
    def passed(self) -> bool:
        """Tell whether no more items disagree than are allowed to."""
        return self.items - self.agreeing <= self.allowed

    def __str__(self) -> str:
        verdict = "within" if self.passed else "OUTSIDE"
        disagreeing = self.items - self.agreeing
        first = f"; the first: {self.first}" if self.first else ""
        return (
            f"scored again on {self.items:,} items of the row: {self.agreeing:,} as in its record, "
            f"{disagreeing:,} not ({verdict} the tolerance of {self.allowed:,}){first}; "
            f"{self.same_answers:,} answers are the same word for word"
        )


def require_answers(row: StoredRow) -> CellJob:
    """Return the job of a row whose answers can be compared with.

    Raises `HarnessError` where the row's answers or job were not kept, or its device is not here.
    """
    job_file, answers = row.file("job.json"), row.file("samples.jsonl")
    if job_file is None or answers is None:
        raise HarnessError(
            f"{row.record.label}: its answers were not kept, so an export cannot be compared with "
            "them; type --check none, or name the store of its run"
        )
    job = read_as(job_file, CellJob)
    try:
        choose_device(job.conditions.device)
    except HarnessError as problem:
        raise HarnessError(
            f"{row.record.label} was scored on {job.conditions.device}, which is not here "
            f"({problem}); type --check none, and check the export there: harness score"
        ) from problem
    return job


def score_export(
    row: StoredRow,
    export: Path,
    *,
    items: int | None,
    tolerance: float,
    progress: Callable[[Progress], None],
) -> Rescoring:
    """Score an export on some of its row's items, spread over its tasks; None: all of them.

    The items are a seeded sample, of every task alike, of those that the row was scored on.
    """
    job = require_answers(row)
    answers = row.file("samples.jsonl")
    assert answers is not None
    recorded = {(answer.task, answer.item): answer for answer in read_rows(answers)}
    names = job.conditions.task_names
    per_task = None if items is None else -(-items // len(names))
    with _opened_form(export, row, job) as checkpoint:
        rows = score_checkpoint(job, checkpoint, limit=per_task, progress=progress)
    primary = {score.task: score.primary for score in row.record.scores}
    agreeing = same_answers = 0
    first = ""
    for new in rows:
        old = recorded.get((new.task, new.item))
        if old is None or old.doc_hash != new.doc_hash:
            raise HarnessError(
                f"{new.task}: item {new.item} is another one now than in the row's record; score "
                "the row again, or type --check none"
            )
        agrees = _agrees(old, new, primary[new.task])
        agreeing += agrees
        same_answers += old.answer == new.answer
        if not agrees and not first:
            first = f"{new.task} item {new.item}"
    return Rescoring(len(rows), agreeing, same_answers, tolerance, first)


@contextmanager
def _opened_form(export: Path, row: StoredRow, job: CellJob) -> Iterator[Checkpoint]:
    """Return the checkpoint of an export, as transformers opens it.

    Of a GGUF file these are its numbers with the student's own tokenizer: transformers reads the
    tokens of such a file, but not the name by which llama.cpp cuts texts.
    """
    checkpoint = resolve_outside(str(export), cache=job.cache)
    if export.suffix != ".gguf" or row.model is None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(dir=job.cache) as name:
        folder = Path(name)
        for path in (*weight_files(checkpoint.path), checkpoint.path / "config.json"):
            (folder / path.name).symlink_to(path.resolve())
        if (index := checkpoint.path / INDEX).exists():
            (folder / INDEX).symlink_to(index.resolve())
        copy_model_files(row.model, folder, weights=False)
        yield describe(folder, name=checkpoint.name, note=checkpoint.note)


def _agrees(old: ItemRow, new: ItemRow, primary: str) -> bool:
    """Tell whether an item is graded as in the record; a number may differ by 2 %."""
    recorded, value = _graded(old, primary), _graded(new, primary)
    if primary in old.correct and primary not in old.values and primary not in new.values:
        return recorded == value
    return abs(value - recorded) <= NUMBER_TOLERANCE * max(abs(recorded), 1e-9)


def _graded(row: ItemRow, primary: str) -> float:
    """Return an item's grade, or the log-likelihood of a document that has none."""
    value = row.value(primary)
    return float(sum(row.log_probabilities)) if value is None else value
