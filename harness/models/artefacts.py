"""Lists, checks and removes what the cache folder holds. No torch.

The cache holds teachers' answers, traces and distributions, learning rates and unpacked models.
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


# Fields of a teacher's cache that whoever opens it compares with what is wanted: a difference is
# reported as one, and not as damage.
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
    """Yield every artefact, kind by kind, unfinished ones (`.part`) too."""
    for kind in KINDS:
        paths = sorted(
            (cache / kind).rglob("*.jsonl") if kind == "answers" else (cache / kind).glob("*")
        )
        for path in paths:
            files = (
                [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            )
            if path.suffix == ".lock" or not files:
                continue
            yield CacheEntry(
                kind,
                path,
                sum(file.stat().st_size for file in files),
                max(file.stat().st_mtime for file in files),
            )


def entry_damage(entry: CacheEntry) -> str:
    """Return what is wrong with an artefact, "" for none.

    Checked by the digests in it, or by its form where it holds none.
    """
    if entry.kind == "traces" and entry.path.suffix == ".part":
        return ""  # a killed or running run continues from it
    if entry.path.name.endswith(".part") or entry.path.name.startswith("."):
        return "half written"
    try:
        if entry.kind == "teachers":
            return folder_damage(entry.path)
        if entry.kind == "traces":
            document = read_object(entry.path)
            digest = hashlib.sha256(document["payload"].encode()).hexdigest()
            return "" if digest == document["sha256"] else "its digest does not match"
        if entry.kind == "answers":
            return _first_bad_line(entry.path)
        if entry.kind == "rates":
            return "" if read_signed(entry.path)["losses"] else "no rate in it"
        is_incomplete = not (entry.path / "config.json").is_file() or not weight_files(entry.path)
        return "an incomplete model" if is_incomplete else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HarnessError) as problem:
        return str(problem) or type(problem).__name__


def _first_bad_line(path: Path) -> str:
    """Return the first damaged line, "" for none.

    A cut last line is no damage: a killed process leaves one, and its question is asked again.
    """
    problems = read_signed_lines(path)[1]
    return problems[0] if problems else ""


def entry_note(entry: CacheEntry) -> str:
    """Return what a list says of a teacher's distributions: how they are kept, and how exactly.

    "" for everything else, and for caches of older versions, which do not say it.
    """
    if entry.kind != "teachers" or not entry.path.is_dir():
        return ""
    try:
        meta = read_description(entry.path)
        kept = "all" if meta["dense"] else f"{meta['k']:,}"
        is_exact = meta["cache_dtype"] == "float32"
        exactness = "exact" if is_exact else f"at a KL of {meta['rounding_kl']:.2g} nats"
        return (
            f"{kept} of {meta['vocabulary']:,} tokens in {meta['cache_dtype']}, "
            f"{meta['position_bytes']:,} bytes a position, {exactness}"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HarnessError):
        return ""


def signed_description(description: Mapping[str, Any]) -> str:
    """Return a folder's description as JSON, with a digest of all but `UNSIGNED_FIELDS`."""
    return json.dumps({**description, "sha256": _digest(description)}, indent=1)


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description in a folder's meta.json.

    Raises `Unreadable` where the file is damaged or its digest does not match.
    """
    description = read_object(folder / "meta.json")
    if (stated_digest := description.pop("sha256", None)) != _digest(description):
        raise Unreadable(
            f"meta.json: {'its digest does not match' if stated_digest else 'it carries no digest'}"
        )
    return description


def _digest(description: Mapping[str, Any]) -> str:
    fields = json.loads(json.dumps(description))  # tuples become lists, as in a file
    return digest_of({name: fields[name] for name in fields if name not in UNSIGNED_FIELDS})


def folder_damage(folder: Path) -> str:
    """Return which file differs from its digest in meta.json, "" where none does."""
    try:
        meta = read_description(folder)
        for name, digest in meta["files"].items():
            if file_digest(folder / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as problem:
        return str(problem) or type(problem).__name__
    return ""


def remove_unfinished(cache: Path) -> list[Path]:
    """Delete what killed processes left unfinished, and return the paths.

    Files of a living process, and teachers' folders whose lock is held, stay.
    """
    from filelock import FileLock, Timeout

    folders = [cache / name for name in (*KINDS, "digests")]
    answers = sorted((cache / "answers").glob("*"))
    removed = leftovers.delete_abandoned([cache, *folders, *answers])
    for part in sorted((cache / "teachers").glob(".*.part")):
        lock = FileLock(part.with_name(f"{part.name[1:].partition('.')[0]}.lock"))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(part, ignore_errors=True)
                removed.append(part)
        except Timeout:
            continue
    return removed


def remove_entry(entry: CacheEntry) -> None:
    """Delete an artefact; the next run that needs it computes it again."""
    if entry.path.is_dir():
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink()
