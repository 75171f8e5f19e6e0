"""Writes files and folders whole or not at all, and signs what another process reads back."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.files import untrusted
from harness.files.digests import digest_of
from harness.renames.modules import by_old_name

__getattr__ = by_old_name(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: it is on the disk before it has its name."""
    replace_file(path, lambda fresh: fresh.write_bytes(text.encode()))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it, and give it its name.

    Where any of that fails, the file that had the name stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(fresh)
        sync_to_disk(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's names, to the disk now.

    A file system that cannot sync folders is no error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if not path.is_dir() or problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_signed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own digest, whole or not at all."""
    write_atomically(
        path,
        json.dumps({**content, "sha256": digest_of(json.loads(json.dumps(content)))}, indent=1)
        + "\n",
    )


def read_signed(path: Path) -> dict[str, Any]:
    """Return what `write_signed` wrote, without the digest.

    Raises `Unreadable` for a file that is torn, foreign or edited.
    """
    content = untrusted.read_object(path)
    if (stated := content.pop("sha256", None)) != digest_of(content):
        raise untrusted.Unreadable(
            f"{path}: {'its digest does not match' if stated else 'it carries no digest'}"
        )
    return content


def save_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder beside `folder`, then move it into place whole."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for path in fresh.rglob("*"):
        sync_to_disk(path)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)
    sync_to_disk(folder.parent)


def nonfinite_as_null(value: Any) -> Any:
    """Return JSON-like data with None in place of NaN and infinity, which are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: nonfinite_as_null(part) for name, part in value.items()}
    return (
        [nonfinite_as_null(part) for part in value] if isinstance(value, (list, tuple)) else value
    )
