"""When a row that is being written is over, and what its text is: decided from that row alone, as
lm-eval decides it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.models.language_model import LanguageModel
from harness.scoring.backend import Generation, StopReason


@dataclass
class StopRule:
    """The ends of a row: ids and strings, and what is worth knowing to find them quickly."""

    tokenizer: Any
    ids: frozenset[int]
    strings: tuple[str, ...]
    # what the text is cut before, in this order: the strings, and special tokens that were spelled
    # out
    cuts: tuple[str, ...]
    tail: int  # enough tokens to hold any stop string
    # stop string -> the last tokens in which lm-eval looks for it: a window may read bytes that the
    # text does not
    windows: dict[str, int]
    # token -> whether a stop string may end in it
    completing: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: LanguageModel, stop: Sequence[str]) -> "StopRule":
        """Return the rule of a model for some stop strings."""
        # A stop string that is one special token would be gone from the decoded text: it stops by
        # its id.
        tokenizer = opened.tokenizer
        special_ids = set(tokenizer.all_special_ids)
        special = {
            text: i
            for text, i in tokenizer.get_vocab().items()
            if text in stop and i in special_ids
        }
        strings = tuple(text for text in stop if text and text not in special)
        longest = max((len(text.encode()) for text in strings), default=0)
        windows = {
            text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
            for text in strings
        }
        ends = opened.eos_ids | frozenset(special.values())
        return cls(
            tokenizer, ends, strings, tuple(text for text in stop if text), longest + 1, windows
        )

    def ended(self, rows: Sequence[list[int]], most: int) -> list[int]:
        """Return the indices of the rows whose last token ends them."""
        return [
            index
            for index, row in enumerate(rows)
            if row[-1] in self.ids
            or len(row) >= most
            or (self.strings and self._may_end(row[-1]) and self._has_stop(row))
        ]

    def _may_end(self, token: int) -> bool:
        """Tell whether a stop string can end inside a token's text; most tokens cannot, and need no
        decoding of the row.
        """
        known = self.completing.get(token)
        if known is None:
            text = self.tokenizer.decode([token])
            # where a word decoded alone loses its space, the second has it
            behind = self.tokenizer.decode([token, token])
            known = (
                "\ufffd" in text
                or not text
                or any(
                    stop in behind
                    or any(
                        part.startswith(stop[-size:])
                        for part in (text, f" {text}")
                        for size in range(1, len(stop) + 1)
                    )
                    for stop in self.strings
                )
            )
            self.completing[token] = known
        return known

    def _has_stop(self, row: list[int]) -> bool:
        tail = self.tokenizer.decode(row[-self.tail :], skip_special_tokens=True)
        return any(
            text in tail or text in self.tokenizer.decode(row[-self.windows[text] :])
            for text in self.strings
        )

    def finish(self, ids: list[int]) -> Generation:
        """Return what was written as an answer: its text without its end, and why it ended."""
        by_id = ids[-1] in self.ids
        whole = text = self.tokenizer.decode(ids[:-1] if by_id else ids, skip_special_tokens=True)
        for stop in self.cuts:  # one after the other, as lm-eval cuts
            text = text.partition(stop)[0]
        stopped = text != whole or (not by_id and bool(self.strings) and self._has_stop(ids))
        reason: StopReason = "eos" if by_id else "stop" if stopped else "length"
        return Generation(text, len(ids), reason, tuple(ids))
