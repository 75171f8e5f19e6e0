"""Decides when a row that is being decoded ends, and what its text is, from that row alone.

The rules are lm-eval's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.models.language_model import LanguageModel
from harness.scoring.backend import Generation, StopReason


@dataclass
class StopRule:
    """Ids and strings that end a row, and what is needed to find them quickly."""

    tokenizer: Any
    ids: frozenset[int]
    strings: tuple[str, ...]
    # what the text is cut before, in this order: the strings, and special tokens that were spelled
    # out
    cuts: tuple[str, ...]
    tail: int  # enough tokens to hold any stop string
    # stop string -> how many last tokens lm-eval searches for it: a window may decode to bytes
    # that the whole text does not have
    windows: dict[str, int]
    # token -> whether a stop string may end in it
    completing: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: LanguageModel, stop: Sequence[str]) -> "StopRule":
        """Return the rule of a model for some stop strings."""
        # A stop string that is one special token is missing in decoded text: its id ends the row.
        tokenizer = opened.tokenizer
        special_ids = set(tokenizer.all_special_ids)
        special = {
            text: token
            for text, token in tokenizer.get_vocab().items()
            if text in stop and token in special_ids
        }
        strings = tuple(text for text in stop if text and text not in special)
        longest = max((len(text.encode()) for text in strings), default=0)
        windows = {
            text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
            for text in strings
        }
        end_ids = opened.eos_ids | frozenset(special.values())
        cuts = tuple(text for text in stop if text)
        return cls(tokenizer, end_ids, strings, cuts, longest + 1, windows)

    def ended(self, rows: Sequence[list[int]], most: int) -> list[int]:
        """Return the indices of the rows that end with their last token, or have `most` tokens."""
        return [
            index
            for index, row in enumerate(rows)
            if row[-1] in self.ids
            or len(row) >= most
            or (self.strings and self._may_end(row[-1]) and self._has_stop(row))
        ]

    def _may_end(self, token: int) -> bool:
        """Tell whether a stop string can end inside a token's text.

        Most tokens cannot end one, and then the row need not be decoded.
        """
        may_end = self.completing.get(token)
        if may_end is None:
            text = self.tokenizer.decode([token])
            # where decoding drops the space before a first word, the second copy has it
            doubled = self.tokenizer.decode([token, token])
            may_end = (
                "\ufffd" in text
                or not text
                or any(stop in doubled or _overlaps(text, stop) for stop in self.strings)
            )
            self.completing[token] = may_end
        return may_end

    def _has_stop(self, row: list[int]) -> bool:
        tail = self.tokenizer.decode(row[-self.tail :], skip_special_tokens=True)
        return any(
            text in tail or text in self.tokenizer.decode(row[-self.windows[text] :])
            for text in self.strings
        )

    def finish(self, ids: list[int]) -> Generation:
        """Return the written tokens as an answer: the text without its end, and why it ended."""
        by_id = ids[-1] in self.ids
        full_text = self.tokenizer.decode(ids[:-1] if by_id else ids, skip_special_tokens=True)
        text = full_text
        for stop in self.cuts:  # one after the other, as lm-eval cuts
            text = text.partition(stop)[0]
        by_string = text != full_text or (not by_id and bool(self.strings) and self._has_stop(ids))
        reason: StopReason = "eos" if by_id else "stop" if by_string else "length"
        return Generation(text, len(ids), reason, tuple(ids))


def _overlaps(text: str, stop: str) -> bool:
    """Tell whether a text, with or without a space before it, begins with an end of `stop`."""
    return any(
        part.startswith(stop[-size:])
        for part in (text, f" {text}")
        for size in range(1, len(stop) + 1)
    )
