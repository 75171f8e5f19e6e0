"""What the items of a task add to a figure that belongs to all of them together.

A record keeps as little as makes the figure again. A pair of labels stays a pair; sentences become
sacrebleu's sufficient statistics, one line per sentence. What a task's own code aggregates cannot
be computed without that code: nothing is kept of it, and its figure has no comparison. No torch at
import.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from harness.statistics.pooled import Corpus, corpus_figure

MAX_CHARACTERS = 2_000_000  # of one task's statistics in a record


@dataclass(frozen=True)
class RecordedStatistics:
    """What a record keeps of a task's parts, or the reason why it keeps nothing."""

    corpus: Corpus | None
    reason: str = ""


def json_value(value: object) -> Any:
    """Return a value as JSON holds it: lists, finite numbers, texts. None for anything else."""
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, torch's tensors
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        elements = [json_value(element) for element in value]
        return None if any(element is None for element in elements) else elements
    return (
        value
        if isinstance(value, str)
        or (isinstance(value, (bool, int, float)) and math.isfinite(value))
        else None
    )


def recorded_statistics(
    parts: Sequence[Any], aggregation: object, metric: str, value: float
) -> RecordedStatistics:
    """Return what the items add to lm-eval's figure, or the reason why a record cannot hold it.

    `aggregation` is the function that made the figure `value` of the `parts`. The figure is made
    again from the statistics, as a check.
    """
    statistics = next(
        (form for function, form in _supported_aggregations() if function is aggregation), None
    )
    name = getattr(aggregation, "__name__", "")
    by_function = f" ({name})" if name not in ("", metric) else ""
    described = f"{metric} is one figure of all items together{by_function}"

    def nothing(reason: str) -> RecordedStatistics:
        return RecordedStatistics(None, described + reason)

    if statistics is None:
        is_upstream = str(getattr(aggregation, "__module__", "")).startswith("lm_eval.api.")
        return nothing(
            ", and no item has one"
            if is_upstream
            else ", made by the task's own code, which records do not hold"
        )
    missing = sum(part is None for part in parts)
    if missing:
        return nothing(f", and {missing} of {len(parts)} items have no part in it")
    try:
        lines = tuple(" ".join(map(_shortest_text, row)) for row in statistics.rows_of(parts))
        corpus = Corpus(statistics.form, lines)
        figure = corpus_figure(corpus)
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as problem:
        return nothing(f", and its parts have an unexpected form ({type(problem).__name__})")
    if not math.isclose(figure, value, rel_tol=1e-9, abs_tol=1e-9):
        return nothing(
            f", and its parts make another figure ({figure:.6g}) than lm-eval ({value:.6g})"
        )
    size = sum(map(len, lines))
    if size > MAX_CHARACTERS:
        return nothing(
            f", and what its items add takes {size:,} characters, more than a record holds "
            f"({MAX_CHARACTERS:,}); try --limit"
        )
    return RecordedStatistics(corpus)


def _shortest_text(value: float) -> str:
    """Write a number so that reading it gives the same number."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


_Rows = list[Sequence[float]]


class _Statistics(NamedTuple):
    """A form of figure that `harness.statistics.pooled` knows, and how parts become its numbers."""

    form: str
    rows_of: Callable[[Sequence[Any]], _Rows]


@lru_cache(maxsize=1)
def _supported_aggregations() -> Sequence[tuple[object, _Statistics]]:
    """Return those of lm-eval's aggregation functions whose figures can be computed again.

    They are compared as functions, because a task's own function may have any name.
    """
    from lm_eval.api import metrics

    by_name = {
        "f1_score": _Statistics("f1", _positives),
        "matthews_corrcoef": _Statistics("mcc", _classes),
        "brier_score": _Statistics("mean", _squared_errors),
        "perplexity": _Statistics("perplexity", _likelihoods),
        "bleu": _Statistics("bleu", lambda parts: _sentences(parts, "BLEU")),
        "chrf": _Statistics("chrf", lambda parts: _sentences(parts, "CHRF")),
        "chrfpp": _Statistics("chrf", lambda parts: _sentences(parts, "CHRF", word_order=2)),
        "ter": _Statistics("ter", lambda parts: _sentences(parts, "TER")),
    }
    return [
        (getattr(metrics, name), statistics)
        for name, statistics in by_name.items()
        if hasattr(metrics, name)
    ]


def _positives(parts: Sequence[Any]) -> _Rows:
    """Return (gold, prediction) as 1 for the positive class, which is 1 in scikit-learn, else 0."""
    return [[int(gold == 1), int(prediction == 1)] for gold, prediction in parts]


def _classes(parts: Sequence[Any]) -> _Rows:
    """Return (gold, prediction) as numbers of classes, in the order in which the classes appear.

    A correlation does not depend on their names.
    """
    numbers: dict[object, int] = {}
    return [
        [numbers.setdefault(label, len(numbers)) for label in (gold, prediction)]
        for gold, prediction in parts
    ]


def _squared_errors(parts: Sequence[Any]) -> _Rows:
    """Return the squared error of the probabilities in (gold, probabilities), and 1."""
    return [
        [
            math.fsum(
                (probability - (label == gold)) ** 2
                for label, probability in enumerate(probabilities)
            ),
            1.0,
        ]
        for gold, probabilities in parts
    ]


def _likelihoods(parts: Sequence[Any]) -> _Rows:
    """Return a log-likelihood, and 1."""
    return [[float(part), 1.0] for part in parts]


def _sentences(parts: Sequence[Any], name: str, **settings: int) -> _Rows:
    """Return sacrebleu's statistics of each (references, prediction), with lm-eval's defaults."""
    from lm_eval.api.metrics import _sacreformat
    from sacrebleu import metrics

    references, predictions = _sacreformat([part[0] for part in parts], [part[1] for part in parts])
    metric = getattr(metrics, name)(**settings)
    metric._force = True  # lm-eval's own call has already warned of text that looks tokenised
    return list(metric._extract_corpus_statistics(predictions, references))
