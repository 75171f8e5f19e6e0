"""Reads distributions at the ends of texts on the plain path: padded on the left, if at all.

Fidelity has always read this way, and caches of teachers have always read with padding on the right
(`harness/scoring/reading.py`). The two differ in the last bits. Digits in records and the bytes of
students depend on those bits, so both ways stay.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel
from harness.scoring.backend import LikelihoodRequest, TopK
from harness.scoring.plain import last_logits, reason_for_single_rows
from harness.scoring.reading import Reader, top_tokens

if TYPE_CHECKING:
    import torch


class LeftPaddedReader(Reader):
    """Reads texts in left-padded batches where a probe shows that this is safe, else one by one."""

    def read_batch(
        self, requests: Sequence[LikelihoodRequest], k: int | None, width: int | None
    ) -> Iterator[TopK]:
        """Yield the likeliest tokens of each text; one text's logits are in memory at a time."""
        import torch

        for logits_NV in target_logits(self.opened, requests):
            with torch.inference_mode():
                log_p_NV = torch.log_softmax(logits_NV[:, :width].float(), dim=-1)
            # outside of inference_mode: the caller keeps its own mode
            yield top_tokens(log_p_NV, k)


def target_logits(
    opened: LanguageModel, requests: Sequence[LikelihoodRequest]
) -> "list[torch.Tensor]":
    """Return the logits (N, V) that predict the last `count` tokens of each request."""
    positions = max(request.count for request in requests) + 1
    batches = [[request] for request in requests] if reason_for_single_rows(opened) else [requests]
    logits = [
        row_logits
        for batch in batches
        for row_logits in last_logits(opened, [list(request.ids) for request in batch], positions)
    ]
    return [
        row_logits[-request.count - 1 : -1]
        for row_logits, request in zip(logits, requests, strict=True)
    ]
