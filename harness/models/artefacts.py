"""What lies in the cache folder: teacher's answers, traces, distributions, unpacked models; listed,
verified, pruned. No torch.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from harness.errors import HarnessError
from harness.files import leftovers
from harness.files.digests import digest_of, file_digest
from harness.files.lines import read_signed_lines
from harness.files.untrusted import Unreadable, read_object
from harness.files.writing import read_signed
from harness.models.checkpoint import weight_files

KINDS = {
    "answers": "a model's answers to a task's questions, as they came",
    "traces": "worked answers that a teacher wrote for training",
    "teachers": "a teacher's distributions over training rows",
    "rates": "learning rates that --tune has chosen",
    "gguf": "models unpacked from GGUF files",
}


# of a teacher's cache: another one is named, as another one
UNSIGNED_FIELDS = ("teacher", "dtype", "vocabulary", "k")


def default_cache() -> Path:
    """Return `$HARNESS_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("HARNESS_CACHE") or user_cache_dir("compression-harness"))


@dataclass(frozen=True)
class CacheEntry:
    """One artefact of the cache."""

    kind: str
    path: Path
    bytes: int
    changed: float  # seconds since the epoch

    @property
    def days(self) -> float:
        """How long ago it was last written, in days."""
        return (time.time() - self.changed) / 86_400


def cache_entries(cache: Path) -> Iterator[CacheEntry]:
    """Yield every artefact, kind by kind; half-written ones (`.part`) too."""
    for kind in KINDS:
        places = sorted(
            (cache / kind).rglob("*.jsonl") if kind == "answers" else (cache / kind).glob("*")
        )
        for path in places:
            files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
            if path.suffix == ".lock" or not files:
                continue
            yield CacheEntry(
                kind,
                path,
                sum(one.stat().st_size for one in files),
                max(one.stat().st_mtime for one in files),
            )


def entry_damage(entry: CacheEntry) -> str:
    """Return what is wrong with an artefact, "" where nothing is: by the digests that it carries,
    else by its form.
    """
    if entry.kind == "traces" and entry.path.suffix == ".part":
        return ""  # a run that was killed, or still runs, goes on from it
    if entry.path.name.endswith(".part") or entry.path.name.startswith("."):
        return "half written"
    try:
        if entry.kind == "teachers":
            return folder_damage(entry.path)
        if entry.kind == "traces":
            document = read_object(entry.path)
            whole = hashlib.sha256(document["payload"].encode()).hexdigest() == document["sha256"]
            return "" if whole else "its digest does not match"
        if entry.kind == "answers":
            return _first_bad_line(entry.path)
        if entry.kind == "rates":
            return "" if read_signed(entry.path)["losses"] else "no rate in it"
        missing = not (entry.path / "config.json").is_file() or not weight_files(entry.path)
        return "no whole model" if missing else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HarnessError) as problem:
        return str(problem) or type(problem).__name__


def _first_bad_line(path: Path) -> str:
    """Return the first line that is not as it was written; a torn last one is what a kill leaves,
    and is asked again.
    """
    wrong = read_signed_lines(path)[1]
    return wrong[0] if wrong else ""


def signed_description(told: Mapping[str, Any]) -> str:
    """Return a folder's description as JSON with its digest, of everything but what whoever opens
    it compares with what is wanted.
    """
    return json.dumps({**told, "sha256": _digest(told)}, indent=1)


def read_description(folder: Path) -> dict[str, Any]:
    """Return what a folder's meta.json says. Raises `Unreadable` where it is not as it was
    written.
    """
    told = read_object(folder / "meta.json")
    if (stated := told.pop("sha256", None)) != _digest(told):
        raise Unreadable(
            f"meta.json: {'its digest does not match' if stated else 'it carries no digest'}"
        )
    return told


def _digest(told: Mapping[str, Any]) -> str:
    return digest_of(
        {
            name: value
            for name, value in json.loads(json.dumps(told)).items()
            if name not in UNSIGNED_FIELDS
        }
    )


def folder_damage(folder: Path) -> str:
    """Compare a folder's files with the digests in its meta.json; "" where all are as described."""
    try:
        meta = read_description(folder)
        changed = next(
            (
                name
                for name, digest in meta["files"].items()
                if file_digest(folder / name) != digest
            ),
            None,
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as problem:
        return str(problem) or type(problem).__name__
    return f"{changed} has changed" if changed else ""


def remove_unfinished(cache: Path) -> list[Path]:
    """Delete what killed runs left half written, and return it; what a living one writes, or holds
    the lock of, stays.
    """
    from filelock import FileLock, Timeout

    gone = leftovers.delete_abandoned(
        [
            cache,
            *(cache / name for name in (*KINDS, "digests")),
            *sorted((cache / "answers").glob("*")),
        ]
    )
    for torn in sorted((cache / "teachers").glob(".*.part")):
        lock = FileLock(torn.with_name(f"{torn.name[1:].partition('.')[0]}.lock"))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(torn, ignore_errors=True)
                gone.append(torn)
        except Timeout:
            continue
    return gone


def remove_entry(entry: CacheEntry) -> None:
    """Delete an artefact; whoever needs it makes it again."""
    if entry.path.is_dir():
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink()
