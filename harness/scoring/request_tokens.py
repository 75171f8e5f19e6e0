"""lm-eval's requests as token ids: encoded and cut on the left as lm-eval does it, and what has no
tokens refused.
"""

from lm_eval.api.instance import Instance

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from harness.scoring.backend import Scored


class RequestTokens:
    """Encodes for one model whose inputs have at most `max_length` tokens, and counts what
    it cuts.
    """

    def __init__(self, opened: LanguageModel, max_length: int) -> None:
        self.opened, self.max_length = opened, max_length
        self.tokenizer = opened.tokenizer
        self.cut_prompts = 0  # requests that lost tokens on the left
        self._context: tuple[str, list[int]] | None = None  # the last one that was encoded

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text scored from its first token: BOS, else the end of the text
        before.
        """
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((int(token) for token in ids if token is not None), None)
        if token is None:
            raise CellFailed(
                f"the tokenizer of {self.opened.checkpoint.name} has neither BOS nor EOS, so "
                "nothing can stand before a text that is "
                "scored from its first token; set bos_token or eos_token in its "
                "tokenizer_config.json"
            )
        return token

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Encode as the tokenizer would by default; a text that starts with BOS (EOS where there is
        none) gets no second.
        """
        eos = self.tokenizer.eos_token
        if special is None and not self.tokenizer.bos_token and eos and text.startswith(eos):
            special = False
        ids = self.opened.encode(text, special=special)
        self.opened.refuse_unknown_ids(ids)
        return ids

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as one text, as lm-eval does, the context of a question's choices once."""
        kept = context.rstrip()
        if self._context is None or self._context[0] != kept:
            self._context = kept, self.encode(kept)
        before = self._context[1]
        return before, self.encode(context + continuation)[len(before) :]

    def scored(self, request: Instance) -> Scored:
        """Return a request for a log-probability as a backend is asked; neither side may be without
        tokens.
        """
        context, continuation = (str(part) for part in request.args)
        if context:
            before, after = self.pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.encode(continuation, special=False)
            if before == after[:1]:
                before, after = after[:1], after[1:]
        for ids, what, text in (
            (after, "continuation", continuation),
            (before, "context", context),
        ):
            if not ids:
                raise CellFailed(
                    f"task {request.task_name}, item {request.doc_id}: the {what} {text[-40:]!r} "
                    "becomes no token of its own in the "
                    f"tokenizer of {self.opened.checkpoint.name}, and has no probability; give it "
                    "a text, or leave the item out"
                )
        return self.row(before, after)

    def row(self, context: list[int], continuation: list[int]) -> Scored:
        """Return a context and what is scored behind it, cut to what the model can be shown; the
        last token is never fed.
        """
        if len(continuation) > self.max_length:
            raise CellFailed(
                f"a continuation of {len(continuation)} tokens is longer than the context of "
                f"{self.max_length} tokens "
                f"of {self.opened.checkpoint.name}"
            )
        self.refuse_two_bos(context)
        return Scored(
            self._left_truncated(context + continuation, self.max_length + 1), len(continuation)
        )

    def windows(self, text: str) -> list[Scored]:
        """Cut a whole text into disjoint windows of the context, as lm-eval cuts them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        cuts = get_rolling_token_windows(
            token_list=self.encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [self.row(context, scored) for context, scored in map(make_disjoint_window, cuts)]

    def prompt(self, request: Instance, new_tokens: int) -> list[int]:
        """Return the prompt of a request for a text, cut so that the answer has room."""
        room = self.max_length - new_tokens
        if room < 1:
            raise CellFailed(
                f"task {request.task_name} writes up to {new_tokens} tokens and "
                f"{self.opened.checkpoint.name} has a context of "
                f"{self.max_length}: there is no room for a prompt longer than the context of "
                f"{self.max_length} tokens allows"
            )
        ids = self.opened.encode(request.args[0])
        self.opened.refuse_unknown_ids(ids)
        self.refuse_two_bos(ids)
        return self._left_truncated(ids, room)

    def refuse_two_bos(self, ids: list[int]) -> None:
        """Refuse a prompt that begins with BOS twice: its model has never seen that."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise CellFailed(
                f"a prompt begins with two BOS tokens ({self.tokenizer.bos_token!r}); its template "
                "writes one of its own"
            )

    def _left_truncated(self, ids: list[int], most: int) -> list[int]:
        """Cut on the left, as lm-eval does; counted, and told with the score."""
        if len(ids) <= most:
            return ids
        self.cut_prompts += 1
        return ids[len(ids) - most :]
