"""Faults below a program's writer: an event of a watched folder is refused, or kills a process.

Watched events: a file is opened, written, synced, renamed or removed.

An event is an opened, written, synced, renamed or removed file. `watch` stands in for the functions
of Python, safetensors and torch that make them; the program that is tried has no part in it. It
takes its orders from two variables of the environment, so that the processes that it starts obey
them too. No torch, no harness: it is loaded before either.
"""

import builtins
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT, FAULT = "KILLS_ROOT", "KILLS_FAULT"  # the watched folder; the fault as JSON
ANY = "any"
STRUCK = "struck"  # the operation under which the log says that a fault came
_TORN = re.compile(r"^\.(.+?)(\.\d+)?\.part$")
_CELL = {
    "job.json": "job",
    "log.txt": "log",
    "samples.jsonl": "samples",
    "record.json": "record",
    "teacher-reads.safetensors": "teacher reads",
    "teacher-reads.json": "teacher reads",
}
_STUDENT = {
    "cost.json": "cost",
    "done.json": "done",
    "training.jsonl": "training log",
    "best.pt": "best",
    "best.part": "best",
}
_CACHE = {
    "answers": "answers",
    "traces": "traces",
    "teachers": "teacher cache",
    "rates": "rates",
    "digests": "digests",
}


