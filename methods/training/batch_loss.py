"""The loss of one micro-batch: of its logits held whole, or of parts that are let go one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from methods.training.chunked_logits import ChunkedLoss
from methods.training.positions import Distribution, Positions
from methods.training.rows import Batch
from methods.training.teachers import TrainedPositionLogits
from methods.training.terms import Objective

if TYPE_CHECKING:
    from methods.training.taps import InnerStates

Backward = Callable[[Tensor], None]
TermSums = dict[str, Tensor]  # of a micro-batch: each term's part of the step's mean


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What the loss of every micro-batch of a training is computed with."""

    student: Any  # wrapped or not
    head: TrainedPositionLogits
    objective: Objective
    inner_states: "InnerStates | None" = None
    chunked: ChunkedLoss | None = None  # where losses may be computed part by part

    @property
    def trained_weights(self) -> list[Tensor]:
        """The weights that take a gradient."""
        return [weight for weight in self.student.parameters() if weight.requires_grad]


class BatchLoss(Protocol):
    """A micro-batch's loss terms, each a sum over positions divided by the step's count of them."""

    def sums(self) -> TermSums:
        """Return each term's sum, to be read and not to be differentiated."""
        ...

    def gradient_norms(
        self, weights: Mapping[str, float], shares: Mapping[str, float]
    ) -> dict[str, "GradientNorm"]:
        """Return the norm of each weighted term's gradient; keep what `backward` needs.

        `shares` say which part of the step's positions of a term the batch has.
        """
        ...

    def backward(
        self, weights: Mapping[str, float], backward: Backward, *, scale: float
    ) -> TermSums:
        """Add the gradient of the weighted sum, times `scale`, to the weights'; return the sums."""
        ...


def batch_loss(
    inputs: LossInputs, batch: Batch, *, step: int, counts: Mapping[str, int]
) -> BatchLoss:
    """Return the loss of a micro-batch.

    It is computed in parts where its logits are many and every teacher can be read so, else whole.
    `counts` are the positions that each term counts in the step.
    """
    teachers = _teachers_in_parts(inputs, batch)
    if teachers is None:
        return WholeLoss(inputs, batch, counts, step)
    return LossInParts(inputs, batch, counts, teachers)


def _teachers_in_parts(inputs: LossInputs, batch: Batch) -> tuple[Distribution, ...] | None:
    if inputs.chunked is None or batch.trained_tokens <= inputs.chunked.size:
        return None
    sources, vocabulary = inputs.objective.sources, inputs.objective.vocabulary
    if not all(source.reads_in_parts for source in sources):
        return None
    return tuple(source.read_parts(batch, vocabulary) for source in sources)


@dataclass(frozen=True)
class WholeLoss:
    """The loss of logits that are all held."""

    inputs: LossInputs
    batch: Batch
    counts: Mapping[str, int]
    step: int

    @cached_property
    def _sums(self) -> TermSums:
        """Each term's sum with its graph.

        `positions` is released on return, and teachers' distributions with it: the graph keeps
        only what the backward pass needs.
        """
        objective = self.inputs.objective
        positions = self._positions()
        selection = objective.selection
        kept = selection.kept_positions(positions, self.step) if selection else None
        sums: TermSums = {}
        for term in objective.terms:
            if term.name in self.counts:
                value_N = term.value(positions)
                trained = value_N if kept is None else value_N.index_select(0, kept)
                sums[term.name] = trained.sum() / self.counts[term.name]
        return sums

    def _positions(self) -> Positions:
        inputs, batch = self.inputs, self.batch
        vocabulary = inputs.objective.vocabulary
        teachers = tuple(source.read(batch, vocabulary) for source in inputs.objective.sources)
        student_NV = inputs.head(batch, through=inputs.student)[:, :vocabulary]
        return Positions(student_NV, batch.labels_N, teachers, batch, inputs.inner_states)

    def sums(self) -> TermSums:
        """Return each term's sum."""
        return self._sums

    def gradient_norms(
        self, weights: Mapping[str, float], shares: Mapping[str, float]
    ) -> dict[str, "GradientNorm"]:
        """Return the norm of each weighted term's gradient; the graph is kept."""
        return {
            name: self._gradient_norm(weights[name] * value, shares[name])
            for name, value in self._sums.items()
        }

    def _gradient_norm(self, loss: Tensor, share: float) -> "GradientNorm":
        """Return the norm of a loss's gradient, which is let go before the next one is made."""
        if not loss.requires_grad or not share:
            return GradientNorm(None)
        return _norm(
            torch.autograd.grad(
                loss, self.inputs.trained_weights, retain_graph=True, allow_unused=True
            ),
            share,
        )

    def backward(
        self, weights: Mapping[str, float], backward: Backward, *, scale: float
    ) -> TermSums:
        """Add the gradient of the weighted sum into the weights; return the sums."""
        zero = torch.zeros((), device=self.batch.device)
        loss = sum((weights[name] * value for name, value in self._sums.items()), zero)
        if loss.requires_grad:
            backward(loss * scale)
        return self._sums


