"""What a transformers model holds likely at the ends of texts, as the plain path scores: padded on
the left, if at all.

Fidelity has always read so, and caches have always read padded on the right
(`harness/scoring/reading.py`). The two differ in the last bits, on which the digits of records and
the bytes of students hang: both stay.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel
from harness.scoring.backend import Scored
from harness.scoring.plain import last_logits, one_row
from harness.scoring.reading import Reader

if TYPE_CHECKING:
    import torch


class PlainReader(Reader):
    """Reads rows side by side where a probe shows that padding does not change them, else alone."""

    def read(self, rows: Sequence[Scored], width: int | None) -> "Iterator[torch.Tensor]":
        """Yield the log-probabilities (N, V) of each row; those of one row at a time stand in
        memory.
        """
        import torch

        for logits_NV in end_logits(self.opened, rows):
            with torch.inference_mode():
                log_p_NV = torch.log_softmax(logits_NV[:, :width].float(), dim=-1)
            yield log_p_NV  # outside: who takes it keeps a mode of its own


def end_logits(opened: LanguageModel, rows: Sequence[Scored]) -> "list[torch.Tensor]":
    """Return the model's own logits (N, V) that predict the last `count` tokens of each row; padded
    on the left, if at all.
    """
    keep = max(row.count for row in rows) + 1
    parts = [[row] for row in rows] if one_row(opened) else [rows]
    logits = [
        of_row
        for part in parts
        for of_row in last_logits(opened, [list(row.ids) for row in part], keep)
    ]
    return [of_row[-row.count - 1 : -1] for of_row, row in zip(logits, rows, strict=True)]
