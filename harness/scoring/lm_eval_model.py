"""Our model for lm-eval: answers its requests by the shared path, or by the plain one where a model needs that.

lm-eval keeps its tasks, prompts, filters and metrics. This class encodes, cuts what is too long as lm-eval does (and
counts it), asks a backend (`harness/scoring/likelihood.py` and `harness/scoring/generation.py`, or vLLM), and keeps what lm-eval drops:
tokens, stop reasons, the seconds, the answers (in a journal).
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import lm_eval.models  # noqa: F401  registers lm-eval's own models, which it does by itself only while it knows none
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import hash_string

from harness.errors import CellFailed
from harness.files.digests import digest_of
from harness.machine.gpu import choose_device, default_dtype
from harness.models.encoding import brings_bos
from harness.models.language_model import LanguageModel, as_chat
from harness.scoring.answer_cache import Journal, asked
from harness.scoring.generation import BatchSize, Generation, generate, why_plain
from harness.scoring.greedy import greedy_settings, notes_of
from harness.scoring.likelihood import Answer, Scored, log_likelihoods


class Backend(Protocol):
    """What computes: it is given token ids and calls `finished` with each row's answer as soon as it is there."""

    path: str  # how it computes, as records print it: rows of one table share it
    max_length: int  # the longest input in tokens

    def log_likelihoods(
        self, rows: Sequence[Scored], *, known: Mapping[int, Answer], finished: Callable[[int, Answer], None], say: Callable[[str], None]
    ) -> list[Answer]:
        """Score the continuation of every row whose answer is not `known`."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: tuple[str, ...], progress: Callable[[int], None],
        finished: Callable[[int, Generation], None], say: Callable[[str], None],
    ) -> list[Generation]:  # fmt: skip
        """Continue every prompt greedily."""
        ...


class Transformers:
    """The default backend: the opened model itself, on the shared path or its own."""

    def __init__(self, opened: LanguageModel, batch_size: BatchSize = "auto", *, pack: int | None = None) -> None:
        self.opened, self.batch_size, self.pack = opened, batch_size, pack
        self.path, self.max_length = path_of(opened), opened.context

    def log_likelihoods(
        self, rows: Sequence[Scored], *, known: Mapping[int, Answer], finished: Callable[[int, Answer], None], say: Callable[[str], None]
    ) -> list[Answer]:
        """Score the continuation of every row whose answer is not `known`."""
        return log_likelihoods(self.opened, rows, batch_size=self.batch_size, pack=self.pack, known=known, finished=finished, say=say)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: tuple[str, ...], progress: Callable[[int], None],
        finished: Callable[[int, Generation], None], say: Callable[[str], None],
    ) -> list[Generation]:  # fmt: skip
        """Continue every prompt greedily."""
        return generate(
            self.opened, prompts, max_new_tokens=max_new_tokens, stop=stop, batch_size=self.batch_size, progress=progress,
            finished=finished, say=say,
        )  # fmt: skip


def path_of(opened: LanguageModel) -> str:
    """Return the path that a transformers model takes."""
    return "transformers/plain/2" if why_plain(opened) else "transformers/shared/1"


class HarnessLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers lm-eval's requests with a model of ours.

    `opened` gives tokenizer, context and identity; `backend` computes, `Transformers(opened, batch_size)` unless given. It is kept as
    `engine`: lm-eval asks its models for a `backend` of another meaning, and encodes context and continuation as one text where that
    says "causal".
    """

    def __init__(
        self,
        opened: LanguageModel,
        *,
        batch_size: BatchSize = "auto",
        backend: Backend | None = None,
        journal: Journal | None = None,
        progress: Callable[[int], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.opened = opened
        self.tokenizer = opened.tokenizer
        self.engine: Backend = backend or Transformers(opened, batch_size)
        self.journal = journal or Journal()
        self.progress = progress
        self.notes: list[str] = []
        self._say = say
        self.generations: dict[tuple[str, int], Generation] = {}  # (task, item) -> what was written
        self.conversations: dict[str, str] = {}  # lm-eval's hash of a rendered prompt -> digest of the conversation, in any template
        self.requests = 0
        self.seconds = 0.0  # of computing, those of answers from the journal as they were then
        self.cut_prompts = 0  # requests that lost tokens on the left
        self._since = 0.0
        self._context: tuple[str, list[int]] | None = None  # the last one that was encoded
        for line in notes_of(opened, forbids=isinstance(self.engine, Transformers)):
            self.say(line)

    def say(self, line: str) -> None:
        """Keep and pass on a line worth reading, once."""
        if line not in self.notes:
            self.notes.append(line)
            self._say(line)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None where the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text scored from its first token: BOS, else the end of the text before."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((int(one) for one in ids if one is not None), None)
        if token is None:
            raise CellFailed(
                f"the tokenizer of {self.opened.checkpoint.name} has neither BOS nor EOS, so nothing can stand before a text that is "
                "scored from its first token; set bos_token or eos_token in its tokenizer_config.json"
            )
        return token

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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as the tokenizer's template does; an open answer is continued, not closed."""
        text = as_chat(self.tokenizer, chat_history, goes_on=not add_generation_prompt)
        if text[:1].isspace() and brings_bos(self.tokenizer, text):
            self.say("the chat template writes white space before its BOS; the tokenizer's own BOS before that is left out")
        self.conversations[hash_string(text)] = digest_of(chat_history)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode as the tokenizer would by default; a text that starts with BOS (EOS where there is none) gets no second."""
        eos = self.tokenizer.eos_token
        if add_special_tokens is None and not self.tokenizer.bos_token and eos and string.startswith(eos):
            add_special_tokens = False
        ids = self.opened.encode(string, special=add_special_tokens)
        self.opened.refuse_unknown(ids)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode as lm-eval does, the context of a question's choices once."""
        kept = context.rstrip()
        if self._context is None or self._context[0] != kept:
            self._context = kept, self.tok_encode(kept)
        before = self._context[1]
        return before, self.tok_encode(context + continuation)[len(before) :]

    def _encoded(self, request: Instance) -> tuple[tuple[str, str], list[int], list[int]]:
        """Encode one request; neither side may be without tokens."""
        context, continuation = (str(part) for part in request.args)
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if before == after[:1]:
                before, after = after[:1], after[1:]
        for ids, what, text in ((after, "continuation", continuation), (before, "context", context)):
            if not ids:
                raise CellFailed(
                    f"task {request.task_name}, item {request.doc_id}: the {what} {text[-40:]!r} becomes no token of its own in the "
                    f"tokenizer of {self.opened.checkpoint.name}, and has no probability; give it a text, or leave the item out"
                )
        return (context, continuation), before, after

    def _left_truncated(self, ids: list[int], most: int) -> list[int]:
        """Cut on the left, as lm-eval does; counted, and told with the score."""
        if len(ids) <= most:
            return ids
        self.cut_prompts += 1
        return ids[len(ids) - most :]

    def _one_bos(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise CellFailed(f"a prompt begins with two BOS tokens ({self.tokenizer.bos_token!r}); its template writes one of its own")

    def _tick(self) -> float:
        """Return the seconds since the answer before this one, and count them."""
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self.seconds += passed
        return passed

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-probability, is the greedy choice) of each continuation; our progress instead of tqdm's."""
        self.requests += len(requests)
        return self._loglikelihood_tokens([self._encoded(request) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of whole texts, in disjoint windows of the context, as lm-eval cuts them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        self.requests += len(requests)
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(str(request.args[0]))
            cuts = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, scored in map(make_disjoint_window, cuts):
                windows.append((("", ""), context, scored))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **given: Any) -> list[tuple[float, bool]]:
        """Score continuations, those in the journal without asking the model."""
        rows: list[Scored] = []
        keys: list[str] = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise CellFailed(
                    f"a continuation of {len(continuation)} tokens is longer than the context of {self.max_length} tokens "
                    f"of {self.opened.checkpoint.name}"
                )
            self._one_bos(context)
            ids = self._left_truncated(context + continuation, self.max_length + 1)
            rows.append(Scored(ids, len(continuation)))
            keys.append(asked(ids, len(continuation)))
        held = {index: answer for index, key in enumerate(keys) if (answer := self.journal.get(key)) is not None}
        self.seconds += sum(seconds for _, seconds in held.values())
        known = {index: (float(str(value)), bool(likeliest)) for index, ((value, likeliest), _) in held.items()}
        self.progress(len(known))
        self._since = time.perf_counter()

        def finished(row: int, answer: tuple[float, bool]) -> None:
            self.journal.put(keys[row], list(answer), self._tick())
            self.progress(1)

        return self.engine.log_likelihoods(rows, known=known, finished=finished, say=self.say)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Write an answer to each request, greedily; groups requests that share their generation settings."""
        self.requests += len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings = greedy_settings(request.args[1], task=str(request.task_name), eos=self.tokenizer.eos_token)
            groups.setdefault(settings, []).append(index)
        answers = [""] * len(requests)
        for (new_tokens, stop), members in groups.items():
            prompts = [self._prompt(requests[index], new_tokens) for index in members]
            for index, one in zip(members, self._written(prompts, new_tokens, stop), strict=True):
                answers[index] = one.text
                self.generations[str(requests[index].task_name), int(requests[index].doc_id or 0)] = one
        return answers

    def _prompt(self, request: Instance, new_tokens: int) -> list[int]:
        room = self.max_length - new_tokens
        if room < 1:
            raise CellFailed(
                f"task {request.task_name} writes up to {new_tokens} tokens and {self.opened.checkpoint.name} has a context of "
                f"{self.max_length}: there is no room for a prompt longer than the context of {self.max_length} tokens allows"
            )
        ids = self.opened.encode(request.args[0])
        self.opened.refuse_unknown(ids)
        self._one_bos(ids)
        return self._left_truncated(ids, room)

    def _written(self, prompts: list[list[int]], new_tokens: int, stop: tuple[str, ...]) -> list[Generation]:
        keys = [asked(ids, new_tokens, stop) for ids in prompts]
        known = {index: held for index, key in enumerate(keys) if (held := self.journal.get(key)) is not None}
        self.seconds += sum(seconds for _, seconds in known.values())
        missing = [index for index in range(len(prompts)) if index not in known]
        self.progress(len(known))
        self._since = time.perf_counter()

        def finished(row: int, one: Generation) -> None:
            self.journal.put(keys[missing[row]], [one.text, one.tokens, one.stop], self._tick())

        fresh = self.engine.generate(
            [prompts[index] for index in missing], max_new_tokens=new_tokens, stop=stop, progress=self.progress, finished=finished,
            say=self.say,
        )  # fmt: skip
        answers = {index: Generation(str(held[0]), int(str(held[1])), held[2]) for index, (held, _) in known.items()}  # type: ignore[arg-type]
        return [answer for _, answer in sorted({**answers, **dict(zip(missing, fresh, strict=True))}.items())]


@register_model("harness")
class LmEvalModel(HarnessLM):
    """`--model harness` of lm-eval's own command: `harness lm-eval --model harness --model_args pretrained=NAME ...`."""

    def __init__(self, pretrained: str, device: str = "auto", dtype: str = "auto", batch_size: int | str = "auto", **unknown: Any) -> None:
        from harness.errors import HarnessError
        from harness.models.artefacts import default_cache
        from harness.models.language_model import open_model
        from harness.models.resolve import resolve

        ignored = {"max_batch_size", "trust_remote_code", "parallelize"}
        for key, value in unknown.items():
            if value and key not in ignored:
                raise HarnessError(f"--model harness takes pretrained, device, dtype and batch_size; {key}={value!r} is none of them")
        # lm-eval's own default is cuda:0 everywhere; its backend falls back to the CPU where there is none, and so do we.
        wanted = "cuda" if device in ("auto", None, "") else str(device)
        usable = wanted if not wanted.startswith("cuda") else choose_device("auto", say=self._warn)
        place = wanted if usable == "cuda" else usable
        kind = default_dtype(place, say=self._warn) if dtype in ("auto", None, "") else dtype
        opened = open_model(resolve(pretrained, cache=default_cache()), device=place, dtype=kind)
        super().__init__(opened, batch_size="auto" if batch_size in ("auto", None) else int(batch_size))

    @staticmethod
    def _warn(line: str) -> None:
        print(line, file=sys.stderr)
