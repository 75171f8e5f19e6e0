"""What is minimised: loss terms, each one number a trained position, and the objective that holds
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

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
    """One summand of the loss. `value` returns (N,), one number a trained position; the loop sums,
    divides and weighs it.

    A weight of `auto` follows the others: the term then counts as much as all terms of fixed weight
    together.
    """

    name: str
    weight: float | Literal["auto"]
    value: Callable[[Positions], Tensor]
    # positions of a row that the term is divided by, known before any of them is computed
    counts: PositionCount = trained_tokens


def hard_labels(weight: float | Literal["auto"] = 1.0, *, tag: int | None = None) -> Term:
    """Return the cross-entropy term against the text itself; with a tag, of rows with that tag
    alone.
    """
    if tag is None:
        return Term("ce", weight, lambda at: cross_entropy(at.student_NV, at.labels_N))
    return Term(
        f"ce-{tag}",
        weight,
        lambda at: cross_entropy(at.student_NV, at.labels_N) * (at.tags_N == tag),
        counts=lambda row: row.trained if row.tag == tag else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises, over which rows it is told apart."""

    terms: Sequence[Term]
    sources: Sequence[TeacherSource] = ()
    vocabulary: int | None = None  # leading logit columns that mean the same token in all models
    selection: Selection | None = None
    inwards: "TapConfig | None" = None  # which blocks of student and teacher are compared
    rollout: "Rollout | None" = None  # on-policy: rows are the student's own answers
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def live(self) -> list[LiveTeacher]:
        """The teachers that are run beside the student."""
        return [one for one in self.sources if isinstance(one, LiveTeacher)]

    def counts(self, term: Term, row: TokenRow) -> int:
        """Return how many positions of a row a term is divided by."""
        return self.selection.counts(row) if self.selection else term.counts(row)

    def trained(self, row: TokenRow) -> int:
        """Return how many tokens of a row are trained."""
        return self.selection.counts(row) if self.selection else row.trained
