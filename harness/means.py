"""Paired comparisons of means: outcomes that are numbers, or items that do not count alike. Pure functions, no torch.

A run is one number an item. Of several runs (seeds) the items' means are compared, and the spread between the runs' own means is added,
as the two-level bootstrap of hits does. Items may stand in parts of different weight (a group of tasks that count alike): within a part
they are a sample, the parts are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.stats import RESOLVES, Z95, Interval

Parts = Sequence[tuple[int, float]]
Runs = Sequence[Sequence[float]]
_Numbers = npt.NDArray[np.float64]


def weighted(values: Sequence[float], parts: Parts = ()) -> float:
    """Return the mean of values; with `parts` (items, weight of each) the weighted one."""
    if not parts:
        return math.fsum(values) / len(values)
    weights = _weights(len(values), parts)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True))


def standard_error(values: Sequence[float], parts: Parts = ()) -> float | None:
    """Return the standard error of that mean, None of fewer than two values."""
    if len(values) < 2:
        return None
    found = np.asarray(values, dtype=np.float64)
    return math.sqrt(_covariance(found, found, parts))


def _weights(count: int, parts: Parts) -> _Numbers:
    """Return each item's weight; they sum to 1."""
    if not parts:
        return np.full(count, 1 / count)
    return np.repeat([weight for _, weight in parts], [items for items, _ in parts])


def _covariance(left: _Numbers, right: _Numbers, parts: Parts) -> float:
    """Return the covariance of two weighted means over the same items, parts as strata; a part of one item strays from the mean of all."""
    weights = _weights(len(left), parts)
    total, start = 0.0, 0
    for items, _ in parts or ((len(left), 0.0),):
        part = slice(start, start + items)
        start += items
        here = (left[part], right[part], weights[part])
        middles = [side.mean() for side in here[:2]] if items > 1 else [left.mean(), right.mean()]
        scale = items / (items - 1) if items > 1 else 1.0
        total += scale * float(((here[0] - middles[0]) * (here[1] - middles[1]) * here[2] ** 2).sum())
    return total


@dataclass(frozen=True)
class _Spread:
    """Variances of two means and their covariance."""

    student: float
    reference: float
    together: float

    def of(self, share: float) -> float:
        """Return the variance of student's mean - share x reference's."""
        return max(0.0, self.student + share**2 * self.reference - 2 * share * self.together)


@dataclass(frozen=True)
class _Moments:
    """Means of student and reference, and how they scatter: over items, and over runs."""

    student: float
    reference: float
    items: _Spread
    runs: _Spread
    of_items: int  # degrees of freedom
    of_runs: int

    @property
    def spread(self) -> _Spread:
        """Both together."""
        a, b = self.items, self.runs
        return _Spread(a.student + b.student, a.reference + b.reference, a.together + b.together)

    def freedom(self, share: float) -> float:
        """Return Satterthwaite's degrees of freedom of student's mean - share x reference's."""
        items, runs = self.items.of(share), self.runs.of(share)
        if runs <= 0 or self.of_runs < 1:
            return float(self.of_items)
        return (items + runs) ** 2 / (items**2 / self.of_items + runs**2 / self.of_runs)


def _moments(student: Runs, reference: Runs, parts: Parts) -> _Moments:
    """Sum up two sides: scatter over items, half an item's range for what was not seen, scatter over runs.

    Where no item differs the sample has no spread, and the truth may have: four imagined items at the corners of the values' range, of
    half a weight each, widen the variances and move no mean (Agresti & Min's remedy, 2005, for variances alone).
    """
    ours, theirs = (np.asarray(side, dtype=np.float64) for side in (student, reference))
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} and {theirs.shape[1]} values are not the same items")
    s, t = ours.mean(axis=0), theirs.mean(axis=0)
    weights = _weights(len(s), parts)
    low, high = min(0.0, float(min(ours.min(), theirs.min()))), float(max(ours.max(), theirs.max()))
    unseen = 0.5 * (high - low) ** 2 * float((weights**2).sum()) ** 2
    items = _Spread(_covariance(s, s, parts) + unseen, _covariance(t, t, parts) + unseen, _covariance(s, t, parts))
    free = max(1, len(s) - max(1, len(parts)))
    runs = _between(ours @ weights, theirs @ weights)
    return _Moments(float(s @ weights), float(t @ weights), items, runs, free, max(len(ours), len(theirs)) - 1)


