"""Chooses a row's learning rate on held-out training rows, once for all seeds."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from harness.contract import Job, Progress
from harness.data.examples import examples_digest, training_examples
from harness.errors import CellFailed
from harness.files.closure import code_digest
from harness.files.digests import digest_of
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed, write_signed
from harness.machine.gpu import device_label
from harness.machine.memory import release_memory
from harness.models.language_model import LanguageModel
from harness.models.shape import forward_flops_per_token
from harness.registry import settings_with_defaults
from methods.training.cost import step_flops
from methods.training.loop import fit
from methods.training.rows import TokenRow
from methods.training.settings import LoopSettings, Training
from methods.training.state import TrainingResult, remove_state
from methods.training.term_progress import TrainingDiverged
from methods.training.terms import Objective

HELD_OUT_SHARE = 0.1  # of the training rows
MAX_RATE_FACTOR = 64.0  # between the first rate and the furthest that is tried


class TunedRate(NamedTuple):
    """The result of a search for the learning rate."""

    settings: LoopSettings  # with the best rate
    notes: dict[str, Any]  # for the record
    cost: dict[str, Any]  # of the search, with the fields of `SharedCost`


def tune_learning_rate(
    method: Any,
    job: Job,
    rows: Sequence[TokenRow],
    loop: LoopSettings,
    *,
    training: Training,
    student: Callable[[int], LanguageModel],
    objective: Callable[[], Objective],
) -> TunedRate:
    """Find the learning rate of the lowest held-out loss.

    Half, once and twice the method's own rate are tried; then further rates, while the best one is
    the smallest or largest so far. Every trial is a full training on nine tenths of the rows at
    seed 1, so the choice uses neither validation nor test items. The result is cached by content:
    other seeds read it. `training` gives the tokens that each trial sees and its precision;
    `student` makes a student from a seed.
    """
    key = _search_key(method, job, loop, training)
    path = job.cache / "rates" / f"{key[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        result = _read(path)
        if result is None:
            if path.exists():
                detail = f"the cached rates {path.name} are damaged; the search is repeated"
                job.progress(Progress(stage="tune", done=0, total=1, detail=detail))
            result = _search(
                job, rows, loop, key=key, training=training, student=student, objective=objective
            )
            write_signed(path, result)
    losses = result["losses"]
    best = min(losses, key=lambda rate: losses[rate])
    return TunedRate(
        settings=replace(loop, learning_rate=float(best)),
        notes={"learning_rate": float(best), "rates_tried": losses},
        cost={"key": path.stem, **result["cost"]},
    )


def _search_key(method: Any, job: Job, loop: LoopSettings, training: Training) -> str:
    """Return a digest of all that the result of a search depends on; the seed is not among it."""
    method_settings = {
        name: value
        for name, value in settings_with_defaults(method).items()
        if name != "learning_rate"
    }
    models = [
        job.student,
        job.student_base.digest,
        [teacher.digest for teacher in job.teachers],
        list(job.teacher_weights),
    ]
    return digest_of(
        "rate",
        code_digest(type(method), __name__),
        type(method).__name__,
        method_settings,
        loop.learning_rate,
        models,
        examples_digest(training_examples(job.tasks, job.source, rows=job.budget.rows)),
        {"seen_tokens": training.seen_tokens, "mixed_precision": training.mixed_precision},
        device_label(job.device),
        job.dtype,
    )


def _read(path: Any) -> dict[str, Any] | None:
    """Return a cached search, None where there is none or it is damaged."""
    try:
        result = read_signed(path)
        return result if result["losses"] and result["cost"] else None
    except (ValueError, LookupError, TypeError):
        return None


def _cached_trial(folder: Path, key: str, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the trial of one rate: what a killed search has saved, else trained and saved."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trial.json"
    with suppress(Unreadable):
        saved = read_signed(path)
        if saved.get("key") == key:
            return saved
    trial = train()
    write_signed(path, {"key": key, **trial})
    remove_state(folder)
    return trial


def _search(
    job: Job,
    rows: Sequence[TokenRow],
    loop: LoopSettings,
    *,
    key: str,
    training: Training,
    student: Callable[[int], LanguageModel],
    objective: Callable[[], Objective],
) -> dict[str, Any]:
    """Try rates; return {"losses": {rate: held-out loss}, "cost": cost} with those that train."""
    search = _RateSearch(
        job=job,
        loop=loop,
        key=key,
        training=training,
        new_student=student,
        new_objective=objective,
        split=_split(rows),
    )
    search.walk()
    losses = {
        f"{rate:g}": round(loss, 6)
        for rate, loss in sorted(search.losses.items())
        if loss < float("inf")
    }
    if not losses:
        rates = ", ".join(f"{rate:g}" for rate in sorted(search.losses))
        raise CellFailed(f"no learning rate of {rates} trains; give a smaller learning_rate")
    return {"losses": losses, "cost": {**search.cost, "seconds": round(search.cost["seconds"], 3)}}


class _Split(NamedTuple):
    """The training rows of a search, in two parts."""

    trained: list[TokenRow]
    held_out: list[TokenRow]
    mean_length: float  # of all rows, in tokens


def _split(rows: Sequence[TokenRow]) -> _Split:
    """Hold out a tenth of the prompts, with all their rows: one problem may have several traces."""
    prompts = sorted(set(map(_prompt_ids, rows)))
    random.Random("held out").shuffle(prompts)
    held_out_prompts = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
    is_held_out = [_prompt_ids(row) in held_out_prompts for row in rows]
    return _Split(
        trained=[row for row, out in zip(rows, is_held_out, strict=True) if not out],
        held_out=[row for row, out in zip(rows, is_held_out, strict=True) if out],
        mean_length=sum(len(row.ids) for row in rows) / len(rows),
    )


def _prompt_ids(row: TokenRow) -> tuple[int, ...]:
    """Return the tokens of a row's prompt, or all of a text that has none."""
    return row.ids[: row.trained_from] if row.trained_from > 1 else row.ids


