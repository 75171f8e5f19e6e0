"""Choosing a learning rate for a row: on a held-out slice of the training rows, once, for all
seeds.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from methods.training.loop import fit
from methods.training.rows import TokenRow
from methods.training.settings import LoopSettings, Training
from methods.training.state import remove_state
from methods.training.term_progress import TrainingDiverged
from methods.training.terms import Objective

HELD_OUT_SHARE = 0.1  # of the training rows
MAX_RATE_FACTOR = 64.0  # times or parts of the rate that the search begins with


def tune_learning_rate(
    method: Any,
    job: Job,
    rows: Sequence[TokenRow],
    loop: LoopSettings,
    *,
    training: Training,
    student: Callable[[int], LanguageModel],
    objective: Callable[[], Objective],
) -> tuple[LoopSettings, dict[str, Any], dict[str, Any]]:
    """Return the loop with the rate of the lowest held-out loss, what to note of the search, and
    its cost.

    Half, once and twice the method's own rate are tried, then further on while the best stands at
    an edge. Every trial is a whole training on nine tenths of the rows at seed 1, so the choice
    knows neither validation nor test items. It is kept by content: other seeds read it. `training`
    says how many tokens each trial sees, and at which precision.
    """
    own = {
        name: value
        for name, value in settings_with_defaults(method).items()
        if name != "learning_rate"
    }
    data = examples_digest(training_examples(job.tasks, job.source, rows=job.budget.rows))
    models = [
        job.student,
        job.student_base.digest,
        [one.digest for one in job.teachers],
        list(job.teacher_weights),
    ]
    code = code_digest(type(method), __name__)
    run = {"seen_tokens": training.seen_tokens, "mixed_precision": training.mixed_precision}
    key = digest_of(
        "rate",
        code,
        type(method).__name__,
        own,
        loop.learning_rate,
        models,
        data,
        run,
        device_label(job.device),
        job.dtype,
    )
    path = job.cache / "rates" / f"{key[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        held = _read(path)
        if held is None:
            if path.exists():
                job.progress(
                    Progress(
                        stage="tune",
                        done=0,
                        total=1,
                        detail=f"the kept rates {path.name} are damaged; searched again",
                    )
                )
            held = _search(
                job, rows, loop, key=key, training=training, student=student, objective=objective
            )
            write_signed(path, held)
    best = min(held["losses"], key=lambda rate: held["losses"][rate])
    notes = {"learning_rate": float(best), "rates_tried": held["losses"]}
    return replace(loop, learning_rate=float(best)), notes, {"key": path.stem, **held["cost"]}


def _read(path: Any) -> dict[str, Any] | None:
    try:
        held = read_signed(path)
        return held if held["losses"] and held["cost"] else None
    except (ValueError, LookupError, TypeError):
        return None


def _cached_trial(folder: Path, key: str, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a rate brought: read where a search that was killed has tried it already, else
    trained now and kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trial.json"
    with suppress(Unreadable):
        held = read_signed(file)
        if held.get("key") == key:
            return held
    trial = train()
    write_signed(file, {"key": key, **trial})
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
    # by prompt: another trace of a held-out problem is not trained
    prompts = sorted({row.ids[: row.trained_from] for row in rows})
    random.Random("held out").shuffle(prompts)
    chosen = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
    held_out = [row for row in rows if row.ids[: row.trained_from] in chosen]
    trained = [row for row in rows if row.ids[: row.trained_from] not in chosen]
    length = sum(len(row.ids) for row in rows) / len(rows)
    losses: dict[float, float] = {}
    cost = {"tokens": 0, "seconds": 0.0, "flops": 0.0}

    def train(rate: float, folder: Path) -> dict[str, Any]:
        began, opened, aim = time.monotonic(), student(1), objective()
        try:
            spent = fit(
                opened,
                rows=trained,
                validation=held_out,
                objective=aim,
                settings=replace(loop, learning_rate=rate),
                training=replace(
                    training,
                    seed=1,
                    workdir=folder,
                    track="",
                    progress=lambda step: job.progress(
                        replace(step, stage="tune", detail=f"rate {rate:g}, {step.detail}")
                    ),
                ),
            )
        except TrainingDiverged:  # a rate that diverges is not chosen
            return {"loss": None, "tokens": 0, "flops": 0.0, "seconds": time.monotonic() - began}
        finally:
            release_memory(job.device)
        own = forward_flops_per_token(opened.model, length)
        teachers = sum(forward_flops_per_token(one.model, length) for one in aim.live)
        flops = (3 * own + teachers) * spent.seen + own * spent.written
        return {
            "loss": spent.best,
            "tokens": spent.seen,
            "flops": flops,
            "seconds": time.monotonic() - began,
        }

    def attempt(rate: float) -> None:
        folder = job.workdir / f"rate-{rate:g}"
        trial = _cached_trial(folder, key, lambda: train(rate, folder))
        losses[rate] = float("inf") if trial["loss"] is None else trial["loss"]
        for name in cost:
            cost[name] += trial[name]

    start = loop.learning_rate
    for rate in (start, start / 2, start * 2):
        attempt(rate)
    for step in (2.0, 0.5):
        best = min(losses, key=losses.__getitem__)
        while (
            best == (max if step > 1 else min)(losses)
            and 1 / MAX_RATE_FACTOR <= best * step / start <= MAX_RATE_FACTOR
        ):
            attempt(best * step)
            best = min(losses, key=losses.__getitem__)
    cost["seconds"] = round(cost["seconds"], 3)
    finite = {
        f"{rate:g}": round(loss, 6) for rate, loss in sorted(losses.items()) if loss < float("inf")
    }
    if not finite:
        raise CellFailed(
            f"no learning rate of {', '.join(f'{rate:g}' for rate in sorted(losses))} trains; give "
            "a smaller learning_rate"
        )
    return {"losses": finite, "cost": cost}
