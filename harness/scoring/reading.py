"""What a transformers model holds likely at the ends of texts, batch by batch, by its own
attention.

Texts are padded on the right, as training pads them: what stands behind a token is never seen by
it, so that no family of models needs to be asked whether padding changes it.

Shapes: B rows, T tokens, N positions, V vocabulary, K tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel
from harness.models.position_head import PositionHead
from harness.scoring.backend import BatchSize, Scored, TopK

if TYPE_CHECKING:
    import torch

MOST_ROWS = 64
_LOGIT_BYTES = 2**28  # of one forward pass
_CPU_TOKENS = 2_048  # of one batch: what a processor's caches hold


@dataclass(frozen=True, eq=False)
class Reader:
    """A transformers model that says what is likely: `CanRead` and no more, for caches and
    distances.

    `batch_size` counts consecutive rows; "auto" cuts them by memory, best where the longest come
    first.
    """

    opened: LanguageModel
    batch_size: BatchSize = "auto"

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.opened.context

    def top_k(
        self, rows: Sequence[Scored], *, k: int | None, width: int | None = None
    ) -> Iterator[TopK]:
        """Yield what is likely at the last positions of each row, in order; a batch is read when
        its first row is taken.
        """
        for batch in self.batches(rows, width):
            for log_p_NV in self.read(batch, width):
                yield likeliest(log_p_NV, k)

    def batches(
        self, rows: Sequence[Scored], width: int | None = None
    ) -> Iterator[Sequence[Scored]]:
        """Cut rows into batches of the given size, or by memory."""
        if self.batch_size == "auto":
            return by_memory(rows, width or self.opened.vocabulary, self.opened.device)
        return (
            rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)
        )

    def read(self, rows: Sequence[Scored], width: int | None) -> "Iterator[torch.Tensor]":
        """Read rows in one batch; yield the log-probabilities (N, V) of each. Logits are made at
        the wanted positions alone.
        """
        import torch

        batch = right_padded(rows, self.opened.pad_id, self.opened.device)
        with closing(PositionHead(self.opened.model)) as head, torch.inference_mode():
            log_p_NV = torch.log_softmax(head.logits_at(*batch)[:, :width].float(), dim=-1)
        yield from log_p_NV.split([row.count for row in rows])


def likeliest(log_p_NV: "torch.Tensor", k: int | None) -> TopK:
    """Return the `k` likeliest tokens of each position, or all of them by id."""
    import torch

    if k is None:
        return TopK(
            torch.arange(log_p_NV.shape[1], device=log_p_NV.device).expand_as(log_p_NV), log_p_NV
        )
    values, ids = log_p_NV.topk(k, dim=-1)
    return TopK(ids, values)


def right_padded(
    rows: Sequence[Scored], pad: int, device: str
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Return ids and attention mask (B, T), and which positions (B, T-1) predict a token that is
    asked for.
    """
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    attention = torch.zeros((len(rows), longest), dtype=torch.long)
    wanted = torch.zeros((len(rows), longest - 1), dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.tensor(row.ids)
        attention[index, :length] = 1
        wanted[index, length - row.count - 1 : length - 1] = True
    return ids.to(device), attention.to(device), wanted.to(device)


def by_memory(rows: Sequence[Scored], width: int, device: str) -> Iterator[Sequence[Scored]]:
    """Cut rows into batches whose logits stay within 256 MiB; on a CPU also into what its caches
    hold.
    """
    longest = max((len(row.ids) for row in rows), default=0)
    tokens = MOST_ROWS * longest if device.startswith("cuda") else _CPU_TOKENS
    start = 0
    while start < len(rows):
        end, longest = start, 0
        while end < len(rows):
            longest = max(longest, len(rows[end].ids))
            # More than it needs: prompts have no logits.
            most = max(1, min(MOST_ROWS, tokens // longest, _LOGIT_BYTES // (4 * width * longest)))
            if end - start >= most:
                break
            end += 1
        yield rows[start:end]
        start = end
