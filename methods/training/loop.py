"""The one training loop of every method that trains: rows, loss terms, budget, validation, resume.

Methods differ by their rows (which text is trained) and by their terms (which loss). Everything
else is the same for all of them, so that a table compares methods and not loops. The rules:

- The mask comes from lengths (prompt, completion), never from token ids: a real EOS is trained
  where pad = EOS.
- The loss is divided by the number of trained tokens of the whole optimiser step, known before its
  first backward pass (`stepper`).
- Logits are computed at trained positions only.
- The budget counts the tokens *seen* (prompt and completion, no padding) and is spent to the last
  row that fits.
- The validation split is scored before the first step and after each epoch; the weights of the best
  epoch are saved.
- A step waits for its device once, for all the numbers that it says (`transfers`), and before its
  weights move: a step that diverged moves none.
- State is written every few seconds, less often where that takes long; on a GPU by a thread, beside
  the training (`snapshots`). A killed run resumes from it and ends in the same bytes (`state`).
- The seconds and joules of training do not include those of saving (`meter`).
"""

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from harness.contract import Progress
from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from methods.training.meter import CostMeter, peak_bytes
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
    """Train `student.model` in place, leave its best weights in it, and return what it cost.

    Resumes from `state` in the training's folder when it is there.
    """
    if not rows:
        raise CellFailed("no training row is left (all were too long or filtered out)")
    torch.manual_seed(training.seed)
    prepared = PreparedTraining(
        student, rows=rows, objective=objective, settings=settings, training=training
    )
    with closing(prepared), closing(_TrainingRun(prepared, validation, training)) as run:
        return run.train(rows)


