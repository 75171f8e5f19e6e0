"""Errors that are the user's to mend: one line that says what was given, what is right and what to type next."""

import difflib
import signal
from collections.abc import Iterable

from harness.escape import clean


class OneLine(Exception):
    """An error whose message is one line that any terminal may show, whatever the names and reasons in it hold."""

    def __init__(self, message: str = "") -> None:
        super().__init__(clean(message))


class HarnessError(OneLine):
    """A user's mistake. Printed without traceback; the command exits with status 2."""


class CellFailed(OneLine):
    """A method could not make its student, for a reason worth a line in the table (*failed: reason*)."""


class Skipped(CellFailed):
    """A row that this machine cannot make for want of a package or a device: it stands in the table as *skipped: reason*, no failure."""


def unknown(what: str, given: str, known: Iterable[str], *, hint: str = "") -> HarnessError:
    """Build the error for a name that is not in a table, with the nearest name that is."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
    return HarnessError(f"unknown {what} {given!r}{guess}{' ' + hint if hint else ''}")


def in_one_line(problem: BaseException) -> str:
    """Say what a library raised in one line: its kind, and its first 200 characters."""
    return f"{type(problem).__name__}: {' '.join(clean(str(problem)).split())[:200]}"


def how_it_ended(code: int, log: str) -> str:
    """Say in one line how a process ended that left no answer: by which signal, or with which last words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed ({name}{', perhaps for want of memory' if -code == signal.SIGKILL else ''})"
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "no output")
    return f"ended with status {code}: {clean(last)[:200]}"
