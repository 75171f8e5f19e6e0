"""How a command ends: system errors in one line, broken pipes, signals. No torch."""

import io
import os
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType

from harness.files.problems import describe_os_error

_RESUMABLE = ("run", "train-tiny")  # commands that go on where they stopped


class Stopped(BaseException):
    """A signal asked the program to end.

    It passes every `except Exception`, so that all clean-up runs on the way out.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _ForgivingStream(io.FileIO):
    """A stream whose reader may go away (`| head`).

    Later output is dropped, and the command ends as it would have ended.
    """

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        """Write, or drop what nobody reads."""
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
        except OSError as problem:
            raise OSError(
                problem.errno,
                problem.strerror,
                "standard output" if self.fileno() == 1 else "standard error",
            ) from problem


def guard_streams() -> None:
    """Let standard output and standard error outlive their readers: a broken pipe is no verdict."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or not a file
            continue
        stream.flush()
        raw = _ForgivingStream(number, "w", closefd=False)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                line_buffering=name == "stderr" or raw.isatty(),
                # a path's bytes, or a model's name, need not be text that can be encoded: shown
                # escaped, never a traceback
                errors="backslashreplace" if stream.errors == "strict" else stream.errors,
            ),
        )


def flush_output(code: int) -> int:
    """Write out what is still buffered, and return the exit code.

    Where standard output takes nothing (a full disk) the exit code is 2.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as problem:
        if code != 2:  # it was said already
            print_error(describe_os_error(problem))
        _discard_output()
        return 2
    return code


def _discard_output() -> None:
    """Point standard output to nowhere.

    The interpreter flushes it once more at its end, and would report the error again.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def catch_signals() -> None:
    """Turn SIGTERM and SIGHUP into `Stopped`.

    Processes are ended, the cursor comes back, and the last line says what is kept.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup ignores SIGHUP: so do we
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def stopped_line(reason: str, arguments: list[str]) -> str:
    """Say that a command was stopped, what it kept, and what to type to go on."""
    command = shlex.join(["harness", *arguments])
    if arguments[:1] and arguments[0] in _RESUMABLE:
        return f"stopped ({reason}); finished work is kept; to go on, type: {command}"
    return f"stopped ({reason}); unfinished work is not kept; type again: {command}"


def print_error(line: str) -> None:
    """Print a line of the program to standard error."""
    if sys.stderr is not None:
        print(f"harness: {line}", file=sys.stderr, flush=True)


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    A system error gives 2, Ctrl-C 130, and another signal 128 and its number.
    """
    try:
        return command()
    except OSError as problem:
        print_error(describe_os_error(problem))
        return 2
    except KeyboardInterrupt:
        print_error(stopped_line("Ctrl-C", sys.argv[1:]))
        return 130
    except Stopped as stopped:
        print_error(stopped_line(str(stopped), sys.argv[1:]))
        return 128 + stopped.number
