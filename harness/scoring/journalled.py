"""A backend that asks nothing twice: answers come from a journal where it holds them, and go there
as they are computed.
"""

import time
from collections.abc import Callable, Sequence

from harness.scoring.answer_cache import Journal, asked
from harness.scoring.backend import Answer, Backend, Generation, Scored, unheard


class Journalled:
    """Answers from the journal, else by the backend; counts the seconds that answers took, whenever
    they were computed.

    `progress` is told how many answers came, those from the journal at once.
    """

    def __init__(
        self, backend: Backend, journal: Journal, *, progress: Callable[[int], None] = unheard
    ) -> None:
        self.backend, self.journal, self.progress = backend, journal, progress
        self.seconds = 0.0  # of computing, those of answers from the journal as they were then
        self._since = 0.0

    def score(self, rows: Sequence[Scored], *, say: Callable[[str], None]) -> list[Answer]:
        """Return what every row is worth, in the given order."""
        keys = [asked(row.ids, row.count) for row in rows]
        known = {
            index: Answer(float(str(value)), bool(greedy))
            for index, (value, greedy) in self._held(keys).items()
        }

        def finished(row: int, answer: Answer) -> None:
            self._keep(keys[row], list(answer))

        return self.backend.score(rows, known=known, finished=finished, say=say)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        say: Callable[[str], None],
    ) -> list[Generation]:
        """Return what follows each prompt greedily, in the given order."""
        keys = [asked(ids, max_new_tokens, stop) for ids in prompts]
        answers = {
            index: Generation(str(text), int(str(tokens)), reason)  # type: ignore[arg-type]
            for index, (text, tokens, reason) in self._held(keys).items()
        }
        missing = [index for index in range(len(prompts)) if index not in answers]

        def finished(row: int, answer: Generation) -> None:
            self._keep(keys[missing[row]], [answer.text, answer.tokens, answer.stop])

        wanted = [prompts[index] for index in missing]
        fresh = self.backend.generate(
            wanted, max_new_tokens=max_new_tokens, stop=stop, finished=finished, say=say
        )
        answers |= dict(zip(missing, fresh, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _held(self, keys: Sequence[str]) -> dict[int, list[object]]:
        """Return what the journal holds, by place; the clock of what is left starts."""
        held = {
            index: entry
            for index, key in enumerate(keys)
            if (entry := self.journal.get(key)) is not None
        }
        self.seconds += sum(seconds for _, seconds in held.values())
        self.progress(len(held))
        self._since = time.perf_counter()
        return {index: answer for index, (answer, _) in held.items()}

    def _keep(self, key: str, answer: list[object]) -> None:
        """Put an answer into the journal with the seconds since the one before it."""
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self.seconds += passed
        self.journal.put(key, answer, passed)
        self.progress(1)
