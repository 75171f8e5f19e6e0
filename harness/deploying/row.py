"""Finds a row by its label, and the files that stand beside its record. No torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, unknown
from harness.files.problems import path_text
from harness.files.untrusted import Unreadable, read_object
from harness.records.record import RunRecord
from harness.records.store import Store, newest_run, read_records
from harness.renames.labels import current_label


@dataclass(frozen=True)
class StoredRow:
    """A row's record, and where the files of its cell are."""

    record: RunRecord
    place: Path  # what was named: a run file, a store, a study or a folder of records
    others: tuple[RunRecord, ...] = ()  # further records of the row: of other seeds, or older ones

    @property
    def store(self) -> Store:
        """The store that the place is, or that its run file belongs to."""
        return Store(self.place.parent.parent if self.place.is_file() else self.place)

    @property
    def cell(self) -> Path | None:
        """The folder of the row's cell; None where its record was kept without its store."""
        folder = self.store.cell(self.record.key)
        return folder if folder.is_dir() else None

    def file(self, name: str) -> Path | None:
        """Return a file of the cell's folder, such as log.txt; None where it is missing."""
        path = self.cell / name if self.cell else None
        return path if path is not None and path.is_file() else None

    @property
    def job(self) -> dict[str, Any]:
        """What the cell's process was asked; empty where that was not kept."""
        path = self.file("job.json")
        try:
            return read_object(path) if path else {}
        except Unreadable:
            return {}

    @property
    def model(self) -> Path | None:
        """The folder or file of the model that the row scored; None where nobody kept it.

        It is the last stage's student, the checkpoint of a row from outside, or the teacher.
        """
        job = self.job
        stages = job.get("stage_folders") or []
        if stages:
            # by name, for a store may have been moved since
            path = self.store.root / "students" / Path(str(stages[-1])).name / "student"
        else:
            cell = job.get("cell") or {}
            teachers = job.get("teachers") or [{}]
            planned = cell.get("checkpoint") or teachers[int(cell.get("teacher") or 0)]
            path = Path(str(planned.get("path", "")))
        return path if path.name and path.exists() else None

    @property
    def made_here(self) -> bool:
        """Tell whether a method made the row's model, and it lies in the store."""
        return bool(self.job.get("stage_folders"))


def find_row(label: str, place: Path, *, seed: int | None = None) -> StoredRow:
    """Return a row by its label; of several seeds the lowest, unless one is named.

    A store is searched in its newest run first, then in all of its cells, of which the newest
    counts. Raises `HarnessError` for a row that is not there, with the nearest label.
    """
    label = current_label(label.strip(), typed_in="ROW")
    if not os.path.lexists(place):
        raise HarnessError(
            f"no records at {path_text(place)}; name the run file, the store or the study that "
            "holds the row (harness run writes results/runs)"
        )
    searched = newest_run(place)
    records, problems = read_records(searched)
    of_row = _labelled(label, records)
    if not of_row and searched != place:
        searched, (records, problems) = place, read_records(place)
        of_row = _labelled(label, records)
    if not of_row:
        labels = {record.label for record in records}
        unread = f"; not read: {problems[0]}" if problems else ""
        raise unknown("row", label, labels, hint=f"(in {path_text(place)}{unread})")
    chosen = _of_seed(of_row, seed, label)
    return StoredRow(chosen, searched, tuple(record for record in of_row if record is not chosen))


def _labelled(label: str, records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the records of a row: lowest seed first, of one seed the newest first."""
    of_row = [record for record in records if record.label == label]
    newest_first = sorted(of_row, key=lambda record: record.created, reverse=True)
    return sorted(newest_first, key=lambda record: -1 if record.seed is None else record.seed)


def _of_seed(records: Sequence[RunRecord], seed: int | None, label: str) -> RunRecord:
    if seed is None:
        return records[0]
    of_seed = next((record for record in records if record.seed == seed), None)
    if of_seed is None:
        seeds = sorted({str(record.seed) for record in records if record.seed is not None})
        known = f"it has {', '.join(seeds)}" if seeds else "it drew nothing; leave --seed out"
        raise HarnessError(f"--seed {seed}: {label} has no record of that seed; {known}")
    return of_seed