class _TrainingRun:
    """One training run: the prepared student, its state, its log and its counts."""

    def __init__(
        self,
        prepared: PreparedTraining,
        validation_rows: Sequence[TokenRow],
        training: Training,
    ) -> None:
        workdir = training.workdir
        self.prepared, self.training = prepared, training
        self.objective, self.settings = prepared.objective, prepared.settings
        self.stepper = prepared.stepper()
        self.states = SavedStates(workdir / "state", prepared.accelerator)
        self.state = self.states.restore() or LoopState()
        tracker = prepared.accelerator if training.track else None
        self.log = TrainingLog(
            workdir / "training.jsonl", keep_until=self.state.step, tracker=tracker
        )
        self.meter = CostMeter(self.state, self.objective, prepared.student.device)
        self.terms = TermProgress(self.objective, self.state)
        self.validation = Validation(
            validation_rows, prepared=prepared, state=self.state, best_file=workdir / "best.pt"
        )
        # a run that ends before any weight moves is refused; a warm-up's first step has rate 0
        self.weights_moved = self.state.step > (1 if self.settings.warmup_ratio else 0)

    def train(self, rows: Sequence[TokenRow]) -> TrainingResult:
        """Make the steps that are left of the budget."""
        if self.state.step == 0:  # the loss that training has to beat
            self.state.start_ce = self.validation.score(self.log)
        steps = shuffled_steps(rows, batch_size=self.settings.batch_size, seed=self.training.seed)
        for step, (epoch, planned_rows) in enumerate(steps, 1):
            if self.state.over:
                break
            if step <= self.state.step:
                continue
            if epoch != self.state.epoch and self._stops_before_epoch(epoch):
                break
            self._advance(step, planned_rows)
            if step == self.training.stop_after_steps:
                return TrainingResult.from_state(self.state)
        self._refuse_unmoved_weights()
        return self._finish()

    def _stops_before_epoch(self, epoch: int) -> bool:
        """Score the epoch that has ended; tell whether training stops before the next one."""
        self.validation.end_epoch(self.log, self.meter)
        self.state.epoch = epoch
        return self.validation.stops_early()

    def _advance(self, step: int, planned_rows: Sequence[TokenRow]) -> None:
        """Make the step with those of its rows that fit into the budget, if any do."""
        seen_tokens = self.training.seen_tokens
        step_rows = self._rolled_out(planned_rows, step)
        rows = rows_within_budget(step_rows, seen_tokens - self.state.seen)
        self.state.over = len(rows) < len(step_rows)
        if not rows:
            return
        rate = learning_rate_at(self.state.seen / seen_tokens, self.settings)
        self._report(self._step(step, rows, rate=rate))
        with self.meter.paused():
            self.states.save(self.state, force=step == self.training.stop_after_steps)

    def _rolled_out(self, rows: Sequence[TokenRow], step: int) -> list[TokenRow]:
        """Return the step's rows; on-policy, the student writes them."""
        if self.objective.rollout is None:
            return list(rows)
        return self.objective.rollout(self.prepared.student, rows, step)

    def _report(self, line: str) -> None:
        done, total = self.state.seen, self.training.seen_tokens
        self.training.progress(
            Progress(stage="train", done=done, total=total, unit="tokens", detail=line)
        )

    def _step(self, step: int, rows: Sequence[TokenRow], *, rate: float) -> str:
        """Make one optimiser step; return its summary."""
        has_several_terms = len(self.objective.terms) > 1
        self.prepared.optimizers.set_rate(rate)
        weights = self.terms.weights(self.stepper, rows, step)
        readings = self.stepper.backward(
            rows,
            weights=weights,
            backward=self.prepared.accelerator.backward,
            step=step,
            norms=has_several_terms and (step - 1) % STEPS_BETWEEN_NORMS == 0,
        )
        # the only time that a step waits for its device, before any weight moves
        values, [norm] = readings.read_with(self.prepared.clip_gradient())
        self.terms.refuse_divergence(step, values.means, norm)
        self.weights_moved |= rate > 0
        self.prepared.optimizers.step()
        self._count(step, rows)
        if not has_several_terms:
            values = StepValues(values.means, dict.fromkeys(values.means, norm))
        self.terms.update(weights, values)
        self.log.write_step(self._log_line(rate, norm, weights, values))
        return self.terms.summary(weights, values.means)

    def _count(self, step: int, rows: Sequence[TokenRow]) -> None:
        self.state.step = step
        self.state.seen += sum(len(row.ids) for row in rows)
        self.state.trained += sum(self.objective.trained_tokens(row) for row in rows)

    def _log_line(
        self, rate: float, norm: float, weights: Mapping[str, float], values: StepValues
    ) -> dict[str, float]:
        """Return a step as a line of the log."""
        state = self.state
        line = {"step": state.step, "epoch": state.epoch, "seen": state.seen, "rate": rate}
        line |= {"gradient_norm": norm, **values.means}
        line |= {f"weight_{name}": weight for name, weight in weights.items()}
        if len(values.means) > 1:
            line |= {f"gradient_norm_{name}": term_norm for name, term_norm in values.norms.items()}
        return line

    def _refuse_unmoved_weights(self) -> None:
        if not self.weights_moved:
            raise CellFailed(
                f"a budget of {self.training.seen_tokens} tokens ends within the first optimiser "
                "step, before any weight moves; "
                "give a larger --budget, or fewer rows a step with --set METHOD.batch_size=4"
            )

    def _finish(self) -> TrainingResult:
        """Score the last epoch, load the best weights, and return what training cost."""
        self.validation.end_epoch(self.log, self.meter)
        self.meter.count()
        self.validation.load_best()
        self.states.wait()
        devices = self.prepared.accelerator.num_processes
        result = TrainingResult.from_state(
            self.state,
            devices=devices,
            device_seconds=self.state.seconds * devices,
            energy_source=self.meter.energy_source,
            peak_bytes=peak_bytes(self.prepared.student.device),
        )
        self.log.end()
        return result

    def close(self) -> None:
        """Close the log, and end the writing of states."""
        self.log.close()
        self.states.close()
