"""Reads distributions at the ends of texts, batch by batch, by the model's own attention.

Texts are padded on the right, as in training: no token sees what comes after it, so no family of
models needs a probe whether padding changes it.

Shapes: B rows, T tokens, N positions, V vocabulary, K tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel
from harness.models.position_head import PositionHead
from harness.scoring.backend import BatchSize, LikelihoodRequest, TopK

if TYPE_CHECKING:
    import torch

MAX_ROWS = 64
_LOGIT_BYTES = 2**28  # of one forward pass
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
        """Yield the likeliest tokens of each request; batches are read as they are needed."""
        for batch in self.batches(requests, width):
            for log_p_NV in self.read(batch, width):
                yield top_tokens(log_p_NV, k)

    def batches(
        self, requests: Sequence[LikelihoodRequest], width: int | None = None
    ) -> Iterator[Sequence[LikelihoodRequest]]:
        """Cut requests into batches of `batch_size` requests, or by memory."""
        if self.batch_size == "auto":
            return batches_by_memory(requests, width or self.opened.vocabulary, self.opened.device)
        return (
            requests[start : start + self.batch_size]
            for start in range(0, len(requests), self.batch_size)
        )

    def read(
        self, requests: Sequence[LikelihoodRequest], width: int | None
    ) -> "Iterator[torch.Tensor]":
        """Read requests in one batch; yield the log-probabilities (N, V) of each.

        The language-model head runs at the wanted positions only.
        """
        import torch

        batch = right_padded(requests, self.opened.pad_id, self.opened.device)
        with closing(PositionHead(self.opened.model)) as head, torch.inference_mode():
            log_p_NV = torch.log_softmax(head.logits_at(*batch)[:, :width].float(), dim=-1)
        yield from log_p_NV.split([request.count for request in requests])


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
    return ids.to(device), attention.to(device), predicts_target.to(device)


def batches_by_memory(
    requests: Sequence[LikelihoodRequest], width: int, device: str
) -> Iterator[Sequence[LikelihoodRequest]]:
    """Cut requests into batches whose logits need at most 256 MiB.

    On a CPU a batch is also limited to the tokens that the processor's caches hold.
    """
    longest = max((len(request.ids) for request in requests), default=0)
    max_tokens = MAX_ROWS * longest if device.startswith("cuda") else _CPU_TOKENS
    start = 0
    while start < len(requests):
        end, longest = start, 0
        while end < len(requests):
            longest = max(longest, len(requests[end].ids))
            # an upper bound: the head does not run at the positions of prompts
            rows_by_logits = _LOGIT_BYTES // (4 * width * longest)
            most = max(1, min(MAX_ROWS, max_tokens // longest, rows_by_logits))
            if end - start >= most:
                break
            end += 1
        yield requests[start:end]
        start = end
