"""The store of a user's cells: one folder per cell by key, shared students, locks, lists of runs.

OUT/cells/KEY/   record.json, samples.jsonl, log.txt
OUT/students/KEY/   student/ (the checkpoint), cost.json, training.jsonl, state/ while it trains
OUT/runs/NAME.json   what was asked, and the keys of its cells
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from harness.errors import HarnessError
from harness.escape import clean
from harness.files import leftovers
from harness.files.places import make_folder
from harness.files.untrusted import Unreadable, read_json, read_object
from harness.files.writing import read_signed, write_signed
from harness.records.record import BadRecord, RunRecord, read_record, write_record


@dataclass(frozen=True)
class LockHolder:
    """The process that computes a cell at the moment."""

    process: int
    machine: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.machine} since {self.since}"


class CellBusy(Exception):
    """A cell that another run computes, where waiting for it was not wanted."""

    def __init__(self, holder: LockHolder | None) -> None:
        super().__init__(f"computed by {holder}" if holder else "computed by another run")


@dataclass(frozen=True)
class Store:
    """A folder of cells that any number of runs may share."""

    root: Path

    def prepare(self) -> None:
        """Make the folder and check that it can be written to."""
        make_folder(self.root, "--out")
        areas = [self.root / name for name in ("cells", "students", "runs", "locks")]
        for area in areas:
            make_folder(area, "--out")
        leftovers.delete_abandoned(
            [self.root, *areas, *(path for path in (self.root / "runs").iterdir() if path.is_dir())]
        )
        _delete_stale_notes(self.root / "locks")

    def cell(self, key: str) -> Path:
        """Return a cell's folder."""
        return self.root / "cells" / key[:24]

    def student(self, key: str) -> Path:
        """Return a student's folder."""
        return self.root / "students" / key[:24]

    def record_path(self, key: str) -> Path:
        """Return where a cell's record stands."""
        return self.cell(key) / "record.json"

    def finished(self, key: str) -> RunRecord | None:
        """Return the record of a cell that succeeded, None where it must be computed."""
        path = self.record_path(key)
        if not path.exists():
            return None
        try:
            record = read_record(path)
        except BadRecord:
            return None
        return record if record.status == "success" and record.key == key else None

    @contextmanager
    def locked(self, key: str, *, wait: bool, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Hold a cell's lock; wait for another holder, or raise `CellBusy` without `wait`."""
        path = self.root / "locks" / f"{key[:24]}.lock"
        note = path.with_suffix(".json")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = _holder(note)
            if not wait:
                raise CellBusy(holder) from None
            on_wait(
                f"waiting for a cell {CellBusy(holder)} (Ctrl-C leaves it; --no-wait skips such "
                "cells)"
            )
            lock.acquire()
        try:
            since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            note.write_text(
                json.dumps(
                    {"process": os.getpid(), "machine": socket.gethostname(), "since": since}
                )
            )
            yield
        finally:
            note.unlink(missing_ok=True)
            lock.release()

    def write_run(self, description: dict[str, object], keys: list[str]) -> Path:
        """Write the list of a run's cells and return its path."""
        stem = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}"
        path = self.root / "runs" / f"{stem}.json"
        while path.exists():  # two runs of one process within a second
            path = path.with_name(f"{path.stem}a.json")
        write_signed(path, {"kind": "run", "asked": description, "cells": keys})
        return path


_KEY = re.compile(r"[\w-]{1,200}")  # a key names a folder, so it is no path


def _holder(note: Path) -> LockHolder | None:
    try:
        content = read_object(note)
        return LockHolder(
            int(content["process"]), clean(str(content["machine"])), clean(str(content["since"]))
        )
    except (ValueError, LookupError, TypeError):
        return None


def _delete_stale_notes(locks: Path) -> None:
    """Delete the notes of holders that were killed on this machine.

    Their locks are free, but nobody takes the lock of a finished cell again.
    """
    for note in locks.glob("*.json"):
        holder = _holder(note)
        with suppress(OSError):
            is_torn = (
                holder is None and time.time() - note.stat().st_mtime > leftovers.QUIET_SECONDS
            )
            if is_torn or (
                holder is not None
                and holder.machine == clean(socket.gethostname())
                and not leftovers.process_exists(holder.process)
            ):
                note.unlink(missing_ok=True)


class RecordFiles(NamedTuple):
    """The record files of a place, and a line on what its run lacks."""

    paths: list[Path]
    problems: list[str]


def record_files(place: Path) -> RecordFiles:
    """Find the record files of a run file, a store, a study (`records/`), or a plain folder.

    Raises `HarnessError` where there are none.
    """
    if place.is_file():
        return _files_of(place)
    hint = "give a run file, a study or a folder of records (harness run writes results/runs)"
    if not place.is_dir():
        raise HarnessError(f"no records at {place}; {hint}")
    for folder, pattern in (
        (place / "cells", "*/record.json"),
        (place / "records", "*.json"),
        (place, "*.json"),
    ):
        if folder.is_dir() and (paths := sorted(folder.glob(pattern))):
            return RecordFiles(paths, [])
    raise HarnessError(f"no records in {place}; {hint}")


