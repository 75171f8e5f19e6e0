"""An optimiser step's loss and gradient: the same whatever its split into micro-batches and
processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.training.losses import cross_entropy
from methods.training.positions import Positions
from methods.training.rows import Batch, TokenRow, batch_of
from methods.training.teachers import TrainedPositionLogits
from methods.training.terms import Objective, Term

if TYPE_CHECKING:
    from methods.training.taps import InnerStates

Backward = Callable[[Tensor], None]
Sums = dict[str, Tensor]  # of a micro-batch: each term's part of the step's mean


@dataclass
class StepValues:
    """What a step says of its terms: unweighted means, and the norms of their weighted
    gradients.
    """

    means: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)


@dataclass
class Stepper:
    """Computes a step's loss and gradient.

    Each term is divided by the positions that it counts in the *whole* step over all processes,
    known before the first backward; DDP averages gradients, so every process divides by its share.
    """

    student: Any  # wrapped or not
    head: TrainedPositionLogits
    objective: Objective
    micro_batch_size: int
    pad: int
    device: Any = "cpu"
    inside: "InnerStates | None" = None
    ranks: int = 1
    rank: int = 0

    def backward(
        self,
        rows: Sequence[TokenRow],
        *,
        weights: Mapping[str, float],
        backward: Backward,
        number: int = 0,
        norms: bool = False,
    ) -> StepValues:
        """Accumulate one step's gradient; return each term's mean, and the norms of their gradients
        where `norms`.
        """
        values = StepValues()
        for batch, sums in self._micro_batches(rows, number, values):
            total = self._weighted(sums, weights)
            if norms and not values.norms:
                values.norms.update(self._norms(sums, weights, rows, batch))
            if total.requires_grad:
                backward(total * self.ranks)
        return values

    def values(self, rows: Sequence[TokenRow], number: int = 0) -> StepValues:
        """Return each term's mean over a step's rows without a gradient."""
        values = StepValues()
        with torch.no_grad():
            for _ in self._micro_batches(rows, number, values):
                pass
        return values

    def _weighted(self, sums: Sums, weights: Mapping[str, float]) -> Tensor:
        total = torch.zeros((), device=self.device)
        return sum((weights[name] * value for name, value in sums.items()), total)

    def _micro_batches(
        self, rows: Sequence[TokenRow], number: int, values: StepValues
    ) -> Iterator[tuple[Batch, Sums]]:
        """Yield each micro-batch of this process with its sums; the means grow in `values`."""
        counts = self._counts(rows)
        values.means = dict.fromkeys(counts, 0.0)
        mine = rows[self.rank :: self.ranks]
        for start in range(0, len(mine), self.micro_batch_size):
            batch = batch_of(mine[start : start + self.micro_batch_size], self.pad, self.device)
            sums = self._sums(batch, number, counts)
            for name, value in sums.items():
                values.means[name] += float(value.detach())
            yield batch, sums

    def _counts(self, rows: Sequence[TokenRow]) -> dict[str, int]:
        """Return how many positions each term counts in the step; a step may hold none that a term
        counts.
        """
        every = {term.name: self._count(term, rows) for term in self.objective.terms}
        return {name: count for name, count in every.items() if count}

    def _count(self, term: Term, rows: Sequence[TokenRow]) -> int:
        return sum(self.objective.counts(term, row) for row in rows)

    def _sums(self, batch: Batch, number: int, counts: Mapping[str, int]) -> Sums:
        """Return each term's sum over the micro-batch, divided by the step's count.

        What the terms looked at is let go: the graph keeps what the backward pass needs, and
        teachers' distributions are not among it.
        """
        at = self._positions(batch)
        selection = self.objective.selection
        chosen = selection.chosen(at, number) if selection else None
        sums: Sums = {}
        for term in self.objective.terms:
            if term.name in counts:
                value_N = term.value(at)
                kept = value_N if chosen is None else value_N[chosen]
                sums[term.name] = kept.sum() / counts[term.name]
        return sums

    def _positions(self, batch: Batch) -> Positions:
        vocabulary = self.objective.vocabulary
        teachers = tuple(source.read(batch, vocabulary) for source in self.objective.sources)
        student_NV = self.head(batch, through=self.student)[:, :vocabulary]
        return Positions(student_NV, batch.ids[:, 1:][batch.mask], teachers, batch, self.inside)

    def _norms(
        self, sums: Sums, weights: Mapping[str, float], rows: Sequence[TokenRow], batch: Batch
    ) -> dict[str, float]:
        """Return the gradient norm of each weighted term, as this one micro-batch estimates it."""
        norms = {}
        for term in self.objective.terms:
            if term.name in sums:
                share = self._count(term, batch.rows) / self._count(term, rows)
                norms[term.name] = self._norm(weights[term.name] * sums[term.name], share)
        return norms

    def _norm(self, value: Tensor, share: float) -> float:
        """Return the gradient norm of a loss that is a share of the step's."""
        if not value.requires_grad or not share:
            return 0.0
        parameters = [one for one in self.student.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        squares = [
            gradient.float().square().sum() for gradient in gradients if gradient is not None
        ]
        return float(torch.stack(squares).sum().sqrt()) / share


def mean_cross_entropy(
    rows: Sequence[TokenRow],
    *,
    head: TrainedPositionLogits,
    pad: int,
    micro_batch_size: int,
    device: Any,
) -> float:
    """Return the mean cross-entropy per trained token on held-out rows (nats)."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(ordered), micro_batch_size):
            batch = batch_of(ordered[start : start + micro_batch_size], pad, device)
            total += float(cross_entropy(head(batch), batch.ids[:, 1:][batch.mask]).sum())
            count += int(batch.mask.sum())
    return total / count