def _between(ours: _Numbers, theirs: _Numbers) -> _Spread:
    """Return the variances of the means over runs, and their covariance where runs of one position are one seed."""

    def variance(side: _Numbers) -> float:
        return float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.0

    paired = len(ours) == len(theirs) > 1
    return _Spread(variance(ours), variance(theirs), float(np.cov(ours, theirs)[0, 1]) / len(ours) if paired else 0.0)


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _both_alike(student: Runs, reference: Runs) -> bool:
    return list(map(tuple, student)) == list(map(tuple, reference))


def difference(student: Runs, reference: Runs, parts: Parts = ()) -> Interval:
    """Return student's mean - reference's with its paired 95 % interval (Student's t)."""
    if len(student[0]) < 2:
        return Interval(weighted(student[0], parts) - weighted(reference[0], parts), reason="one item gives no interval")
    found = _moments(student, reference, parts)
    half = _quantile(found.freedom(1.0)) * math.sqrt(found.spread.of(1.0))
    gap = found.student - found.reference
    return Interval(gap, gap - half, gap + half)


def ratio(student: Runs, reference: Runs, parts: Parts = (), *, chance: float = 0.0) -> Interval:
    """Return student's mean / reference's, both above `chance`, with its paired 95 % interval (Fieller, 1954).

    Undefined where the reference is not above chance, or so little that its ratio has no end.
    """
    if len(student[0]) < 2:
        base = weighted(reference[0], parts) - chance
        return Interval((weighted(student[0], parts) - chance) / base if base > 0 else None, reason="one item gives no interval")
    found = _moments(student, reference, parts)
    s, t, spread = found.student - chance, found.reference - chance, found.spread
    why = "the teacher is at chance" if chance else "the teacher scores nothing"
    if t <= 0 or (chance and t < RESOLVES * math.sqrt(spread.reference)):
        return Interval(None, reason=why)
    z = _quantile(found.freedom(s / t))
    a, b, c = t * t - z * z * spread.reference, s * t - z * z * spread.together, s * s - z * z * spread.student
    if a <= 0:
        return Interval(s / t, reason="the teacher's own score is too uncertain for an interval")
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(s / t, (b - root) / a, (b + root) / a)


def keeps(
    student: Runs, reference: Runs, margin: float, parts: Parts = (), *, points: bool = False, lower: bool = False, chance: float = 0.0
) -> tuple[float, float]:
    """Test a margin: (p of "it does not keep it", p of "it does"), one-sided Student's t; as `stats.keeps` does for hits.

    Kept is `margin` of what the reference's mean has above `chance`, or (`points`) all but `margin`; of a figure that is better when
    lower, at most 1 / `margin` of it, or `margin` more.
    """
    from scipy.special import stdtr

    found = _moments(student, reference, parts)
    share = 1.0 if points else 1 / margin if lower else margin
    gap = found.student - share * found.reference - (1 - share) * chance + (0.0 if not points else -margin if lower else margin)
    variance, freedom = found.spread.of(share), found.freedom(share)
    if variance <= 0:
        return (0.5, 0.5) if gap == 0 else (0.0, 1.0) if (gap > 0) != lower else (1.0, 0.0)
    t = (-gap if lower else gap) / math.sqrt(variance)
    return float(stdtr(freedom, -t)), float(stdtr(freedom, t))


def error_of_difference(student: Runs, reference: Runs, parts: Parts = ()) -> float:
    """Return the standard error of student's mean - reference's."""
    return math.sqrt(_moments(student, reference, parts).spread.of(1.0))


def worse(row: Runs, best: Runs, parts: Parts = (), *, lower: bool = False) -> float:
    """Return the one-sided p of "the row is no worse than the best one" on the same items; 1 where they are equal."""
    if _both_alike(row, best) or len(row[0]) < 2:
        return 1.0
    return keeps(row, best, 0.0, parts, points=True, lower=lower)[1]


def ratio_of_sums(student: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]) -> Interval:
    """Return a figure per unit (nats per byte) over the reference's on the same documents, each given as (sum, units).

    exp of the log ratio's interval, documents as clusters (linearised).
    """
    if len(student) != len(reference) or not student:
        return Interval(None, reason="scored on different items")
    ours, theirs = (np.asarray([total for total, _ in side], dtype=np.float64) for side in (student, reference))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()) or not theirs.sum() or not ours.sum() / theirs.sum() > 0:
        return Interval(None, reason="a document has no finite likelihood")
    value, count = float(ours.sum() / theirs.sum()), len(ours)
    if count < 2:
        return Interval(value)
    left = ours - value * theirs
    error = math.sqrt(float((left**2).sum()) * count / (count - 1)) / abs(float(ours.sum()))
    return Interval(value, value * math.exp(-Z95 * error), value * math.exp(Z95 * error))
