"""Paired comparisons of figures that all items make together (F1, Matthews correlation, BLEU, chrF, TER): a bootstrap over items.

No item has a value of its own, but each adds something: a pair of labels, the n-grams of a sentence. A figure is a function of the sum
of what its items add, so items are drawn again by drawing sums again; student and teacher are given the same draws, which is what pairs
them (Koehn, 2004). Several runs (seeds) share the draws too, and the spread between the runs' own figures is added. Every draw is
smoothed by what no item showed: without that, two models that differ on no item would have an interval of no width. The functions mirror
`harness/means.py`: the same names, the same arguments, a `Corpus` where that has the values of a run. No torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from harness.intervals import Interval
from harness.means import RESOLVES

Parts = Sequence[tuple[int, float]]
_Numbers = npt.NDArray[np.float64]
_Key = tuple[tuple[int, float], ...]
_SEED = 20261126
RESAMPLES = 4_000
_BLOCK = 250  # draws that are summed at once: bounds memory
_TAIL = 0.025


@dataclass(frozen=True)
class Corpus:
    """One run on one task: how the figure follows, and what each item adds to it, in item order, numbers by spaces."""

    form: str
    statistics: tuple[str, ...]


Runs = Sequence[Corpus]


# What an item adds, as columns whose sums make the figure


def _of_pairs(pairs: _Numbers) -> _Numbers:
    """Return what (gold, prediction) pairs of 0 and 1 add to F1: a true positive, and positives of either side."""
    return np.stack([pairs[:, 0] * pairs[:, 1], pairs.sum(axis=1)], axis=1)


def _of_labels(pairs: _Numbers) -> _Numbers:
    """Return what (gold, prediction) pairs of class numbers add to a confusion table: items, hits, golds and predictions by class."""
    golds, predictions = pairs.astype(int).T
    classes = np.eye(int(pairs.max()) + 1)
    return np.concatenate([np.ones((len(pairs), 1)), (golds == predictions)[:, None], classes[golds], classes[predictions]], axis=1)


# The figure of a sum of columns; sums may have any leading axes


def _f1(sums: _Numbers) -> _Numbers:
    return _share(2 * sums[..., 0], sums[..., 1])


def _matthews(sums: _Numbers) -> _Numbers:
    """Return Matthews' correlation of any number of classes (Gorodkin's R_K, 2004); 0 where one side names one class alone."""
    items, hits = sums[..., 0], sums[..., 1]
    golds, predictions = np.split(sums[..., 2:], 2, axis=-1)
    covariance = items * hits - (golds * predictions).sum(axis=-1)
    spread = (items**2 - (golds**2).sum(axis=-1)) * (items**2 - (predictions**2).sum(axis=-1))
    return _share(covariance, np.sqrt(np.maximum(spread, 0)))


def _bleu(sums: _Numbers) -> _Numbers:
    """Return sacrebleu's BLEU of (length, reference's length, n-grams that match, n-grams), orders 1 to 4, its exponential smoothing."""
    written, wanted = sums[..., 0], sums[..., 1]
    matches, grams = sums[..., 2:6], sums[..., 6:10]
    halvings = np.cumsum((matches == 0) & (grams > 0), axis=-1)
    shares = np.where(matches > 0, _share(matches, grams), _share(np.ones_like(grams), 2.0**halvings * grams))
    known = (grams > 0).all(axis=-1) & (matches > 0).any(axis=-1)
    logs = np.log(np.where(shares > 0, shares, 1.0)).mean(axis=-1)
    short = np.where(written > 0, np.exp(np.minimum(0.0, 1 - _share(wanted, written))), 0.0)
    return np.where(known, 100 * short * np.exp(logs), 0.0)


def _chrf(sums: _Numbers) -> _Numbers:
    """Return sacrebleu's chrF (beta 2) of (n-grams, reference's n-grams, matches) for each order."""
    written, wanted, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    both = (written > 0) & (wanted > 0)
    orders = both.sum(axis=-1)
    precision = _share((_share(matches, written) * both).sum(axis=-1), orders)
    recall = _share((_share(matches, wanted) * both).sum(axis=-1), orders)
    return 100 * _share(5 * precision * recall, 4 * precision + recall)


def _ter(sums: _Numbers) -> _Numbers:
    edits, wanted = sums[..., 0], sums[..., 1]
    return 100 * np.where(wanted > 0, _share(edits, wanted), (edits > 0).astype(float))


def _mean(sums: _Numbers) -> _Numbers:
    return _share(sums[..., 0], sums[..., 1])


def _perplexity(sums: _Numbers) -> _Numbers:
    return np.exp(-_mean(sums))


def _share(part: _Numbers, whole: _Numbers) -> _Numbers:
    """Return part / whole, 0 where there is no whole."""
    found = np.zeros(np.broadcast_shapes(part.shape, whole.shape))
    np.divide(part, whole, out=found, where=whole != 0)
    return found


_FIGURES: Mapping[str, Callable[[_Numbers], _Numbers]] = {
    "f1": _f1, "mcc": _matthews, "bleu": _bleu, "chrf": _chrf, "ter": _ter, "mean": _mean, "perplexity": _perplexity,
}  # fmt: skip
_COLUMNS: Mapping[str, Callable[[_Numbers], _Numbers]] = {"f1": _of_pairs, "mcc": _of_labels}
FORMS = frozenset(_FIGURES)
SIGNED = frozenset({"mcc"})  # may be below zero, so that a ratio of two says nothing
SHARES = frozenset({"f1"})  # lie in [0, 1]


def _columns(run: Corpus) -> _Numbers:
    """Return what the items of a run add: a row an item."""
    read = np.array([line.split() for line in run.statistics], dtype=np.float64)
    return _COLUMNS[run.form](read) if run.form in _COLUMNS else read


def _strata(count: int, parts: Parts) -> list[tuple[slice, float]]:
    """Return where each task's items stand, and how much its figure counts."""
    found, start = [], 0
    for items, weight in parts or ((count, 1 / count),):
        found.append((slice(start, start + items), items * weight))
        start += items
    if start != count:
        raise ValueError(f"{start} items in parts, {count} in the run")
    return found


