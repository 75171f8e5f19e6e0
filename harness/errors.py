"""Errors that the user can fix: one line with what was given, what is right, what to type next."""

import re
import signal
from collections.abc import Iterable

from harness.escape import clean


class OneLine(Exception):
    """An error whose message is one line that any terminal may show."""

    def __init__(self, message: str = "") -> None:
        super().__init__(clean(message))


class HarnessError(OneLine):
    """A user's mistake. Printed without traceback; the command exits with status 2."""


class CellFailed(OneLine):
    """A method could not make its student, for a reason that the table shows (*failed: reason*)."""


class Skipped(CellFailed):
    """A row that needs a package or a device that this machine lacks.

    The table shows it as *skipped: reason*; it is no failure.
    """


class OldName(FutureWarning):
    """Something is written by its name of an older version; it is read, and one line says so."""


def unknown(what: str, given: str, known: Iterable[str], *, hint: str = "") -> HarnessError:
    """Build the error for a name that is not in a table, with the nearest name that is."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
    return HarnessError(f"unknown {what} {given!r}{guess}{' ' + hint if hint else ''}")


def in_one_line(problem: BaseException) -> str:
    """Say what a library raised in one line: its kind, and its first 200 characters."""
    return f"{type(problem).__name__}: {' '.join(clean(str(problem)).split())[:200]}"


def how_it_ended(code: int, log: str) -> str:
    """Say in one line how a process ended that left no answer: its signal, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if says_no_memory(log):
            return f"out of memory ({name}){_memory_limit()}"
        if -code in CRASHES:
            return f"crashed ({name}{_crash_place(log)})"
        return f"killed ({name}{', perhaps for want of memory' if -code == signal.SIGKILL else ''})"
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "no output")
    if says_no_memory(log):
        return f"out of memory ({clean(last)[:120]}){_memory_limit()}"
    return f"ended with status {code}: {clean(last)[:200]}"


# by the process's own fault
CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
# What libraries, the loader and the C++ runtime say where an allocation or a mapping fails, or a
# thread has no room for its stack.
_NO_MEMORY = (  # looked for in any case
    r"out of memory|(can't|cannot|could not|unable to) allocate|failed to map "
    r"segment|std::bad_alloc|MemoryError|OpenBLAS.*alloc|"
    r"can't start new thread|thread creation failed|pthread_create failed|failed to create "
    r"thread|Errno 12\b|cudaErrorMemoryAllocation"
)


def says_no_memory(text: str) -> bool:
    """Tell whether an error, or the last words of a process, report a lack of memory."""
    return re.search(_NO_MEMORY, text, re.IGNORECASE) is not None


def _memory_limit() -> str:
    """Return a hint about the shell's limit of a process's memory, "" where there is none."""
    try:
        import resource

        kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
        limits = [limit for limit, _ in map(resource.getrlimit, kinds) if limit >= 0]
    except (ImportError, AttributeError, OSError):
        return ""
    if not limits:
        return ""
    return (
        f"; this shell allows {min(limits) / 2**30:.1f} GiB to a process: type ulimit -v "
        "unlimited, or give a smaller model"
    )


def _crash_place(log: str) -> str:
    """Return where Python was when native code crashed, from the fault handler's text, or ""."""
    match = re.search(
        r"(?:Current thread|Thread) 0x[0-9a-f]+[^\n]*:\n\s+File \"([^\"]+)\", line (\d+) in (\S+)",
        log,
    )
    return f" in {match[3]}, {match[1].rpartition('/')[2]} line {match[2]}" if match else ""
