"""Which files a piece of code writes outside the folders that it was given, seen while it runs.

Python reports every file that it opens, makes, renames or deletes to its audit hooks; what a
library writes by itself below a folder that it did not make is not seen. Files that are gone
afterwards, compiled modules and devices do not count.
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
}  # event -> which argument
_watching: list[set[str]] = []
_hooked = False


def _hook(event: str, details: tuple[Any, ...]) -> None:
    if not _watching:
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
        _watching[-1].add(str(Path.cwd() / os.fsdecode(path)))


@contextmanager
def written_outside(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Yield a list that holds, once the block is left, the files that were written outside of all
    these folders and are there.
    """
    global _hooked
    if not _hooked:
        # cannot be taken away again: it looks at nothing unless a block is open
        sys.addaudithook(_hook)
        _hooked = True
    seen: set[str] = set()
    found: list[str] = []
    _watching.append(seen)
    try:
        yield found
    finally:
        _watching.remove(seen)
        inside = [folder.resolve() for folder in folders]
        strays = (
            path
            for path in seen
            if not any(Path(path).resolve().is_relative_to(one) for one in inside)
        )
        found += sorted(path for path in strays if _counts(Path(path)))


def _counts(path: Path) -> bool:
    if path.is_dir() and not any(path.iterdir()):  # a library's own folder for later
        return False
    return (
        path.exists()
        and "__pycache__" not in path.parts
        and not path.is_relative_to("/dev")
        and not path.is_relative_to("/proc")
    )