def weighted(run: Corpus, parts: Parts = ()) -> float:
    """Return the figure of a run; with `parts` (items, weight of each) the weighted mean of theirs."""
    columns, figure = _columns(run), _FIGURES[run.form]
    return math.fsum(weight * float(figure(columns[here].sum(axis=0))) for here, weight in _strata(len(columns), parts))


# Draws


@lru_cache(maxsize=32)
def _draws(items: int, at: int) -> npt.NDArray[np.uint8]:
    """Return how often each item stands in each of the draws of part `at`: the same ones for every run."""
    random = np.random.Generator(np.random.PCG64((_SEED, items, at)))
    found = np.empty((RESAMPLES, items), dtype=np.uint8)
    for start in range(0, RESAMPLES, _BLOCK):
        rows = min(_BLOCK, RESAMPLES - start)
        taken = random.integers(0, items, size=(rows, items)) + items * np.arange(rows)[:, None]
        counts = np.bincount(taken.ravel(), minlength=rows * items).reshape(rows, items)
        found[start : start + rows] = np.minimum(counts, 255)  # 255 times one item in a draw: never
    return found


@dataclass(frozen=True)
class _Drawn:
    """A run's figure, the same in every draw, and how far apart two items' influences on it lie."""

    figure: float
    draws: _Numbers
    reach: float


