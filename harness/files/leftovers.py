"""Deletes what killed processes left half written: hidden files with a process number in the name.

No torch.
"""

import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# seconds without a change: another machine's processes, whose numbers say nothing here, write to
# shared folders too
QUIET_SECONDS = 600.0
_PARTIAL_NAME = re.compile(r"\..+\.(\d+)\.part|\.probe-(\d+)")


def process_exists(number: int) -> bool:
    """Tell whether a process of this machine has this number."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def is_abandoned(path: Path) -> bool:
    """Tell whether a path is half written and nobody writes it.

    Its process is gone, and nothing in it has changed for `QUIET_SECONDS`.
    """
    match = _PARTIAL_NAME.fullmatch(path.name)
    if match is None or process_exists(int(match[1] or match[2])):
        return False
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return time.time() - max(file.lstat().st_mtime for file in paths) > QUIET_SECONDS


def delete_abandoned(folders: Iterable[Path]) -> list[Path]:
    """Delete the abandoned files and folders that stand directly in these folders; return them.

    What cannot be deleted stays.
    """
    deleted = []
    for path in (path for folder in folders for path in sorted(folder.glob(".*"))):
        # another run takes it away at this moment, or the folder is read-only
        with suppress(OSError):
            if is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                deleted.append(path)
    return deleted
