"""Loss and gradient of trained positions without ever holding all their logits.

The logits of 1,024 positions at a vocabulary of 152k are 600 MB, and losses keep several such
tensors. Here the body of the model runs once, and the head runs on a few positions at a time: each
part's loss is computed, its gradient goes into the hidden states and the head's weight, and its
logits are let go. Then one backward pass through the body follows. The gradient is the same as that
of the whole, because every loss term is a sum over positions.

Legend: N trained positions, C of one part, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.models.logit_tail import LogitTail

PART_BYTES = 2**26  # of the fp32 logits of one part
FEWEST_POSITIONS = 16

# Each term's sum over the positions of a part, of the logits (C, V) of that part.
PartLoss = Callable[[slice, Tensor], Mapping[str, Tensor]]


def positions_of_a_part(vocabulary: int) -> int:
    """Return how many positions' logits are held at once."""
    return max(FEWEST_POSITIONS, PART_BYTES // (4 * vocabulary))


def parts(count: int, size: int) -> Iterator[slice]:
    """Cut `count` positions into parts of `size`; the last one may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclass(frozen=True)
class ChunkedLoss:
    """Computes losses part by part from hidden states at the trained positions.

    `autocast` is what the model's own forward pass runs in (mixed precision).
    """

    head: Any  # the model's head: (C, H) -> (C, V)
    tail: LogitTail
    size: int  # positions of a part
    vocabulary: int | None = None  # leading columns that the losses are given
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def values(self, hidden_NH: Tensor, loss: PartLoss) -> dict[str, Tensor]:
        """Return each term's sum without a gradient."""
        totals: dict[str, Tensor] = {}
        with torch.no_grad():
            for part in parts(len(hidden_NH), self.size):
                _add(totals, loss(part, self._logits(hidden_NH[part])))
        return totals

    def backward(
        self,
        hidden_NH: Tensor,
        loss: PartLoss,
        weights: Mapping[str, float],
        *,
        scale: float = 1.0,
        body: Callable[[Tensor, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradient of the weighted sum into every weight; return each term's sum.

        `hidden_NH` still has its graph, which is freed. `body` is called with it and its gradient
        in place of `hidden_NH.backward(gradient)`.
        """
        totals: dict[str, Tensor] = {}
        leaf_NH = hidden_NH.detach()
        gradient_NH = torch.zeros_like(leaf_NH)
        for part in parts(len(leaf_NH), self.size):
            part_CH = leaf_NH[part].requires_grad_()
            sums = loss(part, self._logits(part_CH))
            _add(totals, {name: value.detach() for name, value in sums.items()})
            total = sum((weights[name] * value for name, value in sums.items()), torch.zeros(()))
            if isinstance(total, Tensor) and total.requires_grad:
                (total * scale).backward()
                assert part_CH.grad is not None
                gradient_NH[part] = part_CH.grad
        if hidden_NH.requires_grad:
            if body is None:
                hidden_NH.backward(gradient_NH)
            else:
                body(hidden_NH, gradient_NH)
        return totals

    def term_gradients(
        self, hidden_NH: Tensor, loss: PartLoss, name: str, parameters: list[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradient of one term's sum with respect to `parameters`; the graph is kept.

        A parameter that is both in the body and in the head (tied) gets both shares.
        """
        leaf_NH = hidden_NH.detach()
        gradient_NH = torch.zeros_like(leaf_NH)
        of_head: list[Tensor | None] = [None] * len(parameters)
        for part in parts(len(leaf_NH), self.size):
            part_CH = leaf_NH[part].requires_grad_()
            value = loss(part, self._logits(part_CH)).get(name)
            if value is None or not value.requires_grad:
                continue
            found = torch.autograd.grad(value, [part_CH, *parameters], allow_unused=True)
            if found[0] is not None:
                gradient_NH[part] = found[0]
            of_head = [_sum(*pair) for pair in zip(of_head, found[1:], strict=True)]
        if not hidden_NH.requires_grad:
            return of_head
        of_body = torch.autograd.grad(
            hidden_NH, parameters, grad_outputs=gradient_NH, retain_graph=True, allow_unused=True
        )
        return [_sum(*pair) for pair in zip(of_head, of_body, strict=True)]

    def _logits(self, hidden_CH: Tensor) -> Tensor:
        with self.autocast():
            logits_CV: Tensor = self.tail(self.head(hidden_CH))
        return logits_CV[:, : self.vocabulary]


def _add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
