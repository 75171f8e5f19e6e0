"""An optimiser step's loss and gradient.

They are the same however the step is split into micro-batches and processes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from methods.training.batch_loss import Backward, GradientNorm, LossInputs, TermSums, batch_loss
from methods.training.chunked_logits import ChunkedLoss
from methods.training.losses import cross_entropy
from methods.training.rows import Batch, TokenRow, batch_of
from methods.training.teachers import TrainedPositionLogits
from methods.training.terms import Objective, Term
from methods.training.transfers import read_numbers

if TYPE_CHECKING:
    from methods.training.taps import InnerStates


class StepValues(NamedTuple):
    """The terms of a step: their unweighted means, and the norms of their weighted gradients."""

    means: dict[str, float]
    norms: dict[str, float]


class StepReadings:
    """The values of a step while they are on the device; all are read in one transfer."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._sums: list[tuple[str, Tensor]] = []  # of the micro-batches, in their order
        self._norms: dict[str, GradientNorm] = {}
        self._values: StepValues | None = None

    def add(self, sums: TermSums) -> None:
        """Add a micro-batch's part of each mean."""
        self._sums += [(name, value.detach()) for name, value in sums.items()]

    def add_norms(self, norms: Mapping[str, GradientNorm]) -> None:
        """Add the norms of the terms' gradients, unless there are some."""
        self._norms = self._norms or dict(norms)

    @property
    def has_norms(self) -> bool:
        """Tell whether norms were added."""
        return bool(self._norms)

    def read_with(self, *others: Tensor) -> tuple[StepValues, list[float]]:
        """Wait for the device once; return the step's values, and those of other tensors."""
        unread = {name: norm.norm for name, norm in self._norms.items() if norm.norm is not None}
        sums = [value for _, value in self._sums]
        numbers = read_numbers([*sums, *unread.values(), *others])
        means = dict.fromkeys(self._names, 0.0)
        for (name, _), number in zip(self._sums, numbers, strict=False):
            means[name] += number
        read_norms = dict(zip(unread, numbers[len(sums) :], strict=False))
        norms = {
            name: norm.of_step(read_norms.get(name, 0.0)) for name, norm in self._norms.items()
        }
        self._values = StepValues(means, norms)
        return self._values, numbers[len(sums) + len(unread) :]

    @property
    def means(self) -> dict[str, float]:
        """The terms' unweighted means; the device is waited for where it was not."""
        return (self._values or self.read_with()[0]).means

    @property
    def norms(self) -> dict[str, float]:
        """The norms of the terms' weighted gradients, where they were asked for."""
        return (self._values or self.read_with()[0]).norms


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

    @property
    def _inputs(self) -> LossInputs:
        return LossInputs(
            student=self.student,
            head=self.head,
            objective=self.objective,
            inner_states=self.inner_states,
            chunked=self.chunked,
        )

    def backward(
        self,
        rows: Sequence[TokenRow],
        *,
        weights: Mapping[str, float],
        backward: Backward,
        step: int = 0,
        norms: bool = False,
    ) -> StepReadings:
        """Accumulate one step's gradient; return each term's mean, and with `norms` their norms.

        Norms are estimated from the first micro-batch alone. Nothing is read from the device yet.
        """
        counts = self._counts(rows)
        values = StepReadings(counts)
        for batch in self._micro_batches(rows):
            loss = batch_loss(self._inputs, batch, step=step, counts=counts)
            if norms and not values.has_norms:
                values.add_norms(loss.gradient_norms(weights, self._shares(batch, rows)))
            values.add(loss.backward(weights, backward, scale=float(self.world_size)))
        return values

    def values(self, rows: Sequence[TokenRow], step: int = 0) -> StepReadings:
        """Return each term's mean over a step's rows without a gradient."""
        counts = self._counts(rows)
        values = StepReadings(counts)
        with torch.no_grad():
            for batch in self._micro_batches(rows):
                values.add(batch_loss(self._inputs, batch, step=step, counts=counts).sums())
        return values

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

    def _shares(self, batch: Batch, rows: Sequence[TokenRow]) -> dict[str, float]:
        """Return which share of the step's positions of each term a micro-batch has."""
        counts = self._counts(rows)
        return {
            term.name: self._count(term, batch.rows) / counts[term.name]
            for term in self.objective.terms
            if term.name in counts
        }


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
    sums: list[Tensor] = []
    by_length = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(by_length), micro_batch_size):
            batch = batch_of(by_length[start : start + micro_batch_size], pad_id, device)
            sums.append(_summed_cross_entropy(batch, head, chunked))
    return sum(read_numbers(sums)) / sum(row.trained_tokens for row in rows)


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
