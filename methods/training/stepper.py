"""An optimiser step's loss and gradient.

They are the same however the step is split into micro-batches and processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.training.chunked_logits import ChunkedLoss, PartLoss
from methods.training.losses import cross_entropy
from methods.training.positions import Distribution, Positions
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

    def add(self, sums: TermSums) -> None:
        """Add a micro-batch's part of each mean."""
        for name, value in sums.items():
            self.means[name] += float(value.detach())


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
    chunked: ChunkedLoss | None = None  # where losses may be computed part by part

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
        values, counts = self._new_values(rows), self._counts(rows)
        for batch in self._micro_batches(rows):
            of_batch = norms and not values.norms
            if (teachers := self._teachers_in_parts(batch)) is not None:
                sums = self._backward_in_parts(
                    batch, teachers, counts, weights, values, rows if of_batch else ()
                )
            else:
                sums = self._sums(batch, step, counts)
                loss = self._weighted(sums, weights)
                if of_batch:
                    values.norms.update(self._gradient_norms(sums, weights, rows, batch))
                if loss.requires_grad:
                    backward(loss * self.world_size)
            values.add(sums)
        return values

    def values(self, rows: Sequence[TokenRow], step: int = 0) -> StepValues:
        """Return each term's mean over a step's rows without a gradient."""
        values, counts = self._new_values(rows), self._counts(rows)
        with torch.no_grad():
            for batch in self._micro_batches(rows):
                teachers = self._teachers_in_parts(batch)
                if teachers is None:
                    values.add(self._sums(batch, step, counts))
                else:
                    assert self.chunked is not None
                    hidden_NH = self.head.hidden(batch, through=self.student)
                    loss = self._part_loss(batch, teachers, counts)
                    values.add(self.chunked.values(hidden_NH, loss))
        return values

    def _new_values(self, rows: Sequence[TokenRow]) -> StepValues:
        return StepValues(dict.fromkeys(self._counts(rows), 0.0))

    def _teachers_in_parts(self, batch: Batch) -> tuple[Distribution, ...] | None:
        """Return the teachers' distributions for reading part by part; None where none are needed.

        That is so where the batch's logits fit into one part, or a teacher cannot be read in parts.
        """
        if self.chunked is None or len(batch.labels_N) <= self.chunked.size:
            return None
        teachers = []
        for source in self.objective.sources:
            distribution = source.read_parts(batch, self.objective.vocabulary)
            if distribution is None:
                return None
            teachers.append(distribution)
        return tuple(teachers)

    def _part_loss(
        self, batch: Batch, teachers: Sequence[Distribution], counts: Mapping[str, int]
    ) -> PartLoss:
        """Return what computes each term's sum over a part, divided by the step's count."""

        def loss(part: slice, logits_CV: Tensor) -> TermSums:
            positions = Positions(
                logits_CV,
                batch.labels_N[part],
                tuple(teacher.part(part) for teacher in teachers),
                batch,
                part=part,
            )
            return {
                term.name: term.value(positions).sum() / counts[term.name]
                for term in self.objective.terms
                if term.name in counts
            }

        return loss

    def _backward_in_parts(
        self,
        batch: Batch,
        teachers: Sequence[Distribution],
        counts: Mapping[str, int],
        weights: Mapping[str, float],
        values: StepValues,
        norms_over: Sequence[TokenRow],
    ) -> TermSums:
        """Accumulate a micro-batch's gradient without holding all its logits; return the sums.

        With `norms_over`, the rows of the step, the norm of each term's gradient goes into
        `values`.
        """
        assert self.chunked is not None
        hidden_NH = self.head.hidden(batch, through=self.student)
        loss = self._part_loss(batch, teachers, counts)
        for term in self.objective.terms if norms_over else ():
            if term.name in counts:
                share = self._count(term, batch.rows) / self._count(term, norms_over)
                gradients = self.chunked.term_gradients(
                    hidden_NH, loss, term.name, self._trained_weights()
                )
                values.norms[term.name] = weights[term.name] * norm_of(gradients, share)
        return self.chunked.backward(hidden_NH, loss, weights, scale=float(self.world_size))

    def _trained_weights(self) -> list[Tensor]:
        return [weight for weight in self.student.parameters() if weight.requires_grad]

    def _weighted(self, sums: TermSums, weights: Mapping[str, float]) -> Tensor:
        zero = torch.zeros((), device=self.device)
        return sum((weights[name] * value for name, value in sums.items()), zero)

    def _micro_batches(self, rows: Sequence[TokenRow]) -> Iterator[Batch]:
        """Yield this process's micro-batches."""
        process_rows = rows[self.rank :: self.world_size]
        for start in range(0, len(process_rows), self.micro_batch_size):
            micro_rows = process_rows[start : start + self.micro_batch_size]
            yield batch_of(micro_rows, self.pad_id, self.device)

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
        gradients = torch.autograd.grad(
            loss, self._trained_weights(), retain_graph=True, allow_unused=True
        )
        return norm_of(gradients, share)


def norm_of(gradients: Sequence[Tensor | None], share: float) -> float:
    """Return the norm of a gradient over all weights, of a loss that covers a share of a step."""
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) / share if squares and share else 0.0


def mean_cross_entropy(
    rows: Sequence[TokenRow],
    *,
    head: TrainedPositionLogits,
    pad_id: int,
    micro_batch_size: int,
    device: Any,
    chunked: ChunkedLoss | None = None,
) -> float:
    """Return the mean cross-entropy per trained token on held-out rows (nats)."""
    total, count = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(by_length), micro_batch_size):
            batch = batch_of(by_length[start : start + micro_batch_size], pad_id, device)
            total += float(_summed_cross_entropy(batch, head, chunked))
            count += int(batch.mask.sum())
    return total / count


def _summed_cross_entropy(
    batch: Batch, head: TrainedPositionLogits, chunked: ChunkedLoss | None
) -> Tensor:
    """Return the labels' cross-entropy, summed over a batch, in parts where the logits are many."""
    labels_N = batch.labels_N
    if chunked is None or len(labels_N) <= chunked.size:
        return cross_entropy(head(batch), labels_N).sum()

    def loss(part: slice, logits_CV: Tensor) -> TermSums:
        return {"ce": cross_entropy(logits_CV, labels_N[part]).sum()}

    return chunked.values(head.hidden(batch), loss)["ce"]
