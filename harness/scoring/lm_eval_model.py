"""Our model for lm-eval: it answers lm-eval's requests with a backend.

lm-eval has its tasks, prompts, filters and metrics. `HarnessLM` encodes requests
(`harness/scoring/request_tokens.py`), asks a backend through a cache
(`harness/scoring/cached_backend.py`), and keeps what lm-eval drops: tokens, stop reasons,
conversations and notes.
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
from harness.scoring.answer_cache import AnswerCache
from harness.scoring.backend import (
    Backend,
    BatchSize,
    Generation,
    LikelihoodRequest,
    ignore_report,
)
from harness.scoring.cached_backend import CachedBackend
from harness.scoring.greedy import GreedySettings, greedy_settings, model_notes
from harness.scoring.request_tokens import RequestTokens
from harness.scoring.transformers_backend import TransformersBackend


class _EncodingLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """The part of our LM that encodes: tokenizer, longest input, chat template, and notes."""

    def __init__(self, opened: LanguageModel, max_length: int, say: Callable[[str], None]) -> None:
        super().__init__()
        self.opened = opened
        self.tokenizer = opened.tokenizer
        self.tokens = RequestTokens(opened, max_length)
        self.notes: list[str] = []
        self._say = say
        # lm-eval's hash of a rendered prompt -> digest of the conversation, in any template
        self.conversations: dict[str, str] = {}

    def say(self, line: str) -> None:
        """Keep a line as a note and report it; each line once."""
        if line not in self.notes:
            self.notes.append(line)
            self._say(line)

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
        """The token before a text that is scored from its first token."""
        return self.tokens.prefix_token_id

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.tokens.max_length

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm-eval's bookkeeping."""
        return self.opened.checkpoint.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template in use, for lm-eval's bookkeeping; "" without one."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the tokenizer's template.

        Without a generation prompt the last message stays open, so that the model continues it.
        """
        text = render_chat(self.tokenizer, chat_history, continue_last=not add_generation_prompt)
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


class HarnessLM(_EncodingLM):
    """Answers lm-eval's requests with a model of ours.

    `opened` has tokenizer, context and identity; `backend` computes, by default
    `TransformersBackend(opened, batch_size)`. The attribute is called `engine`, because lm-eval
    gives `backend` another meaning: where it is "causal", lm-eval encodes context and continuation
    as one text.
    """

    def __init__(
        self,
        opened: LanguageModel,
        *,
        batch_size: BatchSize = "auto",
        backend: Backend | None = None,
        answer_cache: AnswerCache | None = None,
        progress: Callable[[int], None] = ignore_report,
        say: Callable[[str], None] = ignore_report,
    ) -> None:
        self.engine: Backend = backend or TransformersBackend(opened, batch_size)
        super().__init__(opened, self.engine.max_length, say)
        self.answer_cache = answer_cache or AnswerCache()
        self.answers = CachedBackend(self.engine, self.answer_cache, progress=progress)
        self.generations: dict[tuple[str, int], Generation] = {}  # (task, item) -> its answer
        self.requests = 0
        for line in model_notes(opened, forbids=isinstance(self.engine, TransformersBackend)):
            self.say(line)

    @property
    def seconds(self) -> float:
        """Seconds that all answers took to compute, those from the cache included."""
        return self.answers.seconds

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy decoding writes it) of each continuation.

        Progress is reported by our callbacks, not by tqdm.
        """
        self.requests += len(requests)
        return self._scores([self.tokens.scored(request) for request in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihoods of whole texts: sums over disjoint windows of the context."""
        self.requests += len(requests)
        windows_of = [self.tokens.windows(str(request.args[0])) for request in requests]
        scores = iter(self._scores([window for windows in windows_of for window in windows]))
        totals = [0.0] * len(requests)
        for index, windows in enumerate(windows_of):
            for _ in windows:
                # added one by one: `sum` of later Pythons rounds differently
                totals[index] += next(scores)[0]
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations that are token ids already."""
        return self._scores(
            [self.tokens.row(context, continuation) for _texts, context, continuation in requests]
        )

    def _scores(self, requests: list[LikelihoodRequest]) -> list[tuple[float, bool]]:
        answers = self.answers.score(requests, say=self.say)
        return [(answer.log_probability, answer.is_greedy) for answer in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Write an answer to each request greedily; return the answers' texts."""
        self.requests += len(requests)
        indices_of: dict[GreedySettings, list[int]] = {}
        for index, request in enumerate(requests):
            settings = greedy_settings(
                request.args[1], task=str(request.task_name), eos=self.tokenizer.eos_token
            )
            indices_of.setdefault(settings, []).append(index)
        texts = [""] * len(requests)
        for (new_tokens, stop), indices in indices_of.items():
            prompts = [self.tokens.prompt(requests[index], new_tokens) for index in indices]
            answers = self.answers.generate(
                prompts, max_new_tokens=new_tokens, stop=stop, say=self.say
            )
            for index, answer in zip(indices, answers, strict=True):
                texts[index] = answer.text
                item = int(requests[index].doc_id or 0)
                self.generations[str(requests[index].task_name), item] = answer
        return texts


@register_model("harness")
class LmEvalModel(HarnessLM):
    """`--model harness` of lm-eval's own command.

    For example `harness lm-eval --model harness --model_args pretrained=NAME ...`.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
        **other_arguments: Any,
    ) -> None:
        from harness.errors import HarnessError
        from harness.models.artefacts import default_cache
        from harness.models.language_model import open_model
        from harness.models.resolve import resolve

        ignored = {"max_batch_size", "trust_remote_code", "parallelize"}
        for key, value in other_arguments.items():
            if value and key not in ignored:
                raise HarnessError(
                    "--model harness takes pretrained, device, dtype and batch_size; "
                    f"{key}={value!r} is none of them"
                )
        # lm-eval's default is cuda:0 on every machine; its own backend falls back to the CPU where
        # there is no GPU, and so do we.
        requested = "cuda" if device in ("auto", None, "") else str(device)
        usable = (
            choose_device("auto", say=self._warn) if requested.startswith("cuda") else requested
        )
        device = requested if usable == "cuda" else usable
        dtype = default_dtype(device, say=self._warn) if dtype in ("auto", None, "") else dtype
        checkpoint = resolve(pretrained, cache=default_cache())
        opened = open_model(checkpoint, device=device, dtype=dtype)
        super().__init__(
            opened, batch_size="auto" if batch_size in ("auto", None) else int(batch_size)
        )

    @staticmethod
    def _warn(line: str) -> None:
        print(line, file=sys.stderr)
