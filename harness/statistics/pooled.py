"""Figures that all items of a run make together, and their standard errors. No torch.

They are F1, Matthews correlation, BLEU, chrF and TER. No item has a value of its own, but each adds
something: a pair of labels, the n-grams of a sentence. A figure is a function of the sum of what
its items add. `harness/statistics/corpus.py` compares two of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Parts = Sequence[tuple[int, float]]
_Numbers = npt.NDArray[np.float64]
_Key = tuple[tuple[int, float], ...]
_SEED = 20261126
RESAMPLES = 4_000
_BLOCK = 250  # draws that are summed at once: bounds memory


@dataclass(frozen=True)
class Corpus:
    """One run on one task, by what its items add to the figure."""

    form: str  # how the figure follows from them, a key of `FORMS`
    statistics: tuple[str, ...]  # what each item adds, in item order: numbers and spaces


# What an item adds, as columns whose sums make the figure


def _f1_columns(pairs: _Numbers) -> _Numbers:
    """Return what (gold, prediction) pairs of 0 and 1 add to F1.

    The columns are true positives, and positives of gold and prediction together.
    """
    return np.stack([pairs[:, 0] * pairs[:, 1], pairs.sum(axis=1)], axis=1)


def _matthews_columns(pairs: _Numbers) -> _Numbers:
    """Return what (gold, prediction) pairs of class numbers add to a confusion table.

    The columns are items, hits, golds by class and predictions by class.
    """
    golds, predictions = pairs.astype(int).T
    classes = np.eye(int(pairs.max()) + 1)
    items, hits = np.ones((len(pairs), 1)), (golds == predictions)[:, None]
    return np.concatenate([items, hits, classes[golds], classes[predictions]], axis=1)


# The figure of a sum of columns; sums may have any leading axes


def _f1(sums: _Numbers) -> _Numbers:
    return _quotient(2 * sums[..., 0], sums[..., 1])


def _matthews(sums: _Numbers) -> _Numbers:
    """Return Matthews' correlation of any number of classes (Gorodkin's R_K, 2004).

    It is 0 where one side names one class alone.
    """
    items, hits = sums[..., 0], sums[..., 1]
    golds, predictions = np.split(sums[..., 2:], 2, axis=-1)
    covariance = items * hits - (golds * predictions).sum(axis=-1)
    spread = (items**2 - (golds**2).sum(axis=-1)) * (items**2 - (predictions**2).sum(axis=-1))
    return _quotient(covariance, np.sqrt(np.maximum(spread, 0)))


def _bleu(sums: _Numbers) -> _Numbers:
    """Return sacrebleu's BLEU with its exponential smoothing.

    The columns are length, reference's length, matching n-grams and n-grams, of orders 1 to 4.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, grams = sums[..., 2:6], sums[..., 6:10]
    halvings = np.cumsum((matches == 0) & (grams > 0), axis=-1)
    shares = np.where(
        matches > 0,
        _quotient(matches, grams),
        _quotient(np.ones_like(grams), 2.0**halvings * grams),
    )
    is_defined = (grams > 0).all(axis=-1) & (matches > 0).any(axis=-1)
    logs = np.log(np.where(shares > 0, shares, 1.0)).mean(axis=-1)
    excess = 1 - _quotient(reference_length, length)
    brevity_penalty = np.where(length > 0, np.exp(np.minimum(0.0, excess)), 0.0)
    return np.where(is_defined, 100 * brevity_penalty * np.exp(logs), 0.0)


def _chrf(sums: _Numbers) -> _Numbers:
    """Return sacrebleu's chrF (beta 2).

    The columns are n-grams, reference's n-grams and matches, once for each order.
    """
    grams, reference_grams, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    in_both = (grams > 0) & (reference_grams > 0)
    orders = in_both.sum(axis=-1)
    precision = _quotient((_quotient(matches, grams) * in_both).sum(axis=-1), orders)
    recall = _quotient((_quotient(matches, reference_grams) * in_both).sum(axis=-1), orders)
    return 100 * _quotient(5 * precision * recall, 4 * precision + recall)


def _ter(sums: _Numbers) -> _Numbers:
    edits, reference_words = sums[..., 0], sums[..., 1]
    rate = _quotient(edits, reference_words)
    return 100 * np.where(reference_words > 0, rate, (edits > 0).astype(float))


def _mean(sums: _Numbers) -> _Numbers:
    return _quotient(sums[..., 0], sums[..., 1])


def _perplexity(sums: _Numbers) -> _Numbers:
    return np.exp(-_mean(sums))


