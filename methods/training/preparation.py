"""The student and what is read beside it, made ready for optimiser steps, and let go afterwards as
they were.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from methods.training.noise import refuse_noise, restore_noise, silence_noise
from methods.training.optimizer import (
    Optimizers,
    freeze_zeros,
    make_optimizers,
    projection_optimizer,
)
from methods.training.rows import Batch, TokenRow, batch_of, shuffled_steps
from methods.training.settings import LoopSettings, Training
from methods.training.stepper import Stepper
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective

if TYPE_CHECKING:
    from methods.training.taps import InnerStates


class PreparedTraining:
    """A student in train mode with its hooks, taps and optimizers; `close` takes them out again."""

    def __init__(
        self,
        student: LanguageModel,
        *,
        rows: Sequence[TokenRow],
        objective: Objective,
        settings: LoopSettings,
        training: Training,
    ) -> None:
        self.objective, self.settings = objective, settings
        self.accelerator = start_accelerator(student.device, settings, training)
        autocast = "bfloat16" if training.mixed_precision == "bf16" else ""
        self.student = replace(student, autocast=autocast)
        _refuse_idle_terms(objective, rows)
        self.noise = silence_noise(student.model)
        refuse_noise(student.model)
        self.zeros = freeze_zeros(student.model)
        student.model.train()
        if settings.gradient_checkpointing:
            student.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.head = TrainedPositionLogits(student.model)
        self.inside = self._look_inside(rows, training.seed)
        self.model, self.optimizers = self._prepare()

    def _look_inside(self, rows: Sequence[TokenRow], seed: int) -> "InnerStates | None":
        if self.objective.inwards is None:
            return None
        from methods.training.taps import InnerStates

        [teacher] = self.objective.live
        inside = InnerStates(self.student, teacher.model, self.objective.inwards)
        if len(inside.projections):
            inside.start_projections(self._seen_by_both(rows, seed, teacher))
        return inside

    def _seen_by_both(
        self, rows: Sequence[TokenRow], seed: int, teacher: LiveTeacher
    ) -> Iterator[Batch]:
        """Run the first epoch's batches through both models, one at a time."""
        size = self.settings.micro_batch_size
        for epoch, step in shuffled_steps(rows, batch_size=self.settings.batch_size, seed=seed):
            if epoch > 0:
                return
            for start in range(0, len(step), size):
                batch = batch_of(
                    step[start : start + size], self.student.pad_id, self.student.device
                )
                with torch.no_grad():
                    teacher.head(batch)
                    self.head(batch)
                yield batch

    def _prepare(self) -> tuple[Any, Optimizers]:
        """Return the model as accelerate wraps it, and its optimizers."""
        modules = [self.student.model]
        pairs = make_optimizers(self.student.model, self.settings)
        if self.inside is not None and len(self.inside.projections):
            pairs.append(projection_optimizer(self.inside.projections, self.settings))
            modules.append(self.inside.projections)
        wrapped = self.accelerator.prepare(*modules, *(optimizer for optimizer, _ in pairs))
        wrapped = wrapped if isinstance(wrapped, tuple) else (wrapped,)
        shares = [share for _, share in pairs]
        return wrapped[0], Optimizers(wrapped[len(modules) :], shares)

    def stepper(self) -> Stepper:
        """Return what computes the steps of this training."""
        return Stepper(
            self.model,
            self.head,
            self.objective,
            self.settings.micro_batch_size,
            self.student.pad_id,
            device=self.accelerator.device,
            inside=self.inside,
            ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )

    def clipped_norm(self) -> float:
        """Clip the gradient; return the norm that it had."""
        clip = self.settings.max_grad_norm
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), clip))

    def plain(self) -> Any:
        """Return the model without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def close(self) -> None:
        """Take every hook out of the models: what is saved is the student alone."""
        self.head.close()
        for handle in self.zeros:
            handle.remove()
        restore_noise(self.noise)
        if self.inside is not None:
            self.inside.close()
        for source in self.objective.live:
            source.head.close()
        if self.settings.gradient_checkpointing:
            self.student.model.gradient_checkpointing_disable()


def start_accelerator(device: str, settings: LoopSettings, training: Training) -> Any:
    """Return accelerate's accelerator for one process, with its tracker started where one was asked
    for.
    """
    # It warns about tied weights at every saved state.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=training.mixed_precision,
        log_with=training.track or None,
        project_dir=training.workdir / "tracker",
    )
    if accelerator.num_processes > 1:
        raise CellFailed(
            f"{accelerator.num_processes} processes train at once, which this version does not do; "
            "start one process"
        )
    if training.track:
        config = {**asdict(settings), "seed": training.seed}
        accelerator.init_trackers("compression-harness", config=config)
    return accelerator


def _refuse_idle_terms(objective: Objective, rows: Sequence[TokenRow]) -> None:
    """Refuse a term that counts no position of any row: it would train nothing."""
    for term in objective.terms:
        if not any(objective.counts(term, row) for row in rows):
            raise CellFailed(
                f"the term {term.name} counts no position of any training row (is attention_tokens "
                "below the prompts?)"
            )