@dataclass(frozen=True)
class Fault:
    """What happens at which event. Events are counted from 1 in each process and attempt."""

    # kill group | kill parent | kill self | torn | short | ENOSPC, EIO ...
    deed: str = "kill group"
    operation: str = ANY
    kind: str = ANY
    process: str = ANY  # "command", or the name of a cell's folder
    path: str = ""  # "" for any
    number: int = 1
    after: int = 0  # bytes that are written before a write fails
    delay: float = 0.0  # seconds from the event to a kill, in which the process goes on
    lasting: bool = False  # every later event too: a disk that stays full

    @property
    def goes_on(self) -> bool:
        """Tell whether the process that the fault finds comes to the end of what it was writing."""
        late = self.deed.startswith("kill") and self.delay > 0
        return late or self.deed in ("short", "kill parent")

    def as_json(self) -> str:
        """Return what a process reads from its environment."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        times = f"from {self.number} on" if self.lasting else f"number {self.number}"
        later = f" + {1000 * self.delay:.0f} ms" if self.delay else ""
        return f"{self.deed} at {self.operation} of {self.kind} ({times} in {self.process}){later}"


def log_of(root: Path) -> Path:
    """Return the log beside a watched folder: process, operation, kind and path of each event."""
    return root.with_name(f"{root.name}.events")


def path_when_finished(inside: Path) -> str:
    """Return a path below the watched folder without the names of half-written files."""
    return "/".join(_TORN.sub(r"\1", part) for part in inside.parts)


def kind_of(inside: Path) -> str:
    """Return what kind of file a path below the watched folder (`store/`, `cache/`) is."""
    parts = path_when_finished(inside).split("/")
    name = parts[-1]
    if name.startswith(".probe-"):
        return "probe"
    if parts[0] == "cache":
        return "cache lock" if name.endswith(".lock") else _CACHE.get(parts[1], "other")
    area = parts[1] if len(parts) > 2 else ""
    if area == "runs":
        return "run list"
    if area == "locks":
        return "lock" if name.endswith(".lock") else "lock note"
    if area == "cells":
        return "answers" if "answers" in parts else _CELL.get(name, "other")
    if "state" in parts or name == "state.part":
        return "state"
    if "student" in parts[3:4]:
        return "student"
    return _STUDENT.get(name, "other")


class _Real:
    """The functions that are stood in for, as they were."""

    io_open = staticmethod(io.open)
    os_open = staticmethod(os.open)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    replace = staticmethod(os.replace)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    rmtree = staticmethod(shutil.rmtree)


class _Watch:
    """What this process watches, which fault it waits for, and how many events it has seen."""

    def __init__(self, root: Path, fault: Fault | None) -> None:
        self.root, self.fault = root, fault
        self.log = str(log_of(root))
        self.seen = 0
        self.renamed: Path | None = None  # last

    def event(self, operation: str, path: Path) -> bool:
        """Note an event; tell whether the fault comes now."""
        inside = path.relative_to(self.root)
        kind, process = kind_of(inside), process_name()
        self.note(process, operation, kind, path)
        fault = self.fault
        matches = fault and (
            fault.process in (ANY, process)
            and fault.operation in (ANY, operation)
            and fault.kind in (ANY, kind)
            and fault.path in ("", path_when_finished(inside))
        )
        if fault is None or not matches:
            return False
        self.seen += 1
        if self.seen == fault.number or (fault.lasting and self.seen > fault.number):
            self.note(process, STRUCK, kind, path)
            return True
        return False

    def note(self, process: str, operation: str, kind: str, path: Path) -> None:
        """Append a line to the log."""
        line = f"{process}\t{operation}\t{kind}\t{path.relative_to(self.root)}\n"
        log = _Real.os_open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _Real.write(log, line.encode())
        finally:
            os.close(log)


_watch: _Watch | None = None


def process_name() -> str:
    """Return the name of a cell's folder in a cell's process, "command" in any other."""
    of_cell = len(sys.argv) == 3 and sys.argv[0].endswith("cell.py")
    return Path(sys.argv[1]).parent.name if of_cell else "command"


def watch_from_environment() -> None:
    """Watch what the environment names; nothing where it names nothing."""
    if root := os.environ.get(ROOT):
        fault_json = os.environ.get(FAULT)
        watch(Path(root), Fault(**json.loads(fault_json)) if fault_json else None)


def watch(root: Path, fault: Fault | None) -> None:
    """Note every event below a folder from now on, and let the fault come."""
    global _watch
    fresh = _watch is None
    _watch = _Watch(root, fault)
    if fresh:
        builtins.open = io.open = _open  # type: ignore[assignment]
        os.open, os.write, os.fsync = _os_open, _os_write, _os_fsync
        os.replace, os.rename, os.unlink = (
            _stand_in_for_move(_Real.replace),
            _stand_in_for_move(_Real.rename),
            _unlink,
        )
        shutil.rmtree = _rmtree  # type: ignore[assignment]
        _watch_libraries()


def _watched_path(path: object) -> Path | None:
    """Return an absolute path that lies below the watched folder, None for any other."""
    if _watch is None or not isinstance(path, (str, os.PathLike)):
        return None
    absolute = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100  links are not followed
    return absolute if _watch.root in absolute.parents else None


def _path_of(descriptor: int) -> Path | None:
    try:
        return _watched_path(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return None


def _event(operation: str, path: Path | None) -> None:
    if path is not None and _watch is not None and _watch.event(operation, path):
        _let_fault_come(path)


def _let_fault_come(path: Path, refuse: Callable[[int], Exception] | None = None) -> None:
    """Let the fault come: kill, tear a file, or raise what the system (or a library) says."""
    assert _watch is not None and _watch.fault is not None
    fault = _watch.fault
    if fault.deed.startswith("kill"):
        if fault.delay:
            threading.Thread(target=_kill, args=(fault.deed, fault.delay), daemon=True).start()
        else:
            _kill(fault.deed, 0.0)
    elif fault.deed == "torn":
        _tear(path)
        _kill("kill group", 0.0)
    elif fault.deed != "short":
        number = getattr(errno, fault.deed)
        raise (refuse(number) if refuse else OSError(number, os.strerror(number), str(path)))


def _kill(deed: str, delay: float) -> None:
    time.sleep(delay)
    if deed == "kill group":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpgrp() if deed == "kill parent" else os.getpid(), signal.SIGKILL)


def _tear(path: Path) -> None:
    """Cut a file, or each file of a folder, to half, as a power cut does to unsynced files."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        os.truncate(file, file.stat().st_size // 2)


def _open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
    path = _watched_path(file) if set(mode) & set("wax+") else None
    if path is None or _watch is None:
        return _Real.io_open(file, mode, *rest, **named)
    _event("open", path)
    if not _watch.event("write", path) or "+" in mode:
        return _Real.io_open(file, mode, *rest, **named)
    return _open_failing(path, mode, *rest, **named)


def _open_failing(
    path: Path,
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> Any:
    """Open a file whose writing fails, as Python opens one."""
    raw = io.BufferedWriter(_FailingFile(path, mode.replace("t", "").replace("b", "")))
    if "b" in mode:
        return raw
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)