@lru_cache(maxsize=1024)
def _drawn(run: Corpus, parts: _Key) -> _Drawn:
    """Draw a run's items again, within their parts.

    An item's influence is the jackknife's: items x (figure - figure without it). Where no item has any (a perfect model), one that was
    not seen could still cost the figure itself.
    """
    columns, figure = _columns(run), _FIGURES[run.form]
    value, draws, low, high = 0.0, np.zeros(RESAMPLES), 0.0, 0.0
    for at, (here, weight) in enumerate(_strata(len(columns), parts)):
        own = columns[here]
        total, counts = own.sum(axis=0), _draws(len(own), at)
        sums = np.concatenate([counts[first : first + _BLOCK].astype(np.float64) @ own for first in range(0, RESAMPLES, _BLOCK)])
        whole = float(figure(total))
        value += weight * whole
        draws += weight * figure(sums)
        if len(own) > 1:
            influence = len(own) * (whole - figure(total - own))
            low, high = min(low, float(influence.min())), max(high, float(influence.max()))
    return _Drawn(value, draws, max(high - low, abs(value)))


@dataclass(frozen=True)
class _Compared:
    """Figures and draws of student and reference, means over their runs, and what scatters beside the items drawn."""

    student: float
    reference: float
    of_student: _Numbers
    of_reference: _Numbers
    unseen: float  # variance of each side
    between: tuple[float, float, float]  # variances of both sides' runs, and their covariance
    runs: int

    def noise(self, share: float) -> tuple[float, float]:
        """Return the scale and the degrees of freedom of what is added to student's figure - share x reference's."""
        items, (ours, theirs, together) = self.unseen * (1 + share**2), self.between
        runs = max(0.0, ours + share**2 * theirs - 2 * share * together)
        freedom = (self.runs - 1) * ((items + runs) / runs) ** 2 if runs > 0 and self.runs > 1 else math.inf
        return math.sqrt(items + runs), freedom

    def below(self, share: float, limit: float = 0.0) -> float:
        """Return how much of the smoothed bootstrap has student's figure - share x reference's at or below a limit."""
        from scipy.special import ndtr, stdtr

        gaps = limit - (self.of_student - share * self.of_reference)
        scale, freedom = self.noise(share)
        if scale <= 0:
            return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
        return float((ndtr(gaps / scale) if math.isinf(freedom) else stdtr(freedom, gaps / scale)).mean())

    def variance(self, share: float) -> float:
        """Return the variance of student's figure - share x reference's."""
        return float((self.of_student - share * self.of_reference).var()) + self.noise(share)[0] ** 2


def _compared(student: Runs, reference: Runs, parts: Parts, *, paired: bool = False) -> _Compared:
    """Draw two sides together."""
    if len({len(run.statistics) for run in (*student, *reference)}) > 1:
        raise ValueError(f"{len(student[0].statistics)} and {len(reference[0].statistics)} items are not the same")
    ours, theirs = ([_drawn(run, tuple(map(tuple, parts))) for run in side] for side in (student, reference))
    count = len(student[0].statistics)
    share = sum(weight**2 / (here.stop - here.start) for here, weight in _strata(count, parts))  # sum of squared weights
    unseen = 0.5 * max(one.reach for one in (*ours, *theirs)) ** 2 * share**2
    values = [np.array([one.figure for one in side]) for side in (ours, theirs)]
    draws = [np.mean([one.draws for one in side], axis=0) for side in (ours, theirs)]
    return _Compared(
        float(values[0].mean()),
        float(values[1].mean()),
        draws[0],
        draws[1],
        unseen,
        _between(*values, paired=paired),
        max(len(ours), len(theirs)),
    )


def _between(ours: _Numbers, theirs: _Numbers, *, paired: bool) -> tuple[float, float, float]:
    """Return the variances of the mean figures over runs, and their covariance where runs of one position are one training."""
    first, second = (float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.0 for side in (ours, theirs))
    together = float(np.cov(ours, theirs)[0, 1]) / len(ours) if paired and len(ours) == len(theirs) > 1 else 0.0
    return first, second, together


def _end(rising: Callable[[float], float], level: float, start: float, step: float) -> float:
    """Return where a rising function passes a level; infinite where it never does."""
    low, high = start - step, start + step
    while rising(low) > level:
        step *= 2
        low -= step
        if step > 1e9:
            return -math.inf
    while rising(high) < level:
        step *= 2
        high += step
        if step > 1e9:
            return math.inf
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2


