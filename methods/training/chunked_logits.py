"""Loss and gradient of trained positions without ever holding all their logits.

The logits of 1,024 positions at a vocabulary of 152k are 600 MB, and losses keep several such
tensors. Here the body of the model runs once, and the head runs on a few positions at a time: each
part's loss is computed, its gradient is added to those of the hidden states and of the head's
weight, and its logits are freed. One backward pass through the body follows. The gradient equals
that of all positions at once, because every loss term is a sum over positions.

Legend: N trained positions, C of one part, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.models.logit_tail import LogitTail

PART_BYTES = 2**25  # of the fp32 logits of one part
FEWEST_POSITIONS = 16
_ROWS_AT_ONCE = 2**14  # of the head's gradient, where it is converted

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
        in_place = adds_in_place(self.head)
        for part in parts(len(leaf_NH), self.size):
            part_CH = leaf_NH[part].requires_grad_(not in_place)
            output_CV = self._head_output(part_CH, with_graph=not in_place)
            sums = loss(part, self._tail(output_CV))
            _add(totals, {name: value.detach() for name, value in sums.items()})
            total = sum((weights[name] * value for name, value in sums.items()), torch.zeros(()))
            if not (isinstance(total, Tensor) and total.requires_grad):
                continue
            (total * scale).backward()
            if in_place:
                assert output_CV.grad is not None
                gradient_NH[part] = _through_head(self.head, part_CH, output_CV.grad)
            else:
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
        head_gradients: list[Tensor | None] = [None] * len(parameters)
        for part in parts(len(leaf_NH), self.size):
            part_CH = leaf_NH[part].requires_grad_()
            value = loss(part, self._logits(part_CH)).get(name)
            if value is None or not value.requires_grad:
                continue
            gradients = torch.autograd.grad(value, [part_CH, *parameters], allow_unused=True)
            if gradients[0] is not None:
                gradient_NH[part] = gradients[0]
            head_gradients = [
                _sum(*pair) for pair in zip(head_gradients, gradients[1:], strict=True)
            ]
        if not hidden_NH.requires_grad:
            return head_gradients
        body_gradients = torch.autograd.grad(
            hidden_NH, parameters, grad_outputs=gradient_NH, retain_graph=True, allow_unused=True
        )
        return [_sum(*pair) for pair in zip(head_gradients, body_gradients, strict=True)]

    def _logits(self, hidden_CH: Tensor) -> Tensor:
        return self._tail(self._head_output(hidden_CH, with_graph=True))

    def _head_output(self, hidden_CH: Tensor, *, with_graph: bool) -> Tensor:
        """Return what comes out of the head; without its graph, as a leaf that takes a gradient."""
        with self.autocast(), torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
            output_CV: Tensor = self.head(hidden_CH)
        return output_CV if with_graph else output_CV.requires_grad_()

    def _tail(self, output_CV: Tensor) -> Tensor:
        with self.autocast():
            return self.tail(output_CV)[:, : self.vocabulary]


def adds_in_place(head: Any) -> bool:
    """Tell whether a head's gradient can be added into its weight's directly.

    Autograd makes a tensor as large as the weight for every part. It is needed where the head is no
    plain linear layer, is frozen, or where somebody waits for the weight's gradient (a mask).
    """
    if type(head) is not torch.nn.Linear or not head.weight.requires_grad:
        return False
    waiting = (head.weight._backward_hooks, head.weight._post_accumulate_grad_hooks)
    layer = (head._forward_pre_hooks, head._forward_hooks, head._backward_hooks)
    return not any(waiting) and not any(layer[1:]) and len(layer[0]) <= 1


def _through_head(head: Any, hidden_CH: Tensor, gradient_CV: Tensor) -> Tensor:
    """Add a part's gradient into those of the head's weight and bias; return that of its input."""
    weight_VH = head.weight
    if weight_VH.grad is None:
        weight_VH.grad = torch.zeros_like(weight_VH)
    rows = gradient_CV.shape[1] if gradient_CV.dtype == weight_VH.dtype else _ROWS_AT_ONCE
    for start in range(0, gradient_CV.shape[1], rows):
        part = slice(start, start + rows)
        if gradient_CV.dtype == weight_VH.dtype == hidden_CH.dtype:
            weight_VH.grad[part].addmm_(gradient_CV[:, part].T, hidden_CH)
        else:  # mixed precision: the product is of the lower type, as autocast makes it
            lower = hidden_CH.to(gradient_CV.dtype)
            weight_VH.grad[part] += gradient_CV[:, part].T @ lower
    if head.bias is not None:
        if head.bias.grad is None:
            head.bias.grad = torch.zeros_like(head.bias)
        head.bias.grad += gradient_CV.sum(0).to(head.bias.dtype)
    return (gradient_CV @ weight_VH.detach().to(gradient_CV.dtype)).to(hidden_CH.dtype)


def _add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
