"""The loop's state: where a training is, and how it is saved so that a killed run resumes.

On disk, below a training's folder: `state/step-N/` holds accelerate's files and `loop.json` with
the fields of `LoopState` and every file's digest; `best.pt` holds the best weights of an epoch so
far.
"""

import dataclasses
import math
import os
import pickle
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open

from harness.errors import in_one_line
from harness.files.digests import file_digest
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed, sync_to_disk, write_signed
from methods.training.snapshots import (
    BackgroundWriter,
    Snapshot,
    copies_fit,
    writes_in_background,
)

# 0: a state after each step
SECONDS_BETWEEN_STATES = float(os.environ.get("HARNESS_STATE_SECONDS", "20"))
# The pause is this many times as long as the last save: saving takes a twentieth of a large model's
# training at most.
SAVES_BETWEEN_STATES = 20
_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT)
class TermState:
    """One term of the loss: its unweighted value at the first and the last step, and its weight."""

    first: float
    gradient_norm: float | None  # of the weighted term alone, when it was last computed
    weight: float
    last: float


@dataclass(config=_STRICT)
class LoopState:
    """Where a training is. The names are those in `loop.json`, in its order."""

    step: int = 0
    epoch: int = 0
    seen: int = 0  # tokens, prompts included, padding not
    trained: int = 0  # tokens
    start_ce: float = math.inf  # validation loss before the first step, nats a token
    best: float = math.inf  # lowest validation loss of an epoch
    kept_step: int = 0  # the step of that loss; 0: no epoch has ended
    seconds: float = 0.0  # of training, without saving
    teacher_seconds: float = 0.0
    teacher_tokens: int = 0
    energy_joules: float | None = 0.0  # None: a counter could not be read
    since_best: int = 0  # epochs
    means: dict[str, float] = dataclasses.field(default_factory=dict)  # each term's running mean
    terms: dict[str, TermState] = dataclasses.field(default_factory=dict)
    written: int = 0  # tokens that the student wrote, on-policy
    writing_seconds: float = 0.0
    over: bool = False  # the budget is spent: a run killed after its last step makes no further one

    @classmethod
    def read(cls, saved: Mapping[str, Any], where: Path) -> Self:
        """Return a saved state.

        Raises `Unreadable` where a field is unknown, missing or of another type.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in saved]:
            raise Unreadable(f"{where}: it lacks the fields {', '.join(missing)}")
        if unknown := [name for name in saved if name not in names]:
            raise Unreadable(f"{where}: it has unknown fields ({', '.join(unknown)})")
        try:
            return TypeAdapter(cls).validate_python(dict(saved))
        except ValidationError as problem:
            error = problem.errors()[0]
            field = ".".join(str(part) for part in error["loc"])
            raise Unreadable(
                f"{where}: its field {field} is unreadable ({error['msg']})"
            ) from problem


@dataclass(config=_STRICT)
class TrainingResult(LoopState):
    """Where a training ended: its last state, and the costs that the state does not count."""

    devices: int = 1
    device_seconds: float = 0.0
    energy_source: str = ""
    peak_bytes: int | None = None

    @classmethod
    def from_state(cls, state: LoopState, **costs: Any) -> Self:
        """Return a state together with further costs, which are given by field name."""
        values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return cls(**values, **costs)


class SavedStates:
    """Resumable states in a folder; whenever the process dies, one complete copy is on disk."""

    def __init__(self, folder: Path, accelerator: Any) -> None:
        self.folder = folder
        self.accelerator = accelerator
        device = getattr(accelerator, "device", torch.device("cpu"))
        self.writer = BackgroundWriter() if writes_in_background(device) else None
        self.saved_at = time.monotonic()
        self.pause = SECONDS_BETWEEN_STATES

    def restore(self) -> LoopState | None:
        """Load the last state into model and optimizers; return it, or None to start afresh."""
        for partial_folder in self.folder.glob("*.part"):
            shutil.rmtree(partial_folder, ignore_errors=True)
        folders = sorted(
            self.folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2])
        )
        if not folders:
            return None
        last_folder = folders[-1]
        try:
            state = self._read(last_folder)
        except Unreadable as problem:
            print(f"{problem}; training starts from the beginning", file=sys.stderr)
            _remove(last_folder)
            return None
        self.accelerator.load_state(str(last_folder))
        return state

    def _read(self, folder: Path) -> LoopState:
        saved = read_signed(folder / "loop.json")
        if saved.pop("files", None) != _digests(folder):
            raise Unreadable(f"{folder}: its files have changed since they were written")
        for path in folder.iterdir():
            _refuse_torn_file(path)
        state = LoopState.read(saved, folder)
        if state.kept_step:
            load_best(self.folder.with_name("best.pt"))
        return state

    def save(self, state: LoopState, *, force: bool = False) -> None:
        """Write the state if the last one is old enough (always with `force`); drop older ones."""
        began = time.monotonic()
        is_writing = self.writer is not None and self.writer.is_busy
        if not force and (is_writing or began - self.saved_at < self.pause):
            return
        self._write(state, self.folder / f"step-{state.step}")
        if force:
            self.wait()
        self.saved_at = time.monotonic()
        if SECONDS_BETWEEN_STATES:
            save_seconds = self.saved_at - began
            self.pause = max(SECONDS_BETWEEN_STATES, SAVES_BETWEEN_STATES * save_seconds)

    def _write(self, state: LoopState, target: Path) -> None:
        """Write a state, in the thread where there is one: it is copied before that.

        Where the copy has no room, training waits.
        """
        part_folder, fields = target.with_suffix(".part"), dataclasses.asdict(state)
        self.wait()
        if self.writer is None or not copies_fit(self.accelerator):
            self.accelerator.save_state(str(part_folder))
            self._complete(part_folder, target, fields)
            return
        snapshot = Snapshot(self.accelerator, part_folder)

        def write() -> None:
            snapshot.write()
            self._complete(part_folder, target, fields)

        self.writer.start(write)

    def wait(self) -> None:
        """Wait until every state is on the disk; raise what writing raised."""
        if self.writer is not None:
            self.writer.wait()

    def close(self) -> None:
        """End the thread, once it has written what it began."""
        if self.writer is not None:
            self.writer.close()

    def _complete(self, part_folder: Path, target: Path, fields: Mapping[str, Any]) -> None:
        """Give a written state its name, once it is on the disk; drop older ones."""
        document = {**fields, "files": _digests(part_folder)}
        write_signed(part_folder / "loop.json", document)
        for path in part_folder.rglob("*"):
            sync_to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        part_folder.replace(target)
        for folder in self.folder.glob("step-*"):
            if folder != target and folder.suffix != ".part":
                _remove(folder)


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a saved state, except `loop.json`, which lists them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    listed = (path for path in files if path.name != "loop.json")
    return {str(path.relative_to(folder)): file_digest(path) for path in listed}


def _refuse_torn_file(path: Path) -> None:
    """Raise `Unreadable` for a file that is incomplete although its digest agrees.

    That happens where the file was cut before the digest was computed. Only headers and ends are
    read. Accelerate would notice too late, with half the model loaded, and would ignore incomplete
    random states.
    """
    if path.suffix in (".bin", ".pkl") and not zipfile.is_zipfile(path):
        raise Unreadable(f"{path}: it is incomplete")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return
        except (OSError, SafetensorError) as problem:
            raise Unreadable(f"{path}: {in_one_line(problem)}") from problem


def write_best(weights: Mapping[str, Any], part_file: Path) -> None:
    """Write weights to a temporary file, which `keep_best` then renames."""
    torch.save(weights, part_file)


def keep_best(part_file: Path, best_file: Path) -> None:
    """Make weights that were written the best ones, once they are on the disk."""
    sync_to_disk(part_file)
    part_file.replace(best_file)


def load_best(best_file: Path) -> Any:
    """Return the best weights so far.

    Raises `Unreadable` where they are incomplete: torch checks the sum of every part.
    """
    try:
        return torch.load(best_file, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as problem:
        raise Unreadable(f"{best_file}: {in_one_line(problem)}") from problem


def remove_state(workdir: Path) -> None:
    """Remove what only a resumed run needs; called once the student is saved.

    The state goes first: a state without best.pt is unreadable, but without a state best.pt is
    simply written again.
    """
    if (workdir / "state").exists():
        _remove(workdir / "state")
    shutil.rmtree(workdir / "state.part", ignore_errors=True)  # left by a kill within `_remove`
    for name in ("best.pt", "best.part"):
        (workdir / name).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks complete."""
    part_folder = folder.with_suffix(".part")
    folder.replace(part_folder)
    shutil.rmtree(part_folder, ignore_errors=True)
