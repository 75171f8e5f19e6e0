"""A backend that computes no answer twice: it reads answers from a cache and adds new ones."""

import time
from collections.abc import Callable, Sequence

from harness.scoring.answer_cache import AnswerCache, request_key
from harness.scoring.backend import (
    Backend,
    Generation,
    Likelihood,
    LikelihoodRequest,
    ignore_report,
)


class CachedBackend:
    """Answers from the cache where it can, else from the backend.

    `seconds` counts the time that all answers took to compute, cached ones included. `progress` is
    called with the number of new answers; those from the cache are reported at once.
    """

    def __init__(
        self,
        backend: Backend,
        cache: AnswerCache,
        *,
        progress: Callable[[int], None] = ignore_report,
    ) -> None:
        self.backend, self.cache, self.progress = backend, cache, progress
        self.seconds = 0.0
        self._last_answer_time = 0.0

    def score(
        self, requests: Sequence[LikelihoodRequest], *, say: Callable[[str], None]
    ) -> list[Likelihood]:
        """Return the likelihood of every request, in the given order."""
        keys = [request_key(request.ids, request.count) for request in requests]
        known = {
            index: Likelihood(float(str(value)), bool(is_greedy))
            for index, (value, is_greedy) in self._cached_answers(keys).items()
        }

        def finished(index: int, likelihood: Likelihood) -> None:
            self._store(keys[index], list(likelihood))

        return self.backend.score(requests, known=known, finished=finished, say=say)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        say: Callable[[str], None],
    ) -> list[Generation]:
        """Continue each prompt greedily; return the answers in the given order."""
        keys = [request_key(ids, max_new_tokens, stop) for ids in prompts]
        answers = {
            index: Generation(str(text), int(str(tokens)), reason)  # type: ignore[arg-type]
            for index, (text, tokens, reason) in self._cached_answers(keys).items()
        }
        missing = [index for index in range(len(prompts)) if index not in answers]

        def finished(row: int, answer: Generation) -> None:
            self._store(keys[missing[row]], [answer.text, answer.tokens, answer.stop])

        missing_prompts = [prompts[index] for index in missing]
        new_answers = self.backend.generate(
            missing_prompts, max_new_tokens=max_new_tokens, stop=stop, finished=finished, say=say
        )
        answers |= dict(zip(missing, new_answers, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _cached_answers(self, keys: Sequence[str]) -> dict[int, list[object]]:
        """Return the cached answers by index in `keys`, and start the clock for the others."""
        entries = {
            index: entry
            for index, key in enumerate(keys)
            if (entry := self.cache.get(key)) is not None
        }
        self.seconds += sum(seconds for _, seconds in entries.values())
        self.progress(len(entries))
        self._last_answer_time = time.perf_counter()
        return {index: answer for index, (answer, _) in entries.items()}

    def _store(self, key: str, answer: list[object]) -> None:
        """Put an answer into the cache with the seconds since the answer before it."""
        current_time = time.perf_counter()
        seconds = current_time - self._last_answer_time
        self._last_answer_time = current_time
        self.seconds += seconds
        self.cache.put(key, answer, seconds)
        self.progress(1)
