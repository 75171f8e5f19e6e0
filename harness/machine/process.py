"""Watches over a process of ours: its signs of life, its log's size, its time; and lets no process
outlive its parent. No torch.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LOG_BYTES = 8 * 2**20  # bytes of a log: more is cut to its end
KEPT_LOG_BYTES = 2**20  # bytes that are left then
LOG_TAIL_BYTES = 4_000  # bytes of a log that are read for its last words
POLL_SECONDS = 0.2  # seconds between two looks at a process
# seconds in which what a process has said is still read: a grandchild may hold its pipe for ever
_DRAIN_SECONDS = 0.5
_MAX_LINE_CHARACTERS = 1_000_000  # characters of one line from a process
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended: its exit code (negative: a signal), the end of its log, and whether its
    time was over.
    """

    code: int
    log: str
    late: bool = False


def watch_process(
    process: "subprocess.Popen[str]",
    log: Path,
    heard: Callable[[dict[str, Any]], None],
    *,
    seconds: float | None = None,
) -> ProcessEnd:
    """Wait for a process, not for the end of its pipe; pass on what it says, keep its log small,
    end it after `seconds`.

    Whatever interrupts the wait ends the process, and what that has started.
    """
    lines = _line_queue(process)
    over = None if seconds is None else time.monotonic() + seconds
    late = False
    try:
        while process.poll() is None:
            _pass_on(lines, heard, POLL_SECONDS)
            shorten_log(log)
            if over is not None and time.monotonic() > over:
                late = True
                end_process(process)
        until = time.monotonic() + _DRAIN_SECONDS
        while (
            _pass_on(lines, heard, max(0.0, until - time.monotonic())) and time.monotonic() < until
        ):
            pass
    except BaseException:
        end_process(process)
        raise
    finally:
        shorten_log(log)
    return ProcessEnd(process.returncode, tail_of(log), late)


def _line_queue(process: "subprocess.Popen[str]") -> "queue.SimpleQueue[str | None]":
    """Read a process's lines in a thread of their own; None is their end."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    stream = process.stdout
    assert stream is not None

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := stream.readline(_MAX_LINE_CHARACTERS):
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _pass_on(
    lines: "queue.SimpleQueue[str | None]", heard: Callable[[dict[str, Any]], None], seconds: float
) -> bool:
    """Wait for one line and pass it on; False at the lines' end, or where none came."""
    try:
        line = lines.get(timeout=seconds)
    except queue.Empty:
        return False
    if line is None:
        time.sleep(min(seconds, 0.02))  # its pipe is closed, and it has not ended yet
        lines.put(None)
        return False
    with contextlib.suppress(ValueError, TypeError):  # half a line of a process that was killed
        said = json.loads(line)
        if isinstance(said, dict):
            heard(said)
    return True


def end_process(process: "subprocess.Popen[str]", *, grace: float = 5.0) -> None:
    """End a process and what it has started: asked first, killed after `grace` seconds."""
    started = list(descendants(process.pid))
    process.terminate()
    try:
        process.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for number in started:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)


def descendants(number: int) -> Iterator[int]:
    """Yield the processes that a process has started, and theirs; none where there is no /proc."""
    for path in Path(f"/proc/{number}/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            for child in map(int, path.read_text().split()):
                yield from descendants(child)
                yield child


def shorten_log(log: Path, *, most: int = MAX_LOG_BYTES, kept: int = KEPT_LOG_BYTES) -> None:
    """Cut a log that has grown beyond `most` bytes to its last `kept`; its writers append, so they
    go on behind them.
    """
    with contextlib.suppress(OSError):
        size = log.stat().st_size
        if size <= most:
            return
        rest = _end_of(log, kept)
        with log.open("r+b") as stream:
            stream.truncate(0)
        with log.open("ab") as stream:
            stream.write(
                f"[the first {size - len(rest):,} bytes of this log were dropped]\n".encode() + rest
            )


def tail_of(log: Path, most: int = LOG_TAIL_BYTES) -> str:
    """Return the end of a log as text, whatever its size; "" where it cannot be read."""
    try:
        return _end_of(log, most).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _end_of(log: Path, most: int) -> bytes:
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
        return stream.read(most)


def end_with_parent(parent: int) -> None:
    """End this process when its parent is gone, whatever it was killed by: an orphan would hold the
    machine.

    `parent` is the id that the parent gave: read here, it could be another one already.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
