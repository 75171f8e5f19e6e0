"""Our model for lm-eval: simple, correct, independent of the batch size. One class, one seam.

lm-eval keeps its tasks, prompts, filters and metrics; this class only answers requests. A later, faster path
replaces the two methods at the bottom and must give the same answers.
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from harness.errors import CellFailed
from harness.generate import Generation, generate, left_padded
from harness.model import LanguageModel

PATH = "transformers/plain/1"  # printed in records: rows of one table must share it
DEFAULT_NEW_TOKENS = 256  # lm-eval's own default where a task names none


class PlainLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers lm-eval's requests with a transformers model; keeps what lm-eval drops (tokens, stop reason)."""

    def __init__(self, opened: LanguageModel, *, batch_size: int, progress: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self.opened = opened
        self.tokenizer = opened.tokenizer
        self.batch_size = batch_size
        self.progress = progress
        self.generations: dict[tuple[str, int], Generation] = {}  # (task, item) -> what was written
        self.requests = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; stands before an empty context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's identity for lm-eval's bookkeeping."""
        return self.opened.checkpoint.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode as the tokenizer would by default; a text that already starts with BOS gets no second one."""
        bos = self.tokenizer.bos_token
        special = True if add_special_tokens is None else add_special_tokens
        if bos and string.startswith(bos):
            special = False
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-probability, is the greedy choice) of each continuation; our progress instead of tqdm's."""
        self.requests += len(requests)
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of whole texts; refused beyond the context, where windows would be needed."""
        self.requests += len(requests)
        tokens = [([self.eot_token_id], self.tok_encode(str(request.args[0]), add_special_tokens=False)) for request in requests]
        return [score for score, _ in self._loglikelihood_tokens([(("", ""), context, text) for context, text in tokens])]

    def _fits(self, length: int, what: str) -> None:
        if length > self.opened.context:
            raise CellFailed(
                f"a {what} of {length} tokens is longer than the context of {self.opened.context} tokens of {self.opened.checkpoint.name}"
            )

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        """Score continuations; requests that share their input (the letters of one question) share a forward."""
        inputs = [tuple((context + continuation)[:-1]) for _, context, continuation in requests]
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, key in enumerate(inputs):
            sharing.setdefault(key, []).append(index)
        keys = sorted(sharing, key=len, reverse=True)
        if keys:
            self._fits(len(keys[0]), "prompt")
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            longest = max(len(requests[index][2]) for key in batch for index in sharing[key])
            for key, log_probs_KV in zip(batch, self._last_log_probs(batch, longest), strict=True):
                for index in sharing[key]:
                    continuation = requests[index][2]
                    scored_KV = log_probs_KV[len(log_probs_KV) - len(continuation) :]
                    wanted = torch.tensor(continuation, device=scored_KV.device)
                    greedy = bool((scored_KV.argmax(dim=-1) == wanted).all())
                    answers[index] = (float(scored_KV.gather(1, wanted[:, None]).sum()), greedy)
            self.progress(sum(len(sharing[key]) for key in batch))
        return answers

    def _last_log_probs(self, rows: list[tuple[int, ...]], count: int) -> torch.Tensor:
        """Return log-probabilities (B, count, V), fp32, at the last `count` positions of each row."""
        ids, mask, positions = left_padded(rows, self.opened.pad_id, self.opened.device)
        with torch.inference_mode():
            out = self.opened.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=count)
            return torch.log_softmax(out.logits.float(), dim=-1)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Write an answer to each request, greedily; groups requests that share their generation settings."""
        self.requests += len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
                raise CellFailed(f"task {request.task_name} asks for sampling or beams ({settings}); only greedy decoding is scored")
            until = settings.get("until") or []
            stop = (until,) if isinstance(until, str) else tuple(until)
            groups.setdefault((int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), stop), []).append(index)
        answers = [""] * len(requests)
        for (new_tokens, stop), members in groups.items():
            prompts = [self.tok_encode(requests[index].args[0]) for index in members]
            self._fits(max(map(len, prompts)) + new_tokens, "prompt and answer")
            written = generate(
                self.opened, prompts, max_new_tokens=new_tokens, stop=stop, batch_size=self.batch_size, progress=self.progress
            )
            for index, one in zip(members, written, strict=True):
                answers[index] = one.text
                self.generations[str(requests[index].task_name), int(requests[index].doc_id or 0)] = one
        return answers
