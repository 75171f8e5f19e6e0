"""An optimiser step's loss and gradient.

They are the same however the step is split into micro-batches and processes.
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
TermSums = dict[str, Tensor]  # of a micro-batch: each term's part of the step's mean


@dataclass
class StepValues:
    """The terms of a step: their unweighted means, and the norms of their weighted gradients."""

    means: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)


@dataclass
class Stepper:
    """Computes a step's loss and gradient.

    Each term is divided by the positions that it counts in the step over all processes, known
    before the first backward pass. DDP averages gradients, so each process multiplies its loss by
    the number of processes.
    """

    student: Any  # wrapped or not
    head: TrainedPositionLogits
    objective: Objective
    micro_batch_size: int
    pad_id: int
    device: Any = "cpu"
    inner_states: "InnerStates | None" = None
    world_size: int = 1
    rank: int = 0

    def backward(
        self,
        rows: Sequence[TokenRow],
        *,
        weights: Mapping[str, float],
        backward: Backward,
        step: int = 0,
        norms: bool = False,
    ) -> StepValues:
        """Accumulate one step's gradient; return each term's mean, and with `norms` their norms."""
        values = StepValues()
        for batch, sums in self._micro_batches(rows, step, values):
            loss = self._weighted(sums, weights)
            if norms and not values.norms:
                values.norms.update(self._gradient_norms(sums, weights, rows, batch))
            if loss.requires_grad:
                backward(loss * self.world_size)
        return values

    def values(self, rows: Sequence[TokenRow], step: int = 0) -> StepValues:
        """Return each term's mean over a step's rows without a gradient."""
        values = StepValues()
        with torch.no_grad():
            for _ in self._micro_batches(rows, step, values):
                pass
        return values

    def _weighted(self, sums: TermSums, weights: Mapping[str, float]) -> Tensor:
        zero = torch.zeros((), device=self.device)
        return sum((weights[name] * value for name, value in sums.items()), zero)

    def _micro_batches(
        self, rows: Sequence[TokenRow], step: int, values: StepValues
    ) -> Iterator[tuple[Batch, TermSums]]:
        """Yield this process's micro-batches with their sums; add the sums to `values.means`."""
        counts = self._counts(rows)
        values.means = dict.fromkeys(counts, 0.0)
        process_rows = rows[self.rank :: self.world_size]
        for start in range(0, len(process_rows), self.micro_batch_size):
            micro_rows = process_rows[start : start + self.micro_batch_size]
            batch = batch_of(micro_rows, self.pad_id, self.device)
            sums = self._sums(batch, step, counts)
            for name, value in sums.items():
                values.means[name] += float(value.detach())
            yield batch, sums

    def _counts(self, rows: Sequence[TokenRow]) -> dict[str, int]:
        """Return how many positions each term counts in the step; terms that count none are out."""
        counts = {term.name: self._count(term, rows) for term in self.objective.terms}
        return {name: count for name, count in counts.items() if count}

    def _count(self, term: Term, rows: Sequence[TokenRow]) -> int:
        return sum(self.objective.counted_positions(term, row) for row in rows)

    def _sums(self, batch: Batch, step: int, counts: Mapping[str, int]) -> TermSums:
        """Return each term's sum over the micro-batch, divided by the step's count.

        `positions` is released on return, and teachers' distributions with it: the graph keeps
        only what the backward pass needs.
        """
        positions = self._positions(batch)
        selection = self.objective.selection
        mask = selection.mask(positions, step) if selection else None
        sums: TermSums = {}
        for term in self.objective.terms:
            if term.name in counts:
                value_N = term.value(positions)
                trained = value_N if mask is None else value_N[mask]
                sums[term.name] = trained.sum() / counts[term.name]
        return sums

    def _positions(self, batch: Batch) -> Positions:
        vocabulary = self.objective.vocabulary
        teachers = tuple(source.read(batch, vocabulary) for source in self.objective.sources)
        student_NV = self.head(batch, through=self.student)[:, :vocabulary]
        return Positions(student_NV, batch.labels_N, teachers, batch, self.inner_states)

    def _gradient_norms(
        self,
        sums: TermSums,
        weights: Mapping[str, float],
        rows: Sequence[TokenRow],
        batch: Batch,
    ) -> dict[str, float]:
        """Return the gradient norm of each weighted term, estimated from this micro-batch alone."""
        norms = {}
        for term in self.objective.terms:
            if term.name in sums:
                share = self._count(term, batch.rows) / self._count(term, rows)
                norms[term.name] = self._norm(weights[term.name] * sums[term.name], share)
        return norms

    def _norm(self, loss: Tensor, share: float) -> float:
        """Return the step's gradient norm from a loss that covers a share of the step."""
        if not loss.requires_grad or not share:
            return 0.0
        trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        squares = [
            gradient.float().square().sum() for gradient in gradients if gradient is not None
        ]
        return float(torch.stack(squares).sum().sqrt()) / share


def mean_cross_entropy(
    rows: Sequence[TokenRow],
    *,
    head: TrainedPositionLogits,
    pad_id: int,
    micro_batch_size: int,
    device: Any,
) -> float:
    """Return the mean cross-entropy per trained token on held-out rows (nats)."""
    total, count = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(by_length), micro_batch_size):
            batch = batch_of(by_length[start : start + micro_batch_size], pad_id, device)
            total += float(cross_entropy(head(batch), batch.labels_N).sum())
            count += int(batch.mask.sum())
    return total / count
