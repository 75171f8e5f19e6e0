"""Tokens that a generation config forbids, such as the image placeholders of Idefics and SmolVLM.

Read are `suppress_tokens`, `begin_suppress_tokens` (for the first token only) and `bad_words_ids`
(one token, or the last of several that would complete a word), by the rules of transformers' own
logits processors. No torch at import.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.models.language_model import LanguageModel

if TYPE_CHECKING:
    import torch

# names in a generation config
SUPPORTED_SETTINGS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class ForbiddenTokens:
    """The ids of tokens that a model must not write."""

    always: tuple[int, ...] = ()
    first: tuple[int, ...] = ()  # as the first token of an answer
    # words of two tokens and more: the last token is forbidden after the others
    words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, opened: LanguageModel) -> "ForbiddenTokens":
        """Read a model's generation config.

        An EOS is never forbidden as a bad word. Ids outside the vocabulary are left out.
        """
        config = getattr(opened.model, "generation_config", None)
        words, always, first = (
            [*(getattr(config, name, None) or ())] for name in SUPPORTED_SETTINGS
        )
        eos = getattr(config, "eos_token_id", None)
        eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
        one_token_words = [word[0] for word in words if len(word) == 1 and word[0] not in eos_ids]
        longer_words = tuple(
            tuple(word) for word in words if len(word) > 1 and word[-1] < opened.vocabulary
        )
        always_ids, first_ids = (
            tuple(sorted({token for token in ids if 0 <= token < opened.vocabulary}))
            for ids in ([*always, *one_token_words], first)
        )
        return cls(always_ids, first_ids, longer_words)

    def mask_logits(
        self,
        logits_BV: "torch.Tensor",
        prompts: Sequence[Sequence[int]],
        written: Sequence[Sequence[int]],
    ) -> "torch.Tensor":
        """Return a copy of the logits with forbidden tokens at minus infinity.

        Where nothing is forbidden, the same tensor is returned.
        """
        if self == ForbiddenTokens():
            return logits_BV
        logits_BV = logits_BV.clone()
        if self.always:
            logits_BV[:, list(self.always)] = -float("inf")
        for row, (prompt, answer) in enumerate(zip(prompts, written, strict=True)):
            if tokens := self._forbidden_after(prompt, answer):
                logits_BV[row, tokens] = -float("inf")
        return logits_BV

    def _forbidden_after(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """Return the tokens that are forbidden next in one row, beside those always forbidden."""
        longest = max(map(len, self.words), default=0)
        text = tuple([*prompt[-longest:], *answer][-longest:]) if longest else ()
        completing = [
            word[-1]
            for word in self.words
            if len(text) >= len(word) and text[1 - len(word) :] == word[:-1]
        ]
        return [*completing, *(self.first if not answer else ())]
