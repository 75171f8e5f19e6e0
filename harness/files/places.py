"""Checks folders and files before anything is computed for them: kind, right to write, space.

No torch.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from harness.errors import HarnessError
from harness.files.problems import describe_os_error, path_text

MIN_FREE_BYTES = 16 * 2**20  # bytes: less holds not even the embedded pair's run
LOW_FREE_BYTES = 2**30  # bytes: less is worth a line, for it may not hold a student from outside
_PROBE = b"\0" * 4096
# safetensors, torch's zip writer and tar say it in their own words, as no OSError
_NO_SPACE_TEXT = (  # looked for in any case
    r"no space left on device|os error 28\b|disk quota exceeded|PytorchStreamWriter failed "
    r"writing|enforce fail at inline_container"
)


def free_bytes(path: Path) -> int:
    """Return how many bytes are free where a path is, or would be made."""
    return shutil.disk_usage(_nearest_existing(path)).free


def _nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest folder or file above it that exists.

    Raises OSError where the system cannot tell (a name too long, no permission).
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100  no links are followed: resolve() would fail where this shall tell
    while True:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path


def check_folder(path: Path, flag: str, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Raise `HarnessError` for a folder that cannot be made or written to, or that has no space.

    Nothing is made. `flag` is the option that named it; `say` gets a line where little is free.
    """
    try:
        existing = _nearest_existing(path)
        free = shutil.disk_usage(existing).free
    except OSError as problem:
        raise HarnessError(f"{flag} {describe_os_error(problem)}") from problem
    folder = f"{flag} {path_text(path)}"
    if not existing.is_dir():
        raise HarnessError(
            f"{folder}: {path_text(existing)} is a file, and a folder is needed; give another "
            f"folder with {flag}"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise HarnessError(
            f"{folder}: cannot write to {path_text(existing)} (Permission denied); give another "
            "folder"
        )
    if free < MIN_FREE_BYTES:
        raise HarnessError(
            f"{folder}: {free / 2**20:.1f} MiB are free there, too few; free some, or give another "
            "folder"
        )
    if free < LOW_FREE_BYTES:
        say(f"{folder}: only {free / 2**20:.0f} MiB are free there")


def check_file(path: Path, flag: str) -> None:
    """Raise `HarnessError` for a file that cannot be written.

    A folder has its name, it may not be written to, or its folder is refused (`check_folder`).
    """
    try:
        is_folder = path.is_dir()
        is_protected = path.exists() and not os.access(path, os.W_OK)
    except OSError as problem:
        raise HarnessError(f"{flag} {describe_os_error(problem)}") from problem
    if is_folder:
        raise HarnessError(f"{flag} {path_text(path)} is a folder; give a file in it")
    if is_protected:
        raise HarnessError(
            f"{flag} {path_text(path)}: cannot write to it (Permission denied); give another file"
        )
    if not path.exists():
        check_folder(path.parent, flag)


def make_folder(path: Path, flag: str) -> None:
    """Make a folder and write a probe to it: rights, quotas and full disks show now, not later."""
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(_PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as problem:
        raise HarnessError(
            f"cannot write to {path_text(path)} ({problem.strerror}); give another folder with "
            f"{flag}"
        ) from problem


def no_space_message(problem: BaseException, places: Mapping[str, Path]) -> str:
    """Return which of the places has no space left; "" for an error that means something else.

    `places` holds folders by the option that names them. An error means it by its number, or by
    its words.
    """
    full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and not re.search(_NO_SPACE_TEXT, str(problem), re.IGNORECASE):
        return ""
    path = problem.filename if isinstance(problem, OSError) and problem.filename else None
    if path is not None:
        return f"no space left on the device ({path_text(path)})"
    free = {flag: _free_or_zero(folder) for flag, folder in places.items()}
    fullest = min(free, key=lambda flag: free[flag])
    return (
        f"no space left on the device ({fullest} {path_text(places[fullest])} has "
        f"{free[fullest] / 2**20:.1f} MiB free)"
    )


def _free_or_zero(path: Path) -> float:
    try:
        return free_bytes(path)
    except OSError:
        return 0