class _FailingFile(io.RawIOBase):
    """A file that accepts `after` bytes; then the fault comes.

    It has no file number, so that numpy must write through it.

    A log is the exception: it is handed to another process, which writes past us, so its fault
    comes then.
    """

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__()
        self._path, self._file = path, _Real.io_open(path, f"{mode}b", buffering=0)
        self._is_for_others = _watch is not None and kind_of(path.relative_to(_watch.root)) == "log"
        self._taken, self._struck = 0, False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, place: int, whence: int = 0) -> int:
        return int(self._file.seek(place, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def fileno(self) -> int:
        if not self._is_for_others:
            return super().fileno()
        if not self._struck:
            self._strike()
        return int(self._file.fileno())

    def write(self, data: Any) -> int:
        assert _watch is not None and _watch.fault is not None
        text, room = bytes(data), _watch.fault.after - self._taken
        if self._struck or len(text) <= room:
            self._taken += len(text)
            return int(self._file.write(text))
        self._file.write(text[:room])
        self._strike()
        return max(1, room) if room else int(self._file.write(text))

    def _strike(self) -> None:
        self._struck = True
        _let_fault_come(self._path)

    def close(self) -> None:
        if not self.closed:
            try:
                if not self._struck:  # a file that is shorter than `after`
                    self._strike()
            finally:
                self._file.close()
                super().close()


def _os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "dir_fd" not in named:
        _event("open", _watched_path(path))
    return _Real.os_open(path, flags, *rest, **named)


def _os_write(descriptor: int, data: Any) -> int:
    path = _path_of(descriptor)
    if path is None or _watch is None or not _watch.event("write", path):
        return _Real.write(descriptor, data)
    assert _watch.fault is not None
    if _watch.fault.deed == "short":
        return _Real.write(descriptor, bytes(data)[: max(1, len(data) // 2)])
    if _watch.fault.after:
        _Real.write(descriptor, bytes(data)[: _watch.fault.after])
    if _watch.fault.deed == "torn":
        _Real.write(descriptor, data)
    _let_fault_come(path)
    return len(data)


def _os_fsync(descriptor: int) -> None:
    path = _path_of(descriptor if isinstance(descriptor, int) else descriptor.fileno())
    if path is not None and path.is_dir():
        _event("folder", _watch.renamed if _watch else None)
    else:
        _event("sync", path)
    _Real.fsync(descriptor)


def _stand_in_for_move(real: Callable[..., None]) -> Callable[..., None]:
    def moved(source: Any, target: Any, **named: Any) -> None:
        path = _watched_path(target)
        _event("rename", path)
        real(source, target, **named)
        if path is not None and _watch is not None:
            _watch.renamed = path
            _event("renamed", path)

    return moved


def _unlink(path: Any, **named: Any) -> None:
    if "dir_fd" not in named and os.path.lexists(path):
        _event("remove", _watched_path(path))
    _Real.unlink(path, **named)


def _rmtree(path: Any, *rest: Any, **named: Any) -> None:
    if os.path.lexists(path):
        _event("remove", _watched_path(path))
    _Real.rmtree(path, *rest, **named)


def _watch_libraries() -> None:
    """Stand in for what safetensors and torch write past Python, where they are loaded."""
    if "safetensors.torch" in sys.modules:
        from safetensors import SafetensorError, torch

        words = "Error while serializing: I/O error: {} (os error {})"
        torch.serialize_file = _stand_in_for_writer(
            torch.serialize_file,
            lambda number: SafetensorError(words.format(os.strerror(number), number)),
        )
    if "torch" in sys.modules:
        import torch as torch_library

        message = (
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"
        )
        torch_library.save = _stand_in_for_writer(
            torch_library.save, lambda number: RuntimeError(message)
        )


def _stand_in_for_writer(
    real: Callable[..., None], refuse: Callable[[int], Exception]
) -> Callable[..., None]:
    """Return a library's writer that cuts its file after writing.

    The file that remains is the same as after a fault in the middle.
    """

    def write(content: Any, file: Any, *rest: Any, **named: Any) -> None:
        path = _watched_path(file)
        _event("open", path)
        real(content, file, *rest, **named)
        if path is not None and _watch is not None and _watch.event("write", path):
            assert _watch.fault is not None
            if not _watch.fault.goes_on:  # what a process wrote that lives on is whole
                os.truncate(path, min(_watch.fault.after, path.stat().st_size))
            _let_fault_come(path, refuse)

    return write
