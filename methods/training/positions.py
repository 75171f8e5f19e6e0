"""What a loss term may look at: the trained positions of a batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.scoring.backend import TopK
from methods.training.rows import Batch, TokenRow
from methods.training.transfers import to_device

if TYPE_CHECKING:
    from methods.training.taps import InnerStates


@dataclass(frozen=True)
class Distribution:
    """One teacher's distributions at the trained positions: all logits, or the likeliest tokens."""

    logits_NV: Tensor | None  # from a live teacher, or from a cache that keeps all of them
    top: TopK | None = None
    # in their place, of a live teacher whose logits are never all held: those of a part
    logits_of: Callable[[slice], Tensor] | None = None

    def part(self, part: slice) -> "Distribution":
        """Return the distributions at some of the positions."""
        if self.logits_of is not None:
            return Distribution(self.logits_of(part))
        logits = None if self.logits_NV is None else self.logits_NV[part]
        top = None if self.top is None else TopK(self.top.ids_NK[part], self.top.log_p_NK[part])
        return Distribution(logits, top)


@dataclass(frozen=True)
class Positions:
    """The N trained positions of a micro-batch: logits, labels and what the teachers say there."""

    student_NV: Tensor
    labels_N: Tensor
    teachers: tuple[Distribution, ...] = ()
    batch: Batch | None = None
    # hidden states and attention of both models, where a term needs them
    inner_states: "InnerStates | None" = None
    # which of the batch's trained positions these are
    part: slice = field(default_factory=lambda: slice(None))

    @property
    def teacher_NV(self) -> Tensor:
        """The only teacher's logits."""
        [teacher] = self.teachers
        assert teacher.logits_NV is not None, "the cache keeps only the teacher's likeliest tokens"
        return teacher.logits_NV

    @property
    def tags_N(self) -> Tensor:
        """The tag of each position's row."""
        assert self.batch is not None
        tags = [row.tag for row in self.batch.rows for _ in range(row.trained_tokens)]
        return to_device(torch.tensor(tags[self.part]), self.labels_N.device)


PositionCount = Callable[[TokenRow], int]


def trained_tokens(row: TokenRow) -> int:
    """Count every trained token of a row: what a term is divided by unless it says otherwise."""
    return row.trained_tokens
