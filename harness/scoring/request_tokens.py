"""lm-eval's requests as token ids: encoded, and cut on the left, as lm-eval does it.

Requests that have no tokens are refused.
"""

from typing import NamedTuple

from lm_eval.api.instance import Instance

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from harness.scoring.backend import LikelihoodRequest


class TokenPair(NamedTuple):
    """The token ids of a context and of its continuation."""

    context: list[int]
    continuation: list[int]


class RequestTokens:
    """Encodes requests for a model with inputs of at most `max_length` tokens, and counts cuts."""

    def __init__(self, opened: LanguageModel, max_length: int) -> None:
        self.opened, self.max_length = opened, max_length
        self.tokenizer = opened.tokenizer
        self.cut_prompts = 0  # requests that lost tokens on the left
        self._last_context: tuple[str, list[int]] | None = None  # its text and its tokens

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that is scored from its first token: BOS, else EOS."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((int(token) for token in ids if token is not None), None)
        if token is None:
            raise CellFailed(
                f"the tokenizer of {self.opened.checkpoint.name} has neither BOS nor EOS, and a "
                "text that is scored from its first token needs one of them before it; set "
                "bos_token or eos_token in its tokenizer_config.json"
            )
        return token

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Encode with the tokenizer's defaults for special tokens, unless `special` says otherwise.

        A text that starts with BOS gets no second one (EOS for a tokenizer without BOS).
        """
        eos = self.tokenizer.eos_token
        if special is None and not self.tokenizer.bos_token and eos and text.startswith(eos):
            special = False
        ids = self.opened.encode(text, special=special)
        self.opened.refuse_unknown_ids(ids)
        return ids

    def pair(self, context: str, continuation: str) -> TokenPair:
        """Encode both as one text, as lm-eval does; equal contexts in a row are encoded once."""
        stripped = context.rstrip()
        if self._last_context is None or self._last_context[0] != stripped:
            self._last_context = stripped, self.encode(stripped)
        context_ids = self._last_context[1]
        return TokenPair(context_ids, self.encode(context + continuation)[len(context_ids) :])

    def scored(self, request: Instance) -> LikelihoodRequest:
        """Return a request for a log-probability; raises `CellFailed` if a side has no tokens."""
        context, continuation = (str(part) for part in request.args)
        if context:
            context_ids, continuation_ids = self.pair(context, continuation)
        else:
            context_ids = [self.prefix_token_id]
            continuation_ids = self.encode(continuation, special=False)
            if context_ids == continuation_ids[:1]:
                context_ids, continuation_ids = continuation_ids[:1], continuation_ids[1:]
        for ids, side, text in (
            (continuation_ids, "continuation", continuation),
            (context_ids, "context", context),
        ):
            if not ids:
                raise CellFailed(
                    f"task {request.task_name}, item {request.doc_id}: the {side} {text[-40:]!r} "
                    "becomes no token of its own in the "
                    f"tokenizer of {self.opened.checkpoint.name}, and has no probability; give it "
                    "a text, or leave the item out"
                )
        return self.row(context_ids, continuation_ids)

    def row(self, context: list[int], continuation: list[int]) -> LikelihoodRequest:
        """Return a request for the continuation after its context, cut to the model's context.

        One token more than `max_length` fits, because the last token is never fed to the model.
        """
        if len(continuation) > self.max_length:
            raise CellFailed(
                f"a continuation of {len(continuation)} tokens is longer than the context of "
                f"{self.max_length} tokens "
                f"of {self.opened.checkpoint.name}"
            )
        self.refuse_two_bos(context)
        ids = self._left_truncated(context + continuation, self.max_length + 1)
        return LikelihoodRequest(ids, len(continuation))

    def windows(self, text: str) -> list[LikelihoodRequest]:
        """Cut a whole text into disjoint windows of the context, as lm-eval cuts them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rolling = get_rolling_token_windows(
            token_list=self.encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [self.row(context, scored) for context, scored in map(make_disjoint_window, rolling)]

    def prompt(self, request: Instance, new_tokens: int) -> list[int]:
        """Return the prompt of a request for a text, cut so that `new_tokens` fit after it."""
        room = self.max_length - new_tokens
        if room < 1:
            raise CellFailed(
                f"task {request.task_name} writes up to {new_tokens} tokens and "
                f"{self.opened.checkpoint.name} has a context of {self.max_length} tokens: "
                "there is no room for a prompt; set a smaller max_gen_toks in the task, or take "
                "a model with a longer context"
            )
        ids = self.opened.encode(request.args[0])
        self.opened.refuse_unknown_ids(ids)
        self.refuse_two_bos(ids)
        return self._left_truncated(ids, room)

    def refuse_two_bos(self, ids: list[int]) -> None:
        """Raise `CellFailed` for a prompt that begins with BOS twice; no model was trained so."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise CellFailed(
                f"a prompt begins with two BOS tokens ({self.tokenizer.bos_token!r}); its template "
                "writes one of its own"
            )

    def _left_truncated(self, ids: list[int], most: int) -> list[int]:
        """Return the last `most` tokens, as lm-eval cuts, and count what was cut for the record."""
        if len(ids) <= most:
            return ids
        self.cut_prompts += 1
        return ids[len(ids) - most :]
