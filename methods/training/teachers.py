"""Where teachers' distributions come from: computed live, or by a model with other tokens."""

import time
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from harness.machine.memory import synchronise
from harness.models.language_model import LanguageModel
from harness.models.position_head import PositionHead
from harness.renames.modules import by_old_name
from methods.training.positions import Distribution
from methods.training.rows import Batch, TokenRow, batch_of


class TeacherSource(Protocol):
    """Where one teacher's distributions come from: the teacher itself, or what was kept of it."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return what the teacher thinks at the batch's trained positions."""
        ...


class TrainedPositionLogits(PositionHead):
    """A model's logits at the trained positions of a batch."""

    def __call__(self, batch: Batch, *, through: Any = None) -> Tensor:
        """Return logits (N, V); `through` is the wrapped model, where training wraps it."""
        return self.logits_at(batch.ids, batch.attention, batch.mask, through=through)


class LiveTeacher:
    """A teacher in memory, run beside the student; counts the seconds spent in it and the tokens
    that it read.
    """

    def __init__(self, opened: LanguageModel) -> None:
        self.opened = opened
        self.model = opened.model.requires_grad_(False).eval()
        self.head = TrainedPositionLogits(self.model)
        self.seconds = 0.0
        self.tokens = 0

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Run the teacher on the student's own batch."""
        return Distribution(self._run(batch)[:, :vocabulary])

    def _run(self, batch: Batch) -> Tensor:
        """Return the teacher's logits; the seconds are its own: what a GPU was asked before is
        waited for.
        """
        synchronise(self.opened.device)
        began = time.perf_counter()
        with torch.no_grad():
            logits = self.head(batch)
        synchronise(self.opened.device)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(row.ids) for row in batch.rows)
        return logits


class CrossTokenizerTeacher(LiveTeacher):
    """A live teacher with a tokenizer of its own, run on its own tokens of the same text."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return its logits (M, W) at the aligned positions, in the rows' order."""
        others = []
        wanted: list[int] = []
        start = 0
        for row in batch.rows:
            assert row.other is not None
            others.append(TokenRow(row.other.ids, row.other.trained_from))
            wanted += [start + theirs for _, theirs in row.other.pairs]
            start += others[-1].trained
        logits = self._run(batch_of(others, self.opened.pad_id, batch.ids.device))
        return Distribution(logits[torch.tensor(wanted, device=logits.device)])


if not TYPE_CHECKING:  # a checker refuses old names; programs that use them go on working
    __getattr__ = by_old_name(__name__)
