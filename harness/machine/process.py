"""Watches a child process: its messages, the size of its log, its time limit. No torch.

It also ends a child process whose parent is gone.
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

MAX_LOG_BYTES = 8 * 2**20  # a longer log is cut to its end
KEPT_LOG_BYTES = 2**20  # of a log that is cut
LOG_TAIL_BYTES = 4_000  # read for an error message
POLL_SECONDS = 0.2  # between two checks of a process
# For which the messages of an ended process are still read: a grandchild may hold its pipe open.
_DRAIN_SECONDS = 0.5
_MAX_LINE_CHARACTERS = 1_000_000
_MOST_READS = 100  # of a log whose writer goes on while it is cut
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended: its exit code, the end of its log, whether its time was up."""

    code: int
    log: str
    late: bool = False


def watch_process(
    process: "subprocess.Popen[str]",
    log: Path,
    on_message: Callable[[dict[str, Any]], None],
    *,
    seconds: float | None = None,
) -> ProcessEnd:
    """Wait for a process; pass on its messages, keep its log small, end it after `seconds`.

    It waits for the process and not for its pipe, which a grandchild may hold. Whatever interrupts
    the wait ends the process and all that it has started.
    """
    lines = _line_queue(process)
    deadline = None if seconds is None else time.monotonic() + seconds
    is_late = False
    try:
        while process.poll() is None:
            _pass_on(lines, on_message, POLL_SECONDS)
            shorten_log(log)
            if deadline is not None and time.monotonic() > deadline:
                is_late = True
                end_process(process)
        drain_deadline = time.monotonic() + _DRAIN_SECONDS
        has_lines = True
        while has_lines and time.monotonic() < drain_deadline:
            remaining = max(0.0, drain_deadline - time.monotonic())
            has_lines = _pass_on(lines, on_message, remaining)
    except BaseException:
        end_process(process)
        raise
    finally:
        shorten_log(log)
    return ProcessEnd(process.returncode, tail_of(log), is_late)


def _line_queue(process: "subprocess.Popen[str]") -> "queue.SimpleQueue[str | None]":
    """Read a process's lines in a separate thread; None is their end."""
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
    lines: "queue.SimpleQueue[str | None]",
    on_message: Callable[[dict[str, Any]], None],
    seconds: float,
) -> bool:
    """Wait for one line and pass on its message; False where none came or the lines ended."""
    try:
        line = lines.get(timeout=seconds)
    except queue.Empty:
        return False
    if line is None:
        time.sleep(min(seconds, 0.02))  # its pipe is closed, and it has not ended yet
        lines.put(None)
        return False
    with contextlib.suppress(ValueError, TypeError):  # half a line of a process that was killed
        message = json.loads(line)
        if isinstance(message, dict):
            on_message(message)
    return True


def end_process(process: "subprocess.Popen[str]", *, grace: float = 5.0) -> None:
    """End a process and what it has started: terminated first, killed after `grace` seconds."""
    children = list(descendants(process.pid))
    process.terminate()
    try:
        process.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and theirs; none without /proc."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            for child in map(int, path.read_text().split()):
                yield from descendants(child)
                yield child


def shorten_log(
    log: Path, *, max_bytes: int = MAX_LOG_BYTES, kept_bytes: int = KEPT_LOG_BYTES
) -> None:
    """Cut a log of more than `max_bytes` to its last `kept_bytes`.

    Its writers append, so they continue behind these.
    """
    with contextlib.suppress(OSError):
        size = log.stat().st_size
        if size <= max_bytes:
            return
        begin = size - kept_bytes
        note = f"[the first {begin:,} bytes of this log were dropped]\n".encode()
        with log.open("r+b", buffering=0) as stream:
            stream.seek(begin)
            kept, written = note + stream.read(kept_bytes), 0
            # what is appended meanwhile may be a process's last words: it is moved too
            for _ in range(_MOST_READS):
                read = stream.tell()
                stream.seek(written)
                written += stream.write(kept)
                stream.seek(read)
                if not (kept := stream.read(kept_bytes)):
                    break
            stream.truncate(written)


def tail_of(log: Path, max_bytes: int = LOG_TAIL_BYTES) -> str:
    """Return the end of a log as text, whatever its size; "" where it cannot be read."""
    try:
        return _end_of(log, max_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _end_of(log: Path, max_bytes: int) -> bytes:
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - max_bytes))
        return stream.read(max_bytes)


def end_with_parent(parent: int) -> None:
    """End this process when its parent is gone: an orphan would occupy the machine.

    `parent` is the id that the parent gave. Read here, it could already be another process's.
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
