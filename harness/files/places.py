"""Looks at folders and files before anything is computed for them: their kind, the right to write,
the space. No torch.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from harness.errors import HarnessError
from harness.files.problems import shown, told_of

LEAST_FREE = 16 * 2**20  # bytes: less holds not even the embedded pair's run
LITTLE_FREE = 2**30  # bytes: less is worth a line, for it may not hold a student from outside
_PROBE = b"\0" * 4096
# safetensors, torch's zip writer and tar say it in their own words, as no OSError
_NO_SPACE = (  # looked for in any case
    r"no space left on device|os error 28\b|disk quota exceeded|PytorchStreamWriter failed "
    r"writing|enforce fail at inline_container"
)


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where a path is, or would be made."""
    return shutil.disk_usage(_standing(path)).free


def _standing(path: Path) -> Path:
    """Return the nearest folder or file above a path that is there. Raises OSError where the system
    cannot tell (too long, no leave).
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
    """Refuse a folder that cannot be made or written to, or has no space; make nothing. `say` is
    told where little is free.
    """
    try:
        standing = _standing(path)
        free = shutil.disk_usage(standing).free
    except OSError as problem:
        raise HarnessError(f"{flag} {told_of(problem)}") from problem
    if not standing.is_dir():
        raise HarnessError(
            f"{flag} {shown(path)}: {shown(standing)} is a file, and a folder is needed; give "
            f"another folder with {flag}"
        )
    if not os.access(standing, os.W_OK | os.X_OK):
        raise HarnessError(
            f"{flag} {shown(path)}: cannot write to {shown(standing)} (Permission denied); give "
            "another folder"
        )
    if free < LEAST_FREE:
        raise HarnessError(
            f"{flag} {shown(path)}: {free / 2**20:.1f} MiB are free there, too few; free some, or "
            "give another folder"
        )
    if free < LITTLE_FREE:
        say(f"{flag} {shown(path)}: only {free / 2**20:.0f} MiB are free there")


def check_file(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written: a folder of that name, or a place that cannot
    hold it.
    """
    try:
        is_folder = path.is_dir()
        held = path.exists() and not os.access(path, os.W_OK)
    except OSError as problem:
        raise HarnessError(f"{flag} {told_of(problem)}") from problem
    if is_folder:
        raise HarnessError(f"{flag} {shown(path)} is a folder; give a file in it")
    if held:
        raise HarnessError(
            f"{flag} {shown(path)}: cannot write to it (Permission denied); give another file"
        )
    if not path.exists():
        check_folder(path.parent, flag)


def make_folder(path: Path, flag: str) -> None:
    """Make a folder and write to it once: rights, quotas and full disks show here, not in
    an hour.
    """
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(_PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as problem:
        raise HarnessError(
            f"cannot write to {shown(path)} ({problem.strerror}); give another folder with {flag}"
        ) from problem


def no_space(problem: BaseException, places: Mapping[str, Path]) -> str:
    """Say which of the places has no space where that is what an error means, by number or by
    words; "" for other errors.
    """
    full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and not re.search(_NO_SPACE, str(problem), re.IGNORECASE):
        return ""
    named = problem.filename if isinstance(problem, OSError) and problem.filename else None
    if named is not None:
        return f"no space left on the device ({shown(named)})"
    free = {flag: _free(path) for flag, path in places.items()}
    flag = min(free, key=lambda one: free[one])
    return (
        f"no space left on the device ({flag} {shown(places[flag])} has {free[flag] / 2**20:.1f} "
        "MiB free)"
    )


def _free(path: Path) -> float:
    try:
        return free_bytes(path)
    except OSError:
        return 0