def _quotient(part: _Numbers, total: _Numbers) -> _Numbers:
    """Return part / total, and 0 where the total is 0."""
    quotient = np.zeros(np.broadcast_shapes(part.shape, total.shape))
    np.divide(part, total, out=quotient, where=total != 0)
    return quotient


_FIGURES: Mapping[str, Callable[[_Numbers], _Numbers]] = {
    "f1": _f1,
    "mcc": _matthews,
    "bleu": _bleu,
    "chrf": _chrf,
    "ter": _ter,
    "mean": _mean,
    "perplexity": _perplexity,
}
_COLUMNS: Mapping[str, Callable[[_Numbers], _Numbers]] = {
    "f1": _f1_columns,
    "mcc": _matthews_columns,
}
FORMS = frozenset(_FIGURES)
SIGNED_FORMS = frozenset({"mcc"})  # may be below zero, so that a ratio of two says nothing
SHARE_FORMS = frozenset({"f1"})  # lie in [0, 1]


def _columns(run: Corpus) -> _Numbers:
    """Return what the items of a run add: (items, columns)."""
    numbers = np.array([line.split() for line in run.statistics], dtype=np.float64)
    return _COLUMNS[run.form](numbers) if run.form in _COLUMNS else numbers


class Stratum(NamedTuple):
    """The items of one task among those of a run, and how much its figure counts."""

    items: slice
    weight: float


def strata(count: int, parts: Parts) -> list[Stratum]:
    """Return where each task's items stand, and how much its figure counts.

    Raises `ValueError` where the parts have more or fewer items than `count`.
    """
    result, start = [], 0
    for items, weight in parts or ((count, 1 / count),):
        result.append(Stratum(slice(start, start + items), items * weight))
        start += items
    if start != count:
        raise ValueError(f"{start} items in parts, {count} in the run")
    return result


def corpus_figure(run: Corpus, parts: Parts = ()) -> float:
    """Return the figure of a run; with `parts` (items, weight of each) the weighted mean of theirs.

    Raises `KeyError`, `ValueError` or `IndexError` for statistics that make no such figure.
    """
    columns, figure = _columns(run), _FIGURES[run.form]
    return math.fsum(
        weight * float(figure(columns[items].sum(axis=0)))
        for items, weight in strata(len(columns), parts)
    )


# Draws


@lru_cache(maxsize=32)
def resample_counts(items: int, part: int) -> npt.NDArray[np.uint8]:
    """Return how often each item stands in each draw of the part of that number.

    The shape is (`RESAMPLES`, items). The draws are the same for every run.
    """
    random = np.random.Generator(np.random.PCG64((_SEED, items, part)))
    counts = np.empty((RESAMPLES, items), dtype=np.uint8)
    for start in range(0, RESAMPLES, _BLOCK):
        rows = min(_BLOCK, RESAMPLES - start)
        cells = random.integers(0, items, size=(rows, items)) + items * np.arange(rows)[:, None]
        block = np.bincount(cells.ravel(), minlength=rows * items).reshape(rows, items)
        counts[start : start + rows] = np.minimum(block, 255)  # one item 255 times in a draw: never
    return counts


@dataclass(frozen=True)
class _Resampled:
    """A run's figure, its figure in every draw, and how far two items' influences lie apart."""

    figure: float
    draws: _Numbers
    reach: float


@lru_cache(maxsize=1024)
def resample(run: Corpus, parts: _Key) -> _Resampled:
    """Draw a run's items again, within their parts.

    An item's influence is the jackknife's: items x (figure - figure without it). Where no item has
    any (a perfect model), one that was not seen could still cost the figure itself.
    """
    columns, figure = _columns(run), _FIGURES[run.form]
    value, draws, low, high = 0.0, np.zeros(RESAMPLES), 0.0, 0.0
    for part, (items, weight) in enumerate(strata(len(columns), parts)):
        rows = columns[items]
        total, counts = rows.sum(axis=0), resample_counts(len(rows), part)
        blocks = range(0, RESAMPLES, _BLOCK)
        sums = np.concatenate(
            [counts[start : start + _BLOCK].astype(np.float64) @ rows for start in blocks]
        )
        part_figure = float(figure(total))
        value += weight * part_figure
        draws += weight * figure(sums)
        if len(rows) > 1:
            influence = len(rows) * (part_figure - figure(total - rows))
            low, high = min(low, float(influence.min())), max(high, float(influence.max()))
    return _Resampled(value, draws, max(high - low, abs(value)))


def standard_error(run: Corpus, parts: Parts = ()) -> float | None:
    """Return the bootstrap's standard error of a figure, None of fewer than two items."""
    if len(run.statistics) < 2:
        return None
    return float(resample(run, tuple(map(tuple, parts))).draws.std())
