"""What a log says of every item of a task, whoever wrote it. No torch.

`lm_eval_logs` reads lm-eval's `samples_*.jsonl`, `own_logs` our records and the items beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.records.record import TaskScore
from harness.statistics.figures import BITS_PER_BYTE, standard_error, weighted_mean

# lm-eval's metrics whose items are documents with a log-likelihood and a length
PERPLEXITIES = ("word_perplexity", "byte_perplexity", BITS_PER_BYTE)


class ItemIdentity(NamedTuple):
    """Which item of a task it is, by lm-eval's own hashes."""

    number: int  # lm-eval's doc_id
    document: str
    target: str
    prompt: str


@dataclass(frozen=True)
class LoggedTask:
    """The items of one task and how a model answered them, in item order."""

    task: str
    where: str  # the file, for messages
    items: tuple[ItemIdentity, ...]  # empty where a record was kept without its items
    scores: Mapping[str, TaskScore]  # by figure, the task's own or the first one first
    # whether the task has more items than these; None: the log does not say
    limited: bool | None = None


@dataclass(frozen=True)
class LoggedModel:
    """One model: its tasks, once for each seed that it was trained with."""

    name: str
    runs: Mapping[int | None, Mapping[str, LoggedTask]]

    @property
    def tasks(self) -> list[str]:
        """The tasks that every run has."""
        first, *others = self.runs.values()
        return [task for task in first if all(task in run for run in others)]


class FigureName(NamedTuple):
    """How a figure is called: its extractor in our records, its metric and filter in lm-eval's."""

    extractor: str
    metric: str


def score_of_numbers(
    task: str, name: FigureName, numbers: Sequence[float], *, digest: str, lower: bool = False
) -> TaskScore:
    """Return the score of items that carry a number each: hits and misses, or values."""
    hits = all(number in (0.0, 1.0) for number in numbers)
    marks = "".join("1" if number else "0" for number in numbers) if hits else ""
    share = all(0.0 <= number <= 1.0 for number in numbers)
    return _score(
        task,
        name,
        kind="generate",
        n=len(numbers),
        value=weighted_mean(numbers),
        stderr=standard_error(numbers),
        outcomes={name.extractor: marks} if hits else {},
        values={} if hits else {name.extractor: tuple(numbers)},
        higher_is_better=not lower,
        unit="share" if share and not lower else "number",
        answers_digest=digest,
    )


def score_of_documents(
    task: str, metric: str, totals: Sequence[tuple[float, float]], value: float, *, digest: str
) -> TaskScore:
    """Return the score of documents, each with its log-likelihood in nats and its length."""
    return _score(
        task,
        FigureName(metric, metric),
        kind="perplexity",
        n=len(totals),
        value=value,
        totals=tuple(totals),
        unit="number",
        answers_digest=digest,
    )


def score_without_items(task: str, name: FigureName, n: int, reason: str) -> TaskScore:
    """Return the score of a figure that a log does not hold item by item; `reason` says why."""
    return _score(task, name, kind="generate", n=n, value=0.0, unpaired=reason, answers_digest="")


def _score(task: str, name: FigureName, **fields: object) -> TaskScore:
    values: dict[str, object] = {
        "task": task,
        "version": "",
        "primary": name.extractor,
        "metric": name.metric,
        "chance": 0.0,
        "stderr": None,
        "outcomes": {},
        "items_digest": "",
        "invalid_share": 0.0,
        "seconds": 0.0,
    }
    return TaskScore.model_validate({**values, **fields})
