"""What is minimised: loss terms, one number per trained position, and the objective of them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from harness.renames.arguments import accept_old_arguments
from methods.training.losses import cross_entropy
from methods.training.positions import PositionCount, Positions, trained_tokens
from methods.training.rows import TokenRow
from methods.training.selection import Selection
from methods.training.teachers import LiveTeacher, TeacherSource

if TYPE_CHECKING:
    from methods.training.rollout import Rollout
    from methods.training.taps import TapConfig


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    `value` returns (N,), one number per trained position; the loop sums, divides and weighs it.
    A weight of `auto` follows the others: the term then counts as much as all terms of fixed weight
    together.
    """

    name: str
    weight: float | Literal["auto"]
    value: Callable[[Positions], Tensor]
    # how many positions of a row the term is divided by, known before any of them is computed
    counts: PositionCount = trained_tokens


def hard_labels(weight: float | Literal["auto"] = 1.0, *, tag: int | None = None) -> Term:
    """Return the cross-entropy against the text itself; with a tag, on rows of that tag alone."""

    def loss(positions: Positions) -> Tensor:
        return cross_entropy(positions.student_NV, positions.labels_N)

    if tag is None:
        return Term("ce", weight, loss)
    return Term(
        f"ce-{tag}",
        weight,
        lambda positions: loss(positions) * (positions.tags_N == tag),
        counts=lambda row: row.trained_tokens if row.tag == tag else 0,
    )


@accept_old_arguments
@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises: its loss terms, and what they read of teachers and rows."""

    terms: Sequence[Term]
    sources: Sequence[TeacherSource] = ()
    vocabulary: int | None = None  # leading logit columns that mean the same token in all models
    selection: Selection | None = None  # trains a share of the tokens
    taps: "TapConfig | None" = None  # which blocks of student and teacher are compared
    rollout: "Rollout | None" = None  # on-policy: rows are the student's own answers

    @property
    def live_teachers(self) -> list[LiveTeacher]:
        """The teachers that are run beside the student."""
        return [source for source in self.sources if isinstance(source, LiveTeacher)]

    def counted_positions(self, term: Term, row: TokenRow) -> int:
        """Return how many positions of a row a term is divided by."""
        return self.selection.tokens_kept(row) if self.selection else term.counts(row)

    def trained_tokens(self, row: TokenRow) -> int:
        """Return how many tokens of a row are trained."""
        return self.selection.tokens_kept(row) if self.selection else row.trained_tokens
