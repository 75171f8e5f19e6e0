"""Reads distributions at the ends of texts, batch by batch, by the model's own attention.

Texts are padded on the right, as in training: no token sees what comes after it, so no family of
models needs a probe whether padding changes it. Logits are made at the wanted positions only, and
of so many positions at a time as fit a bound: how large the vocabulary is does not decide how many
texts are read together.

Shapes: B rows, T tokens, N positions, V vocabulary, K tokens, H hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel
from harness.models.logit_tail import LogitTail, logit_tail_of
from harness.models.position_head import PositionHead, places_of
from harness.scoring.backend import BatchSize, LikelihoodRequest, TopK

if TYPE_CHECKING:
    import torch

MAX_ROWS = 64
_LOGIT_BYTES = 2**28  # that are made at once
_CPU_TOKENS = 2_048  # of one batch: what a processor's caches hold


@dataclass(frozen=True, eq=False)
class Reader:
    """A transformers model that returns likely tokens (`CanRead`), for caches and distances.

    `batch_size` is a number of consecutive texts. "auto" cuts batches by memory, which works best
    where the longest texts come first.
    """

    opened: LanguageModel
    batch_size: BatchSize = "auto"

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.opened.context

    def top_k(
        self, requests: Sequence[LikelihoodRequest], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Yield the likeliest tokens of each request; batches are read as they are needed.

        The tensors lie on the model's device; those of one batch are parts of the same two.
        """
        for batch in self.batches(requests, width):
            yield from self.read_batch(batch, k, width)

    def batches(
        self, requests: Sequence[LikelihoodRequest], width: int | None = None
    ) -> Iterator[Sequence[LikelihoodRequest]]:
        """Cut requests into batches of `batch_size` requests, or by memory."""
        if self.batch_size == "auto":
            vocabulary, device = width or self.opened.vocabulary, self.opened.device
            is_large = 4 * vocabulary * _most_tokens(requests, device) > _LOGIT_BYTES
            in_parts = is_large and self._tail is not None
            return batches_by_memory(requests, vocabulary, device, in_parts=in_parts)
        return (
            requests[start : start + self.batch_size]
            for start in range(0, len(requests), self.batch_size)
        )

    def read_batch(
        self, requests: Sequence[LikelihoodRequest], k: int | None, width: int | None
    ) -> Iterator[TopK]:
        """Read requests in one batch; yield the likeliest tokens of each."""
        import torch

        with torch.inference_mode():
            parts = [_top_of_logits(logits_NV, k) for logits_NV in self._logits(requests, width)]
            top = parts[0] if len(parts) == 1 else _joined(parts, k)
        yield from _split(top, [request.count for request in requests])

    def _logits(
        self, requests: Sequence[LikelihoodRequest], width: int | None
    ) -> "Iterator[torch.Tensor]":
        """Yield the logits (N, V) of all requests, of so many positions at a time as fit.

        The model's body runs once.
        """
        ids, attention, selected = right_padded(requests, self.opened.pad_id, self.opened.device)
        # counted on the CPU: nobody waits for the device to learn how many there are
        places, inputs = places_of(selected).to(self.opened.device), {"attention_mask": attention}
        positions = sum(request.count for request in requests)
        at_once = max(1, _LOGIT_BYTES // (4 * self.opened.vocabulary))
        with closing(PositionHead(self.opened.model)) as head:
            if positions <= at_once or self._tail is None:
                yield head.logits_of(ids, places, inputs)[:, :width]
                return
            hidden_NH = head.hidden_of(ids, places, inputs)
        for part_NH in hidden_NH.split(at_once):
            yield self._tail(self.opened.model.get_output_embeddings()(part_NH))[:, :width]

    @cached_property
    def _tail(self) -> LogitTail | None:
        """What the model does behind its head; None where its head cannot be run by itself."""
        import torch

        ids, attention, selected = right_padded(
            [LikelihoodRequest((0, 0), 1)], 0, self.opened.device
        )
        places = places_of(selected).to(self.opened.device)
        tail = logit_tail_of(self.opened.model)
        if tail is None:
            return None
        try:
            with closing(PositionHead(self.opened.model)) as head, torch.inference_mode():
                head.hidden_of(ids, places, {"attention_mask": attention})
        except RuntimeError:  # the model calls its head in another way
            return None
        return tail


def _top_of_logits(logits_NV: "torch.Tensor", k: int | None) -> TopK:
    """Return the likeliest tokens of logits, and what their softmax divides by."""
    import torch

    log_p_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    top = top_tokens(log_p_NV, k)
    return TopK(top.ids_NK, top.log_p_NK, logits_NV[:, 0].float() - log_p_NV[:, 0])


def _joined(parts: Sequence[TopK], k: int | None) -> TopK:
    """Return the positions of several parts as one."""
    import torch

    log_p_NK = torch.cat([part.log_p_NK for part in parts])
    all_ids = parts[0].ids_NK[:1].expand_as(log_p_NK)  # no copy for each position
    return TopK(
        all_ids if k is None else torch.cat([part.ids_NK for part in parts]),
        log_p_NK,
        torch.cat([part.normaliser_N for part in parts if part.normaliser_N is not None]),
    )


def _split(top: TopK, counts: list[int]) -> Iterator[TopK]:
    """Yield the positions of each request: so many of the first, and so on."""
    assert top.normaliser_N is not None
    columns = (top.ids_NK, top.log_p_NK, top.normaliser_N)
    for ids_NK, log_p_NK, normaliser_N in zip(
        *(column.split(counts) for column in columns), strict=True
    ):
        yield TopK(ids_NK, log_p_NK, normaliser_N)


def top_tokens(log_p_NV: "torch.Tensor", k: int | None) -> TopK:
    """Return the `k` likeliest tokens of each position, or all of them in the order of ids."""
    import torch

    if k is None:
        return TopK(
            torch.arange(log_p_NV.shape[1], device=log_p_NV.device).expand_as(log_p_NV), log_p_NV
        )
    values, ids = log_p_NV.topk(k, dim=-1)
    return TopK(ids, values)


def right_padded(
    requests: Sequence[LikelihoodRequest], pad: int, device: str
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Return ids and attention mask, (B, T), and a mask of the positions to predict, (B, T-1).

    A position is True in the last mask where the token after it is one of a text's last `count`.
    That mask stays on the CPU, so that nobody waits for the device to learn how many there are.
    """
    import torch

    longest = max(len(request.ids) for request in requests)
    ids = torch.full((len(requests), longest), pad, dtype=torch.long)
    attention = torch.zeros((len(requests), longest), dtype=torch.long)
    predicts_target = torch.zeros((len(requests), longest - 1), dtype=torch.bool)
    for index, request in enumerate(requests):
        length = len(request.ids)
        ids[index, :length] = torch.tensor(request.ids)
        attention[index, :length] = 1
        predicts_target[index, length - request.count - 1 : length - 1] = True
    return ids.to(device), attention.to(device), predicts_target


def _most_tokens(requests: Sequence[LikelihoodRequest], device: str) -> int:
    """Return how many tokens a batch has at most, padding included, whatever the vocabulary."""
    longest = max((len(request.ids) for request in requests), default=0)
    return MAX_ROWS * longest if device.startswith("cuda") else _CPU_TOKENS


def batches_by_memory(
    requests: Sequence[LikelihoodRequest], width: int, device: str, *, in_parts: bool = False
) -> Iterator[Sequence[LikelihoodRequest]]:
    """Cut requests into batches of at most 64, whose logits need at most 256 MiB.

    With `in_parts` logits are made of a few positions at a time, and do not count. On a CPU a batch
    is also limited to the tokens that the processor's caches hold.
    """
    max_tokens = _most_tokens(requests, device)
    # an upper bound: the head does not run at the positions of prompts
    tokens_by_logits = max_tokens if in_parts else _LOGIT_BYTES // (4 * width)
    start = 0
    while start < len(requests):
        end, longest = start, 0
        while end < len(requests):
            longest = max(longest, len(requests[end].ids))
            most = max(1, min(MAX_ROWS, max_tokens // longest, tokens_by_logits // longest))
            if end - start >= most:
                break
            end += 1
        yield requests[start:end]
        start = end
