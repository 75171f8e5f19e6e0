"""Our model for lm-eval: answers its requests by the shared path, or by the plain one where a model
needs that.

lm-eval keeps its tasks, prompts, filters and metrics. This class encodes
(`harness/scoring/request_tokens.py`), asks a backend through a journal
(`harness/scoring/journalled.py`), and keeps what lm-eval drops: tokens, stop reasons,
conversations, notes.
"""

import sys
from collections.abc import Callable
from typing import Any

import lm_eval.models  # noqa: F401  registers lm-eval's own models, which it does by itself only while it knows none
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import hash_string

from harness.files.digests import digest_of
from harness.machine.gpu import choose_device, default_dtype
from harness.models.encoding import starts_with_bos
from harness.models.language_model import LanguageModel, render_chat
from harness.scoring.answer_cache import Journal
from harness.scoring.backend import Backend, BatchSize, Generation, Scored, unheard
from harness.scoring.greedy import greedy_settings, notes_of
from harness.scoring.journalled import Journalled
from harness.scoring.request_tokens import RequestTokens
from harness.scoring.transformers_backend import Transformers


class HarnessLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers lm-eval's requests with a model of ours.

    `opened` gives tokenizer, context and identity; `backend` computes, `Transformers(opened,
    batch_size)` unless given. It is kept as `engine`: lm-eval asks its models for a `backend` of
    another meaning, and encodes context and continuation as one text where that says "causal".
    """

    def __init__(
        self,
        opened: LanguageModel,
        *,
        batch_size: BatchSize = "auto",
        backend: Backend | None = None,
        journal: Journal | None = None,
        progress: Callable[[int], None] = unheard,
        say: Callable[[str], None] = unheard,
    ) -> None:
        super().__init__()
        self.opened = opened
        self.tokenizer = opened.tokenizer
        self.engine: Backend = backend or Transformers(opened, batch_size)
        self.journal = journal or Journal()
        self.tokens = RequestTokens(opened, self.engine.max_length)
        self.answers = Journalled(self.engine, self.journal, progress=progress)
        self.notes: list[str] = []
        self._say = say
        self.generations: dict[tuple[str, int], Generation] = {}  # (task, item) -> what was written
        # lm-eval's hash of a rendered prompt -> digest of the conversation, in any template
        self.conversations: dict[str, str] = {}
        self.requests = 0
        for line in notes_of(opened, forbids=isinstance(self.engine, Transformers)):
            self.say(line)

    def say(self, line: str) -> None:
        """Keep and pass on a line worth reading, once."""
        if line not in self.notes:
            self.notes.append(line)
            self._say(line)

    @property
    def seconds(self) -> float:
        """Seconds of computing, those of answers from the journal as they were then."""
        return self.answers.seconds

    @property
    def cut_prompts(self) -> int:
        """Requests that lost tokens on the left."""
        return self.tokens.cut_prompts

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None where the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text scored from its first token."""
        return self.tokens.prefix_token_id

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.engine.max_length

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's identity for lm-eval's bookkeeping."""
        return self.opened.checkpoint.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template in use, for lm-eval's bookkeeping; "" without one."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation as the tokenizer's template does; an open answer is continued, not
        closed.
        """
        text = render_chat(self.tokenizer, chat_history, goes_on=not add_generation_prompt)
        if text[:1].isspace() and starts_with_bos(self.tokenizer, text):
            self.say(
                "the chat template writes white space before its BOS; the tokenizer's own BOS "
                "before that is left out"
            )
        self.conversations[hash_string(text)] = digest_of(chat_history)
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode as the tokenizer would by default."""
        return self.tokens.encode(string, add_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is the greedy choice) of each continuation; our progress instead
        of tqdm's.
        """
        self.requests += len(requests)
        return self._scores([self.tokens.scored(request) for request in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of whole texts, the sum over disjoint windows of the
        context.
        """
        self.requests += len(requests)
        windows = [self.tokens.windows(str(request.args[0])) for request in requests]
        scores = iter(self._scores([window for of_text in windows for window in of_text]))
        totals = [0.0] * len(requests)
        for owner, of_text in enumerate(windows):
            for _ in of_text:
                # one after the other: later Pythons' `sum` rounds otherwise
                totals[owner] += next(scores)[0]
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations that are tokens already."""
        return self._scores(
            [self.tokens.row(context, continuation) for _texts, context, continuation in requests]
        )

    def _scores(self, rows: list[Scored]) -> list[tuple[float, bool]]:
        return [
            (answer.log_probability, answer.greedy)
            for answer in self.answers.score(rows, say=self.say)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Write an answer to each request, greedily; groups requests that share their generation
        settings.
        """
        self.requests += len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings = greedy_settings(
                request.args[1], task=str(request.task_name), eos=self.tokenizer.eos_token
            )
            groups.setdefault(settings, []).append(index)
        texts = [""] * len(requests)
        for (new_tokens, stop), members in groups.items():
            prompts = [self.tokens.prompt(requests[index], new_tokens) for index in members]
            written = self.answers.generate(
                prompts, max_new_tokens=new_tokens, stop=stop, say=self.say
            )
            for index, answer in zip(members, written, strict=True):
                texts[index] = answer.text
                self.generations[
                    str(requests[index].task_name), int(requests[index].doc_id or 0)
                ] = answer
        return texts


@register_model("harness")
class LmEvalModel(HarnessLM):
    """`--model harness` of lm-eval's own command: `harness lm-eval --model harness --model_args
    pretrained=NAME ...`.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
        **unknown: Any,
    ) -> None:
        from harness.errors import HarnessError
        from harness.models.artefacts import default_cache
        from harness.models.language_model import open_model
        from harness.models.resolve import resolve

        ignored = {"max_batch_size", "trust_remote_code", "parallelize"}
        for key, value in unknown.items():
            if value and key not in ignored:
                raise HarnessError(
                    "--model harness takes pretrained, device, dtype and batch_size; "
                    f"{key}={value!r} is none of them"
                )
        # lm-eval's own default is cuda:0 everywhere; its backend falls back to the CPU where there
        # is none, and so do we.
        wanted = "cuda" if device in ("auto", None, "") else str(device)
        usable = wanted if not wanted.startswith("cuda") else choose_device("auto", say=self._warn)
        place = wanted if usable == "cuda" else usable
        kind = default_dtype(place, say=self._warn) if dtype in ("auto", None, "") else dtype
        opened = open_model(resolve(pretrained, cache=default_cache()), device=place, dtype=kind)
        super().__init__(
            opened, batch_size="auto" if batch_size in ("auto", None) else int(batch_size)
        )

    @staticmethod
    def _warn(line: str) -> None:
        print(line, file=sys.stderr)