# The comparisons, as in `harness/means.py`


def standard_error(run: Corpus, parts: Parts = ()) -> float | None:
    """Return the bootstrap's standard error of a figure, None of fewer than two items."""
    return float(_drawn(run, tuple(map(tuple, parts))).draws.std()) if len(run.statistics) > 1 else None


def difference(student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False) -> Interval:
    """Return student's figure - reference's with its paired 95 % interval."""
    if len(student[0].statistics) < 2:
        return Interval(weighted(student[0], parts) - weighted(reference[0], parts), reason="one item gives no interval")
    found = _compared(student, reference, parts, paired=paired)
    gap, step = found.student - found.reference, math.sqrt(found.variance(1.0))
    if step <= 0:
        return Interval(gap, gap, gap)
    low, high = (_end(lambda limit: found.below(1.0, limit), level, gap, step) for level in (_TAIL, 1 - _TAIL))
    return Interval(gap, low, high)


def ratio(student: Runs, reference: Runs, parts: Parts = (), *, chance: float = 0.0, paired: bool = False) -> Interval:
    """Return student's figure / reference's with its paired 95 % interval: where the test of `keeps` turns.

    For figures that have a zero; no such figure has a `chance`. Undefined where the reference scores nothing; without an interval where
    its own is too uncertain.
    """
    if len(student[0].statistics) < 2:
        base = weighted(reference[0], parts)
        return Interval(weighted(student[0], parts) / base if base > 0 else None, reason="one item gives no interval")
    if chance:
        raise ValueError("a figure of all items together has no chance level")
    found = _compared(student, reference, parts, paired=paired)
    if found.reference <= 0:
        return Interval(None, reason="the teacher scores nothing")
    value = found.student / found.reference
    error = math.sqrt(float(found.of_reference.var()) + found.unseen + found.between[1])
    if found.reference < RESOLVES * error or not (found.of_reference > 0).all():
        return Interval(value, reason="the teacher's own score is too uncertain for an interval")
    step = math.sqrt(found.variance(value)) / found.reference
    low, high = (_end(lambda share: found.below(share), level, value, step) for level in (_TAIL, 1 - _TAIL))
    return Interval(value, max(0.0, low), high)


def keeps(
    student: Runs, reference: Runs, margin: float, parts: Parts = (), *, points: bool = False, lower: bool = False, chance: float = 0.0,
    paired: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Test a margin by the paired bootstrap: (p of "it does not keep it", p of "it does"), one-sided.

    Kept is `margin` of the reference's figure, or (`points`) all but `margin`; of a figure that is better when lower, at most
    1 / `margin` of it, or `margin` more.
    """
    if chance:
        raise ValueError("a figure of all items together has no chance level")
    found = _compared(student, reference, parts, paired=paired)
    share = 1.0 if points else 1 / margin if lower else margin
    limit = 0.0 if not points else margin if lower else -margin
    under = found.below(share, limit)
    return (1 - under, under) if lower else (under, 1 - under)


def error_of_difference(student: Runs, reference: Runs, parts: Parts = ()) -> float:
    """Return the standard error of student's figure - reference's."""
    return math.sqrt(_compared(student, reference, parts).variance(1.0))


def unequal(student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False) -> float:
    """Return the two-sided p of "both figures are equal"; 1 where all that items add is."""
    if list(student) == list(reference) or len(student[0].statistics) < 2:
        return 1.0
    under = _compared(student, reference, parts, paired=paired).below(1.0)
    return min(1.0, 2 * min(under, 1 - under))


def worse(row: Runs, best: Runs, parts: Parts = (), *, lower: bool = False, paired: bool = False) -> float:
    """Return the one-sided p of "the row is no worse than the best one" on the same items; 1 where they are equal."""
    if list(row) == list(best) or len(row[0].statistics) < 2:
        return 1.0
    return keeps(row, best, 0.0, parts, points=True, lower=lower, paired=paired)[1]
