"""Figures that all items of a run make together (F1, Matthews correlation, BLEU, chrF, TER), and
their standard errors.

No item has a value of its own, but each adds something: a pair of labels, the n-grams of a
sentence. A figure is a function of the sum of what its items add. What compares two of them stands
in `harness/statistics/corpus.py`. No torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    """One run on one task: how the figure follows, and what each item adds to it, in item order,
    numbers by spaces.
    """

    form: str
    statistics: tuple[str, ...]


# What an item adds, as columns whose sums make the figure


def _f1_columns(pairs: _Numbers) -> _Numbers:
    """Return what (gold, prediction) pairs of 0 and 1 add to F1: a true positive, and positives of
    either side.
    """
    return np.stack([pairs[:, 0] * pairs[:, 1], pairs.sum(axis=1)], axis=1)


def _matthews_columns(pairs: _Numbers) -> _Numbers:
    """Return what (gold, prediction) pairs of class numbers add to a confusion table: items, hits,
    golds and predictions by class.
    """
    golds, predictions = pairs.astype(int).T
    classes = np.eye(int(pairs.max()) + 1)
    return np.concatenate(
        [
            np.ones((len(pairs), 1)),
            (golds == predictions)[:, None],
            classes[golds],
            classes[predictions],
        ],
        axis=1,
    )


# The figure of a sum of columns; sums may have any leading axes


def _f1(sums: _Numbers) -> _Numbers:
    return _quotient(2 * sums[..., 0], sums[..., 1])


def _matthews(sums: _Numbers) -> _Numbers:
    """Return Matthews' correlation of any number of classes (Gorodkin's R_K, 2004); 0 where one
    side names one class alone.
    """
    items, hits = sums[..., 0], sums[..., 1]
    golds, predictions = np.split(sums[..., 2:], 2, axis=-1)
    covariance = items * hits - (golds * predictions).sum(axis=-1)
    spread = (items**2 - (golds**2).sum(axis=-1)) * (items**2 - (predictions**2).sum(axis=-1))
    return _quotient(covariance, np.sqrt(np.maximum(spread, 0)))


def _bleu(sums: _Numbers) -> _Numbers:
    """Return sacrebleu's BLEU of (length, reference's length, n-grams that match, n-grams), orders
    1 to 4, its exponential smoothing.
    """
    written, wanted = sums[..., 0], sums[..., 1]
    matches, grams = sums[..., 2:6], sums[..., 6:10]
    halvings = np.cumsum((matches == 0) & (grams > 0), axis=-1)
    shares = np.where(
        matches > 0,
        _quotient(matches, grams),
        _quotient(np.ones_like(grams), 2.0**halvings * grams),
    )
    known = (grams > 0).all(axis=-1) & (matches > 0).any(axis=-1)
    logs = np.log(np.where(shares > 0, shares, 1.0)).mean(axis=-1)
    short = np.where(written > 0, np.exp(np.minimum(0.0, 1 - _quotient(wanted, written))), 0.0)
    return np.where(known, 100 * short * np.exp(logs), 0.0)


def _chrf(sums: _Numbers) -> _Numbers:
    """Return sacrebleu's chrF (beta 2) of (n-grams, reference's n-grams, matches) for each
    order.
    """
    written, wanted, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    both = (written > 0) & (wanted > 0)
    orders = both.sum(axis=-1)
    precision = _quotient((_quotient(matches, written) * both).sum(axis=-1), orders)
    recall = _quotient((_quotient(matches, wanted) * both).sum(axis=-1), orders)
    return 100 * _quotient(5 * precision * recall, 4 * precision + recall)


def _ter(sums: _Numbers) -> _Numbers:
    edits, wanted = sums[..., 0], sums[..., 1]
    return 100 * np.where(wanted > 0, _quotient(edits, wanted), (edits > 0).astype(float))


def _mean(sums: _Numbers) -> _Numbers:
    return _quotient(sums[..., 0], sums[..., 1])


def _perplexity(sums: _Numbers) -> _Numbers:
    return np.exp(-_mean(sums))


def _quotient(part: _Numbers, whole: _Numbers) -> _Numbers:
    """Return part / whole, 0 where there is no whole."""
    found = np.zeros(np.broadcast_shapes(part.shape, whole.shape))
    np.divide(part, whole, out=found, where=whole != 0)
    return found


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
    """Return what the items of a run add: a row an item."""
    read = np.array([line.split() for line in run.statistics], dtype=np.float64)
    return _COLUMNS[run.form](read) if run.form in _COLUMNS else read


def strata(count: int, parts: Parts) -> list[tuple[slice, float]]:
    """Return where each task's items stand, and how much its figure counts."""
    found, start = [], 0
    for items, weight in parts or ((count, 1 / count),):
        found.append((slice(start, start + items), items * weight))
        start += items
    if start != count:
        raise ValueError(f"{start} items in parts, {count} in the run")
    return found


def corpus_figure(run: Corpus, parts: Parts = ()) -> float:
    """Return the figure of a run; with `parts` (items, weight of each) the weighted mean of
    theirs.
    """
    columns, figure = _columns(run), _FIGURES[run.form]
    return math.fsum(
        weight * float(figure(columns[here].sum(axis=0)))
        for here, weight in strata(len(columns), parts)
    )


# Draws


@lru_cache(maxsize=32)
def resample_counts(items: int, at: int) -> npt.NDArray[np.uint8]:
    """Return how often each item stands in each of the draws of part `at`: the same ones for every
    run.
    """
    random = np.random.Generator(np.random.PCG64((_SEED, items, at)))
    found = np.empty((RESAMPLES, items), dtype=np.uint8)
    for start in range(0, RESAMPLES, _BLOCK):
        rows = min(_BLOCK, RESAMPLES - start)
        taken = random.integers(0, items, size=(rows, items)) + items * np.arange(rows)[:, None]
        counts = np.bincount(taken.ravel(), minlength=rows * items).reshape(rows, items)
        found[start : start + rows] = np.minimum(counts, 255)  # 255 times one item in a draw: never
    return found


@dataclass(frozen=True)
class _Resampled:
    """A run's figure, the same in every draw, and how far apart two items' influences on it lie."""

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
    for at, (here, weight) in enumerate(strata(len(columns), parts)):
        own = columns[here]
        total, counts = own.sum(axis=0), resample_counts(len(own), at)
        sums = np.concatenate(
            [
                counts[first : first + _BLOCK].astype(np.float64) @ own
                for first in range(0, RESAMPLES, _BLOCK)
            ]
        )
        whole = float(figure(total))
        value += weight * whole
        draws += weight * figure(sums)
        if len(own) > 1:
            influence = len(own) * (whole - figure(total - own))
            low, high = min(low, float(influence.min())), max(high, float(influence.max()))
    return _Resampled(value, draws, max(high - low, abs(value)))


def standard_error(run: Corpus, parts: Parts = ()) -> float | None:
    """Return the bootstrap's standard error of a figure, None of fewer than two items."""
    return (
        float(resample(run, tuple(map(tuple, parts))).draws.std())
        if len(run.statistics) > 1
        else None
    )
