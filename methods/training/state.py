"""The loop's state: where a training stands, and how it is kept so that a run that was killed goes
on from it.

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

# 0: a state after each step
SECONDS_BETWEEN_STATES = float(os.environ.get("HARNESS_STATE_SECONDS", "20"))
# in times of the last save, so that a large model's states take a twentieth of its training at most
SAVES_BETWEEN_STATES = 20
_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT)
class TermState:
    """What one term of the loss was at the first and at the last step, unweighted, and its
    weight.
    """

    first: float
    gradient_norm: float | None  # of the weighted term alone, when it was last computed
    weight: float
    last: float


@dataclass(config=_STRICT)
class LoopState:
    """Where a training stands. The names are those in `loop.json`, in its order."""

    step: int = 0
    epoch: int = 0
    seen: int = 0  # tokens, prompts included, padding not
    trained: int = 0  # tokens
    start_ce: float = math.inf  # validation loss before the first step, nats a token
    best: float = math.inf  # lowest validation loss of an epoch
    kept_step: int = 0  # the step that it was reached at; 0: no epoch has ended
    seconds: float = 0.0  # of training, saving left out
    teacher_seconds: float = 0.0
    teacher_tokens: int = 0
    energy_joules: float | None = 0.0  # None: a counter could not be read
    since_best: int = 0  # epochs
    means: dict[str, float] = dataclasses.field(default_factory=dict)  # each term's running mean
    terms: dict[str, TermState] = dataclasses.field(default_factory=dict)
    written: int = 0  # tokens that the student wrote, on-policy
    writing_seconds: float = 0.0
    over: bool = False  # the budget is spent: a run killed after its last step makes no other

    @classmethod
    def read(cls, saved: Mapping[str, Any], where: Path) -> Self:
        """Return a saved state. Raises `Unreadable` where a field is unknown, missing or of another
        type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if lacking := [name for name in known if name not in saved]:
            raise Unreadable(f"{where}: it lacks the fields {', '.join(lacking)}")
        if unknown := [name for name in saved if name not in known]:
            raise Unreadable(f"{where}: it has fields that are unknown here ({', '.join(unknown)})")
        try:
            return TypeAdapter(cls).validate_python(dict(saved))
        except ValidationError as problem:
            first = problem.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise Unreadable(
                f"{where}: its field {field} is unreadable ({first['msg']})"
            ) from problem


@dataclass(config=_STRICT)
class TrainingResult(LoopState):
    """Where a training ended, and what it took beside what its state counts."""

    devices: int = 1
    device_seconds: float = 0.0
    energy_source: str = ""
    peak_bytes: int | None = None

    @classmethod
    def of(cls, state: LoopState, **beside: Any) -> Self:
        """Return a state with what stands beside it."""
        own = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return cls(**own, **beside)


class SavedStates:
    """Resumable state in a folder: always one whole copy on disk, whatever moment the process dies
    at.
    """

    def __init__(self, folder: Path, accelerator: Any) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.saved_at = time.monotonic()
        self.pause = SECONDS_BETWEEN_STATES

    def restore(self) -> LoopState | None:
        """Load the last whole state into model and optimizers and return it; None where training
        begins anew.
        """
        for torn in self.folder.glob("*.part"):
            shutil.rmtree(torn, ignore_errors=True)
        whole = sorted(
            self.folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2])
        )
        if not whole:
            return None
        try:
            state = self._read(whole[-1])
        except Unreadable as problem:
            print(f"{problem}; training begins anew", file=sys.stderr)
            _remove(whole[-1])
            return None
        self.accelerator.load_state(str(whole[-1]))
        return state

    def _read(self, folder: Path) -> LoopState:
        saved = read_signed(folder / "loop.json")
        if saved.pop("files", None) != _digests(folder):
            raise Unreadable(f"{folder}: its files are not as they were written")
        for path in folder.iterdir():
            _refuse_torn_file(path)
        state = LoopState.read(saved, folder)
        if state.kept_step:
            load_best(self.folder.with_name("best.pt"))
        return state

    def save(self, state: LoopState, *, force: bool = False) -> None:
        """Write the state where the last one is long enough ago; then drop older ones."""
        began = time.monotonic()
        if not force and began - self.saved_at < self.pause:
            return
        self._write(state, self.folder / f"step-{state.step}")
        self.saved_at = time.monotonic()
        if SECONDS_BETWEEN_STATES:
            taken = self.saved_at - began
            self.pause = max(SECONDS_BETWEEN_STATES, SAVES_BETWEEN_STATES * taken)

    def _write(self, state: LoopState, target: Path) -> None:
        fresh = target.with_suffix(".part")
        self.accelerator.save_state(str(fresh))
        write_signed(fresh / "loop.json", {**dataclasses.asdict(state), "files": _digests(fresh)})
        for path in fresh.rglob("*"):
            sync_to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        fresh.replace(target)
        for old in self.folder.glob("step-*"):
            if old != target and old.suffix != ".part":
                _remove(old)


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a saved state but the one that lists them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    listed = (path for path in files if path.name != "loop.json")
    return {str(path.relative_to(folder)): file_digest(path) for path in listed}


def _refuse_torn_file(path: Path) -> None:
    """Raise `Unreadable` for a file that was cut while it was written, whose digest is of the cut
    one.

    Only headers and ends are read. What loads states would raise when the model is half loaded, and
    passes over torn random states.
    """
    if path.suffix in (".bin", ".pkl") and not zipfile.is_zipfile(path):
        raise Unreadable(f"{path}: it was written in part")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return
        except (OSError, SafetensorError) as problem:
            raise Unreadable(f"{path}: {in_one_line(problem)}") from problem


def write_best(weights: Mapping[str, Any], fresh: Path) -> None:
    """Write weights to a file that `keep_best` then gives its name."""
    torch.save(weights, fresh)


def keep_best(fresh: Path, best_file: Path) -> None:
    """Let weights that were written count as the best, once they are on the disk."""
    sync_to_disk(fresh)
    fresh.replace(best_file)


def load_best(best_file: Path) -> Any:
    """Return the best weights so far. Raises `Unreadable` where they are torn: torch checks every
    part's sum.
    """
    try:
        return torch.load(best_file, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as problem:
        raise Unreadable(f"{best_file}: {in_one_line(problem)}") from problem


def remove_state(workdir: Path) -> None:
    """Remove what only a resumed run needs; called once the student is saved. State first: without
    it best.pt is made again.
    """
    if (workdir / "state").exists():
        _remove(workdir / "state")
    shutil.rmtree(workdir / "state.part", ignore_errors=True)  # of a kill within `_remove`
    for name in ("best.pt", "best.part"):
        (workdir / name).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks whole."""
    torn = folder.with_suffix(".part")
    folder.replace(torn)
    shutil.rmtree(torn, ignore_errors=True)
