"""A student made ready for optimiser steps, with what is read beside it; restored afterwards."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from harness.models.logit_tail import logit_tail_of
from methods.training.chunked_logits import ChunkedLoss, positions_of_a_part
from methods.training.noise import refuse_noise, restore_noise, silence_noise
from methods.training.optimizer import (
    Optimizers,
    freeze_zeros,
    make_optimizers,
    projection_optimizer,
)
from methods.training.row_attention import attend_by_rows
from methods.training.rows import Batch, TokenRow, batch_of, shuffled_steps
from methods.training.settings import LoopSettings, Training
from methods.training.stepper import Stepper
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective

if TYPE_CHECKING:
    from methods.training.taps import InnerStates


class _Wrapped(NamedTuple):
    """What accelerate made of a model and of its optimizers."""

    model: Any
    optimizers: Optimizers


class PreparedTraining:
    """A student in train mode with its hooks, taps and optimizers; `close` removes them again."""

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
        self.silenced_noise = silence_noise(student.model)
        refuse_noise(student.model)
        self.zero_hooks = freeze_zeros(student.model)
        student.model.train()
        if settings.gradient_checkpointing:
            student.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.head = TrainedPositionLogits(student.model)
        taps = objective.taps
        self.row_attentions = attend_by_rows(
            [student.model, *(teacher.model for teacher in objective.live_teachers)],
            settings.packing,
            device=self.accelerator.device,
            compares_attention=taps is not None and bool(taps.attention_layers),
        )
        self.chunked = self._chunked_loss(rows)
        self.inner_states = self._tap_inner_states(rows, training.seed)
        self.model, self.optimizers = self._wrap()

    def _tap_inner_states(self, rows: Sequence[TokenRow], seed: int) -> "InnerStates | None":
        """Put taps into both models where a term compares their inner states."""
        if self.objective.taps is None:
            return None
        from methods.training.taps import InnerStates

        [teacher] = self.objective.live_teachers
        inner_states = InnerStates(self.student, teacher.model, self.objective.taps)
        if len(inner_states.projections):
            inner_states.fit_projections(self._batches_run_by_both(rows, seed, teacher))
        return inner_states

    def _batches_run_by_both(
        self, rows: Sequence[TokenRow], seed: int, teacher: LiveTeacher
    ) -> Iterator[Batch]:
        """Run the first epoch's batches through both models, and yield each batch after its run."""
        size = self.settings.micro_batch_size
        steps = shuffled_steps(rows, batch_size=self.settings.batch_size, seed=seed)
        for epoch, step_rows in steps:
            if epoch > 0:
                return
            for start in range(0, len(step_rows), size):
                micro_rows = step_rows[start : start + size]
                batch = batch_of(micro_rows, self.student.pad_id, self.student.device)
                with torch.no_grad():
                    teacher.head(batch)
                    self.head(batch)
                yield batch

    def _wrap(self) -> _Wrapped:
        """Let accelerate wrap the model and its optimizers."""
        modules = [self.student.model]
        optimizers = make_optimizers(self.student.model, self.settings)
        if self.inner_states is not None and len(self.inner_states.projections):
            projections = self.inner_states.projections
            optimizers.append(projection_optimizer(projections, self.settings))
            modules.append(projections)
        wrapped = self.accelerator.prepare(*modules, *(scaled.optimizer for scaled in optimizers))
        wrapped = wrapped if isinstance(wrapped, tuple) else (wrapped,)
        shares = [scaled.share for scaled in optimizers]
        return _Wrapped(wrapped[0], Optimizers(wrapped[len(modules) :], shares))

    def _chunked_loss(self, rows: Sequence[TokenRow]) -> ChunkedLoss | None:
        """Return what computes losses part by part; None where they must be computed whole.

        They must where a term looks at inner states, where tokens are selected among all of a row,
        with several processes (DDP takes a weight's gradient once a step), and where the model
        does something unknown behind its head.
        """
        objective, model = self.objective, self.student.model
        if objective.taps is not None or objective.selection is not None:
            return None
        if self.accelerator.num_processes > 1 or (tail := logit_tail_of(model)) is None:
            return None
        # teachers find out now, and not within a step, what they do behind their heads
        _ = [source.reads_in_parts for source in objective.sources]
        try:  # the head may be called in a way that the hook on it does not know
            with torch.no_grad():
                self.head.hidden(batch_of(rows[:1], self.student.pad_id, self.student.device))
        except RuntimeError:
            return None
        head = model.get_output_embeddings()
        size = positions_of_a_part(head.weight.shape[0])
        return ChunkedLoss(head, tail, size, objective.vocabulary, self.accelerator.autocast)

    def stepper(self) -> Stepper:
        """Return what computes the steps of this training."""
        return Stepper(
            self.model,
            self.head,
            self.objective,
            self.settings.micro_batch_size,
            self.student.pad_id,
            device=self.accelerator.device,
            inner_states=self.inner_states,
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            chunked=self.chunked,
        )

    def clip_gradient(self) -> Tensor:
        """Clip the gradient; return the norm that it had before, still on the device."""
        max_norm = self.settings.max_grad_norm
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm

    def unwrapped_model(self) -> Any:
        """Return the model without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def close(self) -> None:
        """Take every hook out of the models: what is saved is the student alone."""
        self.head.close()
        for hook in self.zero_hooks:
            hook.remove()
        restore_noise(self.silenced_noise)
        if self.inner_states is not None:
            self.inner_states.close()
        for teacher in self.objective.live_teachers:
            teacher.head.close()
        for attention in self.row_attentions:
            attention.close()
        if self.settings.gradient_checkpointing:
            self.student.model.gradient_checkpointing_disable()


def start_accelerator(device: str, settings: LoopSettings, training: Training) -> Any:
    """Return accelerate's accelerator for one process; start its tracker where one is set."""
    # It warns about tied weights at every saved state.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # accelerate keeps device and precision of a process's first training for all later ones
    AcceleratorState._reset_state(reset_partial_state=True)
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
        if not any(objective.counted_positions(term, row) for row in rows):
            raise CellFailed(
                f"the term {term.name} counts no position of any training row (is attention_tokens "
                "below the prompts?)"
            )
