"""Copies what tasks read from the Hub into a data folder, for machines without a network."""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

from harness.contract import Task
from harness.data.source import LocalOrHubData, manifest_rows
from harness.errors import HarnessError
from harness.files.untrusted import MODEL_LIMITS, read_object
from harness.files.writing import replace_file, write_atomically

MANIFEST = "MANIFEST.md"
REVISION_FILE = "revision.json"  # beside files of the Hub: which revision of the data set they are
_HEADER = "| file | rows | source |\n|:--|--:|:--|\n"


@dataclass(frozen=True)
class HubFile:
    """A file of a data folder that can be made from the Hub."""

    relative: str  # to the data folder; it ends in .gz
    source: str  # the data set, its configuration and split
    lines: Callable[[], Iterable[str]]  # each without its line end
    revision: Callable[[], str] | None = None  # the commit that the Hub has; written beside it


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield rows as lines of JSON; dates as ISO 8601 has them.

    Raises `HarnessError` for a value that JSON has no form for, such as bytes.
    """
    return (json.dumps(dict(row), ensure_ascii=False, default=_as_json) for row in rows)


def _as_json(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    raise HarnessError(
        f"a row holds {type(value).__name__}, which JSON lines cannot hold; copy the data set's "
        "Parquet files to hub/DATA SET/CONFIGURATION/SPLIT.parquet"
    )


def hub_files_of(task: Task) -> list[HubFile]:
    """Return the files that a task can be read from. Raises `HarnessError` where it has none."""
    list_files = getattr(task, "hub_files", None)
    files: list[HubFile] = list(list_files()) if list_files is not None else []
    if not files:
        raise HarnessError(f"{task.name} reads nothing from the Hub: nothing is to be fetched")
    return files


def fetch_task(task: Task, folder: Path, *, say: Callable[[str], None]) -> int:
    """Copy a task's files into a data folder; return how many were written.

    A file that is there whole is kept. `say` receives a line for each file. Raises `HarnessError`
    where the Hub cannot be reached; what was written before stays.
    """
    written = 0
    for file in hub_files_of(task):
        if (rows := _whole_rows(folder, file.relative)) is not None:
            say(f"{file.relative}: {rows:,} rows are there")
            continue
        rows = _write(folder, file)
        say(f"{file.relative}: {rows:,} rows of {file.source}")
        written += 1
    return written


def _whole_rows(folder: Path, relative: str) -> int | None:
    """Return how many lines a file of the folder has; None where it is missing or cut."""
    listed = manifest_rows(folder).get(relative.removesuffix(".gz"))
    source = LocalOrHubData(folder=folder)
    try:
        lines = source.text(relative).count("\n")
    except HarnessError:
        return None
    return lines if listed is None or lines >= listed else None


def _write(folder: Path, file: HubFile) -> int:
    """Write a file, its line in the manifest, and the revision beside it; return its rows."""
    rows = 0
    path = folder / file.relative
    revision = _revision_to_note(path, file)

    def write(fresh: Path) -> None:
        nonlocal rows
        # without a time stamp or a name: the same rows are the same bytes
        with fresh.open("wb") as stream, gzip.GzipFile("", "wb", 9, stream, mtime=0) as packed:
            for line in file.lines():
                packed.write(f"{line}\n".encode())
                rows += 1

    replace_file(path, write)
    if revision:
        text = json.dumps({"dataset": file.source.split()[0], "revision": revision}, indent=1)
        write_atomically(path.with_name(REVISION_FILE), text + "\n")
    _list_in_manifest(folder, file, rows)
    return rows


def _revision_to_note(path: Path, file: HubFile) -> str:
    """Return the revision to write beside a file that is to come; "" where none is known.

    Beside files without a revision, copied by hand, none is written: it would be taken for theirs
    too. Raises `HarnessError` where other files of the folder are of another revision.
    """
    if file.revision is None or not (revision := file.revision()):
        return ""
    note, folder = path.with_name(REVISION_FILE), path.parent
    if not folder.is_dir() or all(other in (note, path) for other in folder.iterdir()):
        return revision
    if not note.is_file():
        return ""
    copied = read_object(note, MODEL_LIMITS).get("revision")
    if copied != revision:
        raise HarnessError(
            f"{folder} holds files of revision {copied}, and the Hub has {revision} now; "
            "remove that folder, then type the command again"
        )
    return revision


def _list_in_manifest(folder: Path, file: HubFile, rows: int) -> None:
    """State a file's rows in the folder's MANIFEST.md, by which a cut copy is found."""
    path = folder / MANIFEST
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# Data\n\n{_HEADER}"
    line = f"| {file.relative} | {rows:,} | {file.source} |\n"
    row_of_file = re.compile(
        rf"^\|\s*{re.escape(file.relative.removesuffix('.gz'))}(\.gz)?\s*\|.*\n?", re.MULTILINE
    )
    if row_of_file.search(text):
        text = row_of_file.sub(lambda _: line, text, count=1)
    else:
        has_table = text.endswith("\n") and text.rstrip("\n").rpartition("\n")[2].startswith("|")
        text = text.rstrip("\n") + "\n" + ("" if has_table else f"\n{_HEADER}") + line
    write_atomically(path, text)
