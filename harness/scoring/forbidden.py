"""Tokens that a generation config forbids: transformers never writes them (pictures' placeholders
in Idefics and SmolVLM), so nor do we.

`suppress_tokens`, `begin_suppress_tokens` (the first token alone) and `bad_words_ids` (one token,
or the last of several that would end a word), by the rules of transformers' own logits processors.
No torch at import.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel

if TYPE_CHECKING:
    import torch

# a generation config's names
HONOURED = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class Forbidden:
    """What may not be written: token ids."""

    always: tuple[int, ...] = ()
    first: tuple[int, ...] = ()  # as the first token of an answer
    # of two tokens and more: the last one, behind the others
    words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, opened: LanguageModel) -> "Forbidden":
        """Read a model's generation config; an EOS is no bad word, and ids outside the table are
        never written anyway.
        """
        config = getattr(opened.model, "generation_config", None)
        words, always, first = ([*(getattr(config, name, None) or ())] for name in HONOURED)
        listed = getattr(config, "eos_token_id", None)
        own = {listed} if isinstance(listed, int) else set(listed or ())
        single = [word[0] for word in words if len(word) == 1 and word[0] not in own]
        several = tuple(
            tuple(word) for word in words if len(word) > 1 and word[-1] < opened.vocabulary
        )
        within = [
            sorted({token for token in ids if 0 <= token < opened.vocabulary})
            for ids in ([*always, *single], first)
        ]
        return cls(tuple(within[0]), tuple(within[1]), several)

    def masked(
        self,
        logits_BV: "torch.Tensor",
        prompts: Sequence[Sequence[int]],
        written: Sequence[Sequence[int]],
    ) -> "torch.Tensor":
        """Return logits with what may not be written next at minus infinity; the same tensor where
        nothing is forbidden.
        """
        if self == Forbidden():
            return logits_BV
        logits_BV = logits_BV.clone()
        if self.always:
            logits_BV[:, list(self.always)] = -float("inf")
        for index, (prompt, own) in enumerate(zip(prompts, written, strict=True)):
            if tokens := self._here(prompt, own):
                logits_BV[index, tokens] = -float("inf")
        return logits_BV

    def _here(self, prompt: Sequence[int], written: Sequence[int]) -> list[int]:
        """Return what may not follow one row, beside what nothing may."""
        longest = max(map(len, self.words), default=0)
        text = tuple([*prompt[-longest:], *written][-longest:]) if longest else ()
        ended = [
            word[-1]
            for word in self.words
            if len(text) >= len(word) and text[1 - len(word) :] == word[:-1]
        ]
        return [*ended, *(self.first if not written else ())]
