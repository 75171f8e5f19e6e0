"""What a loss term may look at: the trained positions of a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.scoring.backend import TopK
from methods.training.rows import Batch, TokenRow

if TYPE_CHECKING:
    from methods.training.taps import InnerStates


@dataclass(frozen=True)
class Distribution:
    """What one teacher thinks at the trained positions: logits (live, or kept whole) or its
    likeliest tokens.
    """

    logits_NV: Tensor | None
    top: TopK | None = None


@dataclass(frozen=True)
class Positions:
    """What a loss term may look at: the trained positions of a micro-batch, already shifted and
    selected.
    """

    student_NV: Tensor
    labels_N: Tensor
    teachers: tuple[Distribution, ...] = ()
    batch: Batch | None = None
    # hidden states and attention of both models, where a term asked for them
    inside: "InnerStates | None" = None

    @property
    def teacher_NV(self) -> Tensor:
        """The only teacher's logits."""
        [one] = self.teachers
        assert one.logits_NV is not None, "the teacher's distributions were not kept whole"
        return one.logits_NV

    @property
    def tags_N(self) -> Tensor:
        """Each position's row's tag."""
        assert self.batch is not None
        return torch.tensor(
            [row.tag for row in self.batch.rows for _ in range(row.trained)],
            device=self.labels_N.device,
        )


PositionCount = Callable[[TokenRow], int]


def trained_tokens(row: TokenRow) -> int:
    """Count every trained token of a row: what a term is divided by unless it says otherwise."""
    return row.trained
