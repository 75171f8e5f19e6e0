"""Find the files that code writes outside its folders, while it runs.

Python reports every file that it opens, makes, renames or deletes to its audit hooks. Files that a
library of C writes without Python are not seen. Files that no longer exist afterwards, compiled
modules and devices do not count.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.symlink": 1,
    "os.link": 1,
    "os.truncate": 0,
}  # audit event -> position of the argument that is the written path
# the paths seen by each open block of `written_outside`, the innermost block last
_seen_paths: list[set[str]] = []
_hook_is_installed = False


def _hook(event: str, details: tuple[Any, ...]) -> None:
    """Note the path of an audit event that writes."""
    if not _seen_paths:
        return
    if event == "open":
        path, mode, flags = details
        writes = (
            any(letter in mode for letter in "wax+")
            if isinstance(mode, str)
            else bool((flags or 0) & _WRITING)
        )
    elif event in _CHANGING:
        path, writes = details[_CHANGING[event]], True
    else:
        return
    if writes and isinstance(path, str | bytes | os.PathLike):
        _seen_paths[-1].add(str(Path.cwd() / os.fsdecode(path)))


@contextmanager
def written_outside(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Yield a list that, after the block, holds the files written outside these folders."""
    global _hook_is_installed
    if not _hook_is_installed:
        # an audit hook cannot be removed: it does nothing unless a block is open
        sys.addaudithook(_hook)
        _hook_is_installed = True
    written: set[str] = set()
    outside: list[str] = []
    _seen_paths.append(written)
    try:
        yield outside
    finally:
        _seen_paths.remove(written)
        roots = [folder.resolve() for folder in folders]
        outside += sorted(
            path
            for path in written
            if not any(Path(path).resolve().is_relative_to(root) for root in roots)
            and _counts(Path(path))
        )


def _counts(path: Path) -> bool:
    """Tell whether a written path matters: it exists, and is no cache, device or empty folder."""
    if path.is_dir() and not any(path.iterdir()):  # a library's own folder for later
        return False
    return (
        path.exists()
        and "__pycache__" not in path.parts
        and not path.is_relative_to("/dev")
        and not path.is_relative_to("/proc")
    )