def _files_of(place: Path) -> RecordFiles:
    """Find the records of one file: itself, or the cells that a run lists."""
    try:
        data = read_json(place)
    except Unreadable:
        data = None
    if not isinstance(data, dict) or data.get("kind") != "run":
        return RecordFiles([place], [])  # read as a record, which says what is wrong with any other
    if "sha256" in data:  # older run files have none
        try:
            read_signed(place)
        except Unreadable as problem:
            raise HarnessError(
                f"{problem}; give another run file, or type the command of the run again"
            ) from problem
    keys = data.get("cells")
    if not isinstance(keys, list) or not keys or not all(map(_is_key, keys)):
        raise HarnessError(
            f"{place}: a run file whose cells are no list of keys; give another, or type the "
            "command of the run again"
        )
    store = Store(place.parent.parent)
    paths = [store.record_path(key) for key in keys]
    existing = [path for path in paths if path.exists()]
    missing = len(paths) - len(existing)
    if not missing:
        return RecordFiles(existing, [])
    lacking = (
        f"{place}: {missing} of its {len(paths)} cells have no record (the run was stopped, or is "
        "under way)"
    )
    return RecordFiles(existing, [lacking])


def _is_key(value: object) -> bool:
    return isinstance(value, str) and _KEY.fullmatch(value) is not None


def newest_run(place: Path) -> Path:
    """Return a store's newest run file; any other place comes back as it is."""
    runs = sorted((place / "runs").glob("*.json")) if (place / "cells").is_dir() else []
    return runs[-1] if runs else place


def duplicate_row(records: Sequence[RunRecord]) -> str:
    """Name the first row and seed of which there are two records, "" where there is none."""
    rows: set[tuple[str, int | None]] = set()
    for record in records:
        if (record.label, record.seed) in rows:
            return f"{record.label}{f' (seed {record.seed})' if record.seed is not None else ''}"
        rows.add((record.label, record.seed))
    return ""


def copy_to_study(records: Sequence[RunRecord], folder: Path) -> None:
    """Copy records into a study's folder, each under its row and seed, in place of older ones.

    Older records are deleted once the new ones stand. Nothing else is touched; a folder that holds
    something and is no study is refused before anything is written.
    """
    records_by_name: dict[str, RunRecord] = {}
    for record in records:
        name = re.sub(r"[^\w.=-]+", "_", record.label).strip("_")
        seed = f"-seed{record.seed}" if record.seed is not None else ""
        if f"{name}{seed}" in records_by_name:
            raise HarnessError(
                f"two records of {record.label}{seed}: a study holds one run's records; name that "
                "run's file (results/runs/runs/)"
            )
        records_by_name[f"{name}{seed}"] = record
    older = _own_records(folder, [f"{name}.json" for name in records_by_name])
    for name, record in records_by_name.items():
        write_record(folder / f"{name}.json", record)
    for path in older - {folder / f"{name}.json" for name in records_by_name}:
        path.unlink()


def _own_records(folder: Path, names: Sequence[str]) -> set[Path]:
    """Return the record files of a study's `records/`.

    Raises `HarnessError` for a folder that is no study, and for a foreign file under one of the
    names.
    """
    study = folder.parent
    for place in (study, folder):
        if place.exists() and not place.is_dir():
            raise HarnessError(
                f"--keep {study}: {place} is a file; give a folder, new or of a study"
            )
    records = {path for path in folder.glob("*.json") if _is_record(path)}
    if study.is_dir() and not folder.is_dir() and any(study.iterdir()):
        raise HarnessError(
            f"--keep {study}: not empty, and no study (it has no records/); give a new folder, or "
            "a study's"
        )
    if foreign := next(
        (path for path in map(folder.joinpath, names) if path.exists() and path not in records),
        None,
    ):
        raise HarnessError(
            f"--keep {study}: {foreign} is no record and would be overwritten; move it, or give "
            "another folder"
        )
    return records


def _is_record(path: Path) -> bool:
    """Tell whether a file is a record, of whatever schema, whole or edited, by its own kind."""
    if path.is_symlink() or path.suffix != ".json" or not path.is_file():
        return False
    try:
        content = read_json(path)
    except Unreadable:
        return False
    return (
        isinstance(content, dict)
        and content.get("kind") == "cell"
        and "schema" in content
        and "label" in content
    )


class ReadRecords(NamedTuple):
    """The records of a place, and a line for each file that is none or that a run lacks."""

    records: list[RunRecord]
    problems: list[str]


def read_records(place: Path) -> ReadRecords:
    """Read every record of a place. Raises `HarnessError` where there are none."""
    paths, problems = record_files(place)
    records = []
    for path in paths:
        try:
            records.append(read_record(path))
        except BadRecord as problem:
            problems.append(str(problem))
    return ReadRecords(records, problems)
