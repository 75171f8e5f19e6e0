"""Says an error of the system in one line: which path, what happened, and what to do about it."""

import errno
import os

from harness.errors import in_one_line

MAX_PATH_CHARACTERS = 120  # characters of a path: an over-long one must not fill the terminal


_ADVICE = {
    errno.ENOSPC: "free some space there, or give another folder",
    errno.EDQUOT: "free some of your quota there, or give another folder",
    errno.ENOTDIR: "a file stands where a folder should be; give another path",
    errno.EEXIST: "a file stands where a folder should be; give another path",
    errno.EISDIR: "a folder stands where a file should be; give another path",
    errno.EACCES: "give a path that you may use, or its owner's leave",
    errno.EPERM: "give a path that you may use, or its owner's leave",
    errno.EROFS: "give a folder that can be written to",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOENT: "look whether the path is right",
    errno.ELOOP: "its links lead in a circle; give another path",
    errno.EMFILE: "too many files are open: type ulimit -n 4096 and try again",
    errno.EIO: "the disk does not read or write; give a path on another one",
}


def path_text(path: object) -> str:
    """Return a path as errors show it: in one line, a very long one without its middle."""
    text = (
        " ".join(os.fsdecode(path).split())
        if isinstance(path, (str, bytes, os.PathLike))
        else str(path)
    )
    half = MAX_PATH_CHARACTERS // 2
    return text if len(text) <= MAX_PATH_CHARACTERS else f"{text[: half - 2]} … {text[-half + 2 :]}"


def describe_os_error(problem: OSError) -> str:
    """Return a line on an error of the system: which path, what happened, what to do about it."""
    if problem.strerror is None or problem.errno is None:  # a library's own words
        return in_one_line(problem)
    path = problem.filename2 if problem.filename is None else problem.filename
    place = f"{path_text(path)}: " if path is not None and not isinstance(path, int) else ""
    advice = _ADVICE.get(problem.errno, "")
    return f"{place}{problem.strerror}{'; ' + advice if advice else ''}"
