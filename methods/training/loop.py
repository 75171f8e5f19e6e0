"""The one training loop of every method that trains: rows, loss terms, budget, validation, resume.

Methods differ by their rows (what text is trained) and by their terms (what loss); everything else
is the same for all of them, so that a table compares methods and not loops. The rules:

- The mask is made from lengths (prompt, completion), never from token ids: a real EOS is trained
  where pad = EOS.
- The normaliser is the number of trained tokens of the whole optimiser step, known before its first
  backward (`stepper`).
- Logits are made at trained positions only.
- The budget counts *seen* tokens (prompt and completion, no padding) and is spent to the last row
  that fits.
- The validation split is scored before the first step and after each epoch; the best weights of an
  epoch are what is saved.
- State is written every few seconds, less often where that takes long; a run that was killed goes
  on from it and ends in the same bytes (`state`).
- What saving takes is no part of the seconds and joules of training (`meter`).
"""

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from harness.contract import Progress
from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from methods.training.meter import Meter, peak_bytes
from methods.training.optimizer import learning_rate_at
from methods.training.preparation import PreparedTraining
from methods.training.rows import TokenRow, rows_within_budget, shuffled_steps
from methods.training.settings import LoopSettings, Training
from methods.training.state import LoopState, SavedStates, TrainingResult
from methods.training.stepper import StepValues
from methods.training.term_progress import TermProgress
from methods.training.terms import Objective
from methods.training.training_log import TrainingLog
from methods.training.validation import Validation

STEPS_BETWEEN_NORMS = 50  # a term's own gradient takes a backward pass of its own


def fit(
    student: LanguageModel,
    *,
    rows: Sequence[TokenRow],
    validation: Sequence[TokenRow],
    objective: Objective,
    settings: LoopSettings,
    training: Training,
) -> TrainingResult:
    """Train `student.model` in place and leave its best weights in it; return what was spent.

    Resumes from `state` in the training's folder when it is there.
    """
    if not rows:
        raise CellFailed("no training row is left (all were too long or filtered out)")
    torch.manual_seed(training.seed)
    with (
        closing(
            PreparedTraining(
                student, rows=rows, objective=objective, settings=settings, training=training
            )
        ) as ready,
        closing(_TrainingRun(ready, validation, training)) as run,
    ):
        return run.through(rows)


