"""Answers come from the cache: a second run computes what is missing, and adds up all seconds."""

import pytest

from harness.scoring.answer_cache import AnswerCache
from harness.scoring.backend import Generation, Likelihood, LikelihoodRequest
from harness.scoring.cached_backend import CachedBackend


class Counting:
    """A backend that answers by a formula, records requests, and can stop as if it were killed."""

    def __init__(self, dies_after=1_000):
        self.left, self.asked, self.known = dies_after, [], None

    def _one_more(self, ids):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.append(ids)

    def score(self, rows, *, known, finished, say):
        self.known, answers = dict(known), dict(known)
        for index in sorted(set(range(len(rows))) - set(known), reverse=True):
            self._one_more(tuple(rows[index].ids))
            answers[index] = Likelihood(-float(sum(rows[index].ids)), rows[index].count == 1)
            finished(index, answers[index])
        return [answers[index] for index in range(len(rows))]

    def generate(self, prompts, *, max_new_tokens, stop, finished, say):
        answers = {}
        for index in reversed(range(len(prompts))):
            self._one_more(tuple(prompts[index]))
            answers[index] = Generation(f"{sum(prompts[index])}{stop}", max_new_tokens, "eos")
            finished(index, answers[index])
        return [answers[index] for index in range(len(prompts))]


ROWS = [LikelihoodRequest([index, 2, 3], 1 + index % 2) for index in range(6)]
PROMPTS = [[index, 5] for index in range(6)]
ASKS = {
    "score": lambda backend: backend.score(ROWS, say=print),
    "generate": lambda backend: backend.generate(
        PROMPTS, max_new_tokens=4, stop=("Q:",), say=print
    ),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("answered", [0, 1, 4, 5])
def test_a_killed_run_goes_on_with_what_is_missing(ask, answered, tmp_path):
    expected = ASKS[ask](CachedBackend(Counting(), AnswerCache()))
    with pytest.raises(KeyboardInterrupt):
        ASKS[ask](
            CachedBackend(Counting(dies_after=answered), AnswerCache(tmp_path / "answers.jsonl"))
        )
    backend, counts = Counting(), []
    resumed = CachedBackend(
        backend, AnswerCache(tmp_path / "answers.jsonl"), progress=counts.append
    )
    assert ASKS[ask](resumed) == expected
    assert len(backend.asked) == 6 - answered and sum(counts) == 6 and counts[0] == answered
    assert ask != "score" or len(backend.known) == answered


def test_seconds_are_those_of_computing_whenever_that_was(tmp_path, monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("harness.scoring.cached_backend.time.perf_counter", lambda: next(clock))
    first = CachedBackend(Counting(), AnswerCache(tmp_path / "answers.jsonl"))
    first.score(ROWS[:1], say=print)
    second = CachedBackend(Counting(), AnswerCache(tmp_path / "answers.jsonl"))
    second.score(ROWS[:2], say=print)
    assert (first.seconds, second.seconds) == (3.0, 4.0)


@pytest.mark.parametrize(
    "ask_otherwise",
    [
        lambda backend: backend.generate(PROMPTS, max_new_tokens=5, stop=("Q:",), say=print),
        lambda backend: backend.generate(PROMPTS, max_new_tokens=4, stop=("A:",), say=print),
        lambda backend: backend.generate(
            [[*prompt, 1] for prompt in PROMPTS], max_new_tokens=4, stop=("Q:",), say=print
        ),
    ],
)
def test_an_answer_to_another_question_is_not_served(ask_otherwise, tmp_path):
    cache = AnswerCache(tmp_path / "answers.jsonl")
    ASKS["generate"](CachedBackend(Counting(), cache))
    backend = Counting()
    ask_otherwise(CachedBackend(backend, cache))
    assert len(backend.asked) == 6