@dataclass(frozen=True)
class LossInParts:
    """The loss of logits that are made, differentiated and let go a few positions at a time."""

    inputs: LossInputs
    batch: Batch
    counts: Mapping[str, int]
    teachers: Sequence[Distribution]

    @cached_property
    def _hidden_NH(self) -> Tensor:
        return self.inputs.head.hidden(self.batch, through=self.inputs.student)

    @property
    def _chunked(self) -> ChunkedLoss:
        assert self.inputs.chunked is not None
        return self.inputs.chunked

    def _part_sums(self, part: slice, logits_CV: Tensor) -> TermSums:
        """Return each term's sum over a part."""
        positions = Positions(
            logits_CV,
            self.batch.labels_N[part],
            tuple(teacher.part(part) for teacher in self.teachers),
            self.batch,
            part=part,
        )
        return {
            term.name: term.value(positions).sum() / self.counts[term.name]
            for term in self.inputs.objective.terms
            if term.name in self.counts
        }

    def sums(self) -> TermSums:
        """Return each term's sum, computed without a gradient."""
        return self._chunked.values(self._hidden_NH, self._part_sums)

    def gradient_norms(
        self, weights: Mapping[str, float], shares: Mapping[str, float]
    ) -> dict[str, "GradientNorm"]:
        """Return the norm of each weighted term's gradient; the graph of the body is kept."""
        return {
            name: self._gradient_norm(name, shares[name])._replace(weight=weights[name])
            for name in self.counts
        }

    def _gradient_norm(self, name: str, share: float) -> "GradientNorm":
        """Return the norm of a term's gradient, which is let go before the next one is made."""
        trained_weights = self.inputs.trained_weights
        return _norm(
            self._chunked.term_gradients(self._hidden_NH, self._part_sums, name, trained_weights),
            share,
        )

    def backward(
        self, weights: Mapping[str, float], backward: Backward, *, scale: float
    ) -> TermSums:
        """Add the gradient of the weighted sum into the weights; return the sums.

        The backward passes are its own: `backward` takes one loss, and there is one for each part.
        """
        return self._chunked.backward(self._hidden_NH, self._part_sums, weights, scale=scale)


class GradientNorm(NamedTuple):
    """The norm of a term's gradient, which is still on the device."""

    norm: Tensor | None  # of a part of the step's positions; None: 0
    share: float = 1.0  # of the step's positions
    weight: float = 1.0  # that the norm does not hold yet

    def of_step(self, norm: float) -> float:
        """Return the norm of the whole step, of what was read of `norm`."""
        return self.weight * (norm / self.share)


def _norm(gradients: Sequence[Tensor | None], share: float) -> GradientNorm:
    """Return the norm of a gradient over all weights, of a loss that covers a share of a step."""
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    if not squares or not share:
        return GradientNorm(None)
    return GradientNorm(torch.stack(squares).sum().sqrt(), share)