class _TrainingRun:
    """One training run: the prepared student, its state, its log and its counts."""

    def __init__(
        self, ready: PreparedTraining, validation: Sequence[TokenRow], training: Training
    ) -> None:
        workdir = training.workdir
        self.ready, self.training = ready, training
        self.objective, self.settings = ready.objective, ready.settings
        self.stepper = ready.stepper()
        self.states = SavedStates(workdir / "state", ready.accelerator)
        self.state = self.states.restore() or LoopState()
        tracker = ready.accelerator if training.track else None
        self.log = TrainingLog(
            workdir / "training.jsonl", keep_until=self.state.step, tracker=tracker
        )
        self.meter = Meter(self.state, self.objective, ready.student.device)
        self.terms = TermProgress(self.objective, self.state)
        self.validation = Validation(
            validation, ready=ready, state=self.state, best_file=workdir / "best.pt"
        )
        self.moved = self.state.step > 1  # the first step of a warm-up has rate 0

    def through(self, rows: Sequence[TokenRow]) -> TrainingResult:
        """Make the steps that are left of the budget."""
        if self.state.step == 0:  # the loss that training has to beat
            self.state.start_ce = self.validation.score(self.log)
        steps = shuffled_steps(rows, batch_size=self.settings.batch_size, seed=self.training.seed)
        for number, (epoch, planned) in enumerate(steps, 1):
            if self.state.over:
                break
            if number <= self.state.step:
                continue
            if epoch != self.state.epoch and self._stops_after_epoch(epoch):
                break
            self._advance(number, planned)
            if number == self.training.stop_after_steps:
                return TrainingResult.of(self.state)
        self._refuse_no_move()
        return self._finish()

    def _stops_after_epoch(self, following: int) -> bool:
        """Score the epoch that has ended; tell whether the following one is not to be trained."""
        self.validation.hold_out(self.log, self.meter)
        self.state.epoch = following
        return self.validation.stops_early()

    def _advance(self, number: int, planned: Sequence[TokenRow]) -> None:
        """Make the step with those of its rows that fit into the budget, if any do."""
        seen_tokens = self.training.seen_tokens
        wanted = self._rolled_out(planned, number)
        rows = rows_within_budget(wanted, seen_tokens - self.state.seen)
        self.state.over = len(rows) < len(wanted)
        if not rows:
            return
        rate = learning_rate_at(self.state.seen / seen_tokens, self.settings)
        self._report(self._step(number, rows, rate=rate))
        with self.meter.paused():
            self.states.save(self.state, force=number == self.training.stop_after_steps)

    def _rolled_out(self, rows: Sequence[TokenRow], number: int) -> list[TokenRow]:
        """Return the step's rows; on-policy, the student writes them."""
        if self.objective.rollout is None:
            return list(rows)
        return self.objective.rollout(self.ready.student, rows, number)

    def _report(self, line: str) -> None:
        done, total = self.state.seen, self.training.seen_tokens
        self.training.progress(
            Progress(stage="train", done=done, total=total, unit="tokens", detail=line)
        )

    def _step(self, number: int, rows: Sequence[TokenRow], *, rate: float) -> str:
        """Make one optimiser step; return a line on it."""
        several = len(self.objective.terms) > 1
        self.ready.optimizers.set_rate(rate)
        weights = self.terms.weights(self.stepper, rows, number)
        values = self.stepper.backward(
            rows,
            weights=weights,
            backward=self.ready.accelerator.backward,
            number=number,
            norms=several and (number - 1) % STEPS_BETWEEN_NORMS == 0,
        )
        norm = self.ready.clipped_norm()
        self.terms.refuse_explosion(number, values.means, norm)
        self.moved |= rate > 0
        self.ready.optimizers.step()
        self._count(number, rows)
        if not several:
            values = StepValues(values.means, dict.fromkeys(values.means, norm))
        self.terms.remember(weights, values)
        self.log.write_step(self._line(rate, norm, weights, values))
        return self.terms.summary(weights, values.means)

    def _count(self, number: int, rows: Sequence[TokenRow]) -> None:
        self.state.step = number
        self.state.seen += sum(len(row.ids) for row in rows)
        self.state.trained += sum(self.objective.trained(row) for row in rows)

    def _line(
        self, rate: float, norm: float, weights: Mapping[str, float], values: StepValues
    ) -> dict[str, float]:
        """Return a step as a line of the log."""
        state = self.state
        line = {"step": state.step, "epoch": state.epoch, "seen": state.seen, "rate": rate}
        line |= {"gradient_norm": norm, **values.means}
        line |= {f"weight_{name}": weight for name, weight in weights.items()}
        if len(values.means) > 1:
            line |= {f"gradient_norm_{name}": own for name, own in values.norms.items()}
        return line

    def _refuse_no_move(self) -> None:
        if not self.moved:
            raise CellFailed(
                f"a budget of {self.training.seen_tokens} tokens ends within the first optimiser "
                "step, before any weight moves; "
                "give a larger --budget, or fewer rows a step with --set METHOD.batch_size=4"
            )

    def _finish(self) -> TrainingResult:
        """Score the last epoch, put the best weights into the model, and return what it all
        took.
        """
        self.validation.hold_out(self.log, self.meter)
        self.meter.count()
        self.validation.load_best()
        devices = self.ready.accelerator.num_processes
        spent = TrainingResult.of(
            self.state,
            devices=devices,
            device_seconds=self.state.seconds * devices,
            energy_source=self.meter.energy_source,
            peak_bytes=peak_bytes(self.ready.student.device),
        )
        self.log.end()
        return spent

    def close(self) -> None:
        """Close the log."""
        self.log.close()
