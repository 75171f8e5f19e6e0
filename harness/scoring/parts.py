"""What lm-eval hands to a metric that all items make together, and what of it a record keeps: as
little as makes the figure again.

A pair of labels stays a pair; sentences become sacrebleu's sufficient statistics of each. What a
task's own code aggregates cannot be computed without that code, so nothing is kept of it and its
figure stands without a comparison. No torch at import.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from harness.statistics.pooled import Corpus, corpus_figure

MOST = 2_000_000  # characters of one task's statistics in a record


@dataclass(frozen=True)
class Kept:
    """What a record keeps of a task's parts, or why it keeps nothing."""

    run: Corpus | None
    why: str = ""


def plain(value: object) -> Any:
    """Return a part as JSON holds it (lists, finite numbers, texts); None where it is anything
    else.
    """
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, torch's tensors
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        found = [plain(one) for one in value]
        return None if any(one is None for one in found) else found
    return (
        value
        if isinstance(value, str)
        or (isinstance(value, (bool, int, float)) and math.isfinite(value))
        else None
    )


def kept(parts: Sequence[Any], aggregation: object, metric: str, value: float) -> Kept:
    """Return what the items add to lm-eval's figure, checked by making the figure again; else why
    no record can make it.
    """
    form = next((form for function, form in _forms() if function is aggregation), None)
    name = getattr(aggregation, "__name__", "")
    told = (
        f"{metric} is one figure of all items "
        f"together{f' ({name})' if name not in ('', metric) else ''}"
    )
    if form is None:
        upstream = str(getattr(aggregation, "__module__", "")).startswith("lm_eval.api.")
        return Kept(
            None,
            told
            + (
                ", and no item has one"
                if upstream
                else ", made by the task's own code, which records do not hold"
            ),
        )
    if any(part is None for part in parts):
        return Kept(
            None,
            f"{told}, and {sum(part is None for part in parts)} of {len(parts)} items have no part "
            "in it",
        )
    shape, of_parts = form
    try:
        lines = tuple(" ".join(map(_number, one)) for one in of_parts(parts))
        run = Corpus(shape, lines)
        again = corpus_figure(run)
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as problem:
        return Kept(
            None, f"{told}, and its parts are not what it is made of ({type(problem).__name__})"
        )
    if not math.isclose(again, value, rel_tol=1e-9, abs_tol=1e-9):
        return Kept(
            None,
            f"{told}, and its parts make another figure ({again:.6g}) than lm-eval ({value:.6g})",
        )
    size = sum(map(len, lines))
    if size > MOST:
        return Kept(
            None,
            f"{told}, and what its items add takes {size:,} characters, more than a record holds "
            f"({MOST:,}); try --limit",
        )
    return Kept(run)


def _number(value: float) -> str:
    """Write a number so that reading it gives the same one."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


_Rows = list[Sequence[float]]
_Form = tuple[str, Callable[[Sequence[Any]], _Rows]]


@lru_cache(maxsize=1)
def _forms() -> Sequence[tuple[object, _Form]]:
    """Return lm-eval's aggregations that can be made again: the form of the figure, and how parts
    become numbers.

    By the function itself: one of a task's own may have any name.
    """
    from lm_eval.api import metrics

    known: dict[str, _Form] = {
        "f1_score": ("f1", _positives),
        "matthews_corrcoef": ("mcc", _classes),
        "brier_score": ("mean", _squares),
        "perplexity": ("perplexity", _likelihoods),
        "bleu": ("bleu", lambda parts: _sentences(parts, "BLEU")),
        "chrf": ("chrf", lambda parts: _sentences(parts, "CHRF")),
        "chrfpp": ("chrf", lambda parts: _sentences(parts, "CHRF", word_order=2)),
        "ter": ("ter", lambda parts: _sentences(parts, "TER")),
    }
    return [
        (getattr(metrics, name), form) for name, form in known.items() if hasattr(metrics, name)
    ]


def _positives(parts: Sequence[Any]) -> _Rows:
    """Return (gold, prediction) as 1 for the positive class, which scikit-learn takes 1 to be, else
    0.
    """
    return [[int(gold == 1), int(prediction == 1)] for gold, prediction in parts]


def _classes(parts: Sequence[Any]) -> _Rows:
    """Return (gold, prediction) as numbers of classes in the order in which they come: a
    correlation does not ask for their names.
    """
    numbers: dict[object, int] = {}
    return [
        [numbers.setdefault(label, len(numbers)) for label in (gold, prediction)]
        for gold, prediction in parts
    ]


def _squares(parts: Sequence[Any]) -> _Rows:
    """Return the squared error of the probabilities of (gold, probabilities), and 1."""
    return [
        [math.fsum((share - (at == gold)) ** 2 for at, share in enumerate(shares)), 1.0]
        for gold, shares in parts
    ]


def _likelihoods(parts: Sequence[Any]) -> _Rows:
    """Return a log-likelihood, and 1."""
    return [[float(part), 1.0] for part in parts]


def _sentences(parts: Sequence[Any], name: str, **settings: int) -> _Rows:
    """Return sacrebleu's statistics of each (references, prediction), made by lm-eval's
    defaults.
    """
    from lm_eval.api.metrics import _sacreformat
    from sacrebleu import metrics

    references, predictions = _sacreformat([part[0] for part in parts], [part[1] for part in parts])
    metric = getattr(metrics, name)(**settings)
    metric._force = True  # lm-eval's own call has warned of text that looks tokenised
    return list(metric._extract_corpus_statistics(predictions, references))
