"""The validation rows while a student trains: their loss, and the weights of the best epoch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from methods.training.meter import CostMeter
from methods.training.preparation import PreparedTraining
from methods.training.rows import TokenRow
from methods.training.state import LoopState, keep_best, load_best, write_best
from methods.training.stepper import mean_cross_entropy
from methods.training.term_progress import TrainingDiverged
from methods.training.training_log import TrainingLog


class Validation:
    """Scores the validation rows and keeps the best weights in a file."""

    def __init__(
        self,
        rows: Sequence[TokenRow],
        *,
        prepared: PreparedTraining,
        state: LoopState,
        best_file: Path,
    ) -> None:
        self.rows, self.prepared, self.state, self.best_file = rows, prepared, state, best_file

    def score(self, log: TrainingLog) -> float:
        """Return the loss on the validation rows (nats per token), and log it."""
        prepared, state = self.prepared, self.state
        prepared.model.eval()
        loss = mean_cross_entropy(
            self.rows,
            head=prepared.head,
            pad_id=prepared.student.pad_id,
            micro_batch_size=prepared.settings.micro_batch_size,
            device=prepared.accelerator.device,
            chunked=replace(prepared.chunked, vocabulary=None) if prepared.chunked else None,
        )
        prepared.model.train()
        log.write_validation(loss, step=state.step, epoch=state.epoch, tokens_seen=state.seen)
        return loss

    def end_epoch(self, log: TrainingLog, meter: CostMeter) -> None:
        """Score an epoch that has ended, and keep the weights when they are the best so far."""
        state, loss = self.state, self.score(log)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the validation loss became {loss} at step {state.step}; try a lower learning_rate"
            )
        state.since_best += 1
        if loss < state.best:
            state.best, state.kept_step, state.since_best = loss, state.step, 0
            part_file = self.best_file.with_suffix(".part")
            with meter.paused():
                write_best(self.prepared.unwrapped_model().state_dict(), part_file)
            keep_best(part_file, self.best_file)

    def stops_early(self) -> bool:
        """Tell whether `patience` epochs have brought no better loss; 0 means never to stop."""
        return 0 < self.prepared.settings.patience <= self.state.since_best

    def load_best(self) -> None:
        """Put the best weights into the model."""
        self.prepared.unwrapped_model().load_state_dict(load_best(self.best_file))