@dataclass(kw_only=True)
class _RateSearch:
    """Tries learning rates from the method's own outwards."""

    job: Job
    loop: LoopSettings
    key: str
    training: Training
    new_student: Callable[[int], LanguageModel]  # of a seed
    new_objective: Callable[[], Objective]
    split: _Split
    losses: dict[float, float] = field(default_factory=dict)  # infinite where training diverged
    cost: dict[str, float] = field(
        default_factory=lambda: {"tokens": 0, "seconds": 0.0, "flops": 0.0}
    )

    def walk(self) -> None:
        """Try three rates, then further ones while the best is at an edge, up to the limit."""
        start = self.loop.learning_rate
        for rate in (start, start / 2, start * 2):
            self._try(rate)
        for factor, edge in ((2.0, max), (0.5, min)):
            best = self._best_rate()
            while (
                best == edge(self.losses)
                and 1 / MAX_RATE_FACTOR <= best * factor / start <= MAX_RATE_FACTOR
            ):
                self._try(best * factor)
                best = self._best_rate()

    def _best_rate(self) -> float:
        return min(self.losses, key=self.losses.__getitem__)

    def _try(self, rate: float) -> None:
        folder = self.job.workdir / f"rate-{rate:g}"
        trial = _cached_trial(folder, self.key, lambda: self._train(rate, folder))
        self.losses[rate] = float("inf") if trial["loss"] is None else trial["loss"]
        for name in self.cost:
            self.cost[name] += trial[name]

    def _train(self, rate: float, folder: Path) -> dict[str, Any]:
        """Train at one rate; return its held-out loss, None where it diverged, and its cost."""
        began, student, objective = time.monotonic(), self.new_student(1), self.new_objective()
        try:
            result = fit(
                student,
                rows=self.split.trained,
                validation=self.split.held_out,
                objective=objective,
                settings=replace(self.loop, learning_rate=rate),
                training=self._trial_training(rate, folder),
            )
        except TrainingDiverged:  # such a rate is not chosen
            return {"loss": None, "tokens": 0, "flops": 0.0, "seconds": time.monotonic() - began}
        finally:
            release_memory(self.job.device)
        return {
            "loss": result.best,
            "tokens": result.seen,
            "flops": self._flops(student, objective, result),
            "seconds": time.monotonic() - began,
        }

    def _trial_training(self, rate: float, folder: Path) -> Training:
        def report(progress: Progress) -> None:
            detail = f"rate {rate:g}, {progress.detail}"
            self.job.progress(replace(progress, stage="tune", detail=detail))

        return replace(self.training, seed=1, workdir=folder, track="", progress=report)

    def _flops(self, student: LanguageModel, objective: Objective, result: TrainingResult) -> float:
        length = self.split.mean_length
        forward = forward_flops_per_token(student.model, length)
        teachers = sum(
            forward_flops_per_token(teacher.model, length) for teacher in objective.live_teachers
        )
        step = step_flops(student.model, forward)
        return (step + teachers) * result.seen + forward * result.written
