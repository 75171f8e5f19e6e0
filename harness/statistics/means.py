"""Paired comparisons of means over items and runs: one function for tables and gate. Pure
functions, no torch.

A run is one number an item: 1 and 0 where an item is hit or miss. Items are a sample that both
sides share; runs are trainings, which each side draws for itself. The model is that of crossed
random effects, number = mean + run + item + rest: the variance of a mean gap is

- over items: that of the items' mean gaps, less what the rest puts into it (it is counted with the
  runs), n - 1 degrees of freedom;
- over runs: that of each side's own means / runs, runs - 1 degrees of freedom. Two rows of equally
  many runs, three at least, share Satterthwaite's (Welch's) degrees of freedom; with two runs, or
  unequal numbers, each keeps its own, for Welch's are too many there.

How the sources join stands in `statistics.intervals`. Items may stand in parts of different weight
(a group of tasks that count alike): within a part they are a sample, the parts are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.statistics.figures import Parts, covariance, item_weights, weighted_mean
from harness.statistics.figures import standard_error as standard_error
from harness.statistics.intervals import (
    ErrorSource,
    Interval,
    RetentionTest,
    interval_around,
    interval_around_ratio,
    one_sided_p,
    t_quantile,
    two_sided_p,
)

Runs = Sequence[Sequence[float]]
run_figure = weighted_mean  # the name that `corpus` has for the figure of a run too
Documents = Sequence[tuple[float, float]]  # of each: (log-likelihood, its words or bytes)
# a teacher's distance from chance, in standard errors, below which a ratio to it means nothing
MIN_ERRORS_ABOVE_CHANCE = 4.0
_MIN_WELCH_RUNS = 3  # runs
_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Spread:
    """Variances of two means and their covariance, and the degrees of freedom of what estimated
    them.
    """

    student: float
    reference: float
    together: float
    freedom: float

    def of(self, share: float) -> float:
        """Return the variance of student's mean - share x reference's."""
        return max(0.0, self.student + share**2 * self.reference - 2 * share * self.together)

    def source(self, share: float) -> ErrorSource:
        """Return the same as a source of error."""
        return ErrorSource(self.of(share), self.freedom)


@dataclass(frozen=True)
class _Moments:
    """Means of student and reference, and the spreads behind them: over items first, then over each
    side's runs.
    """

    student: float
    reference: float
    items: _Spread
    runs: tuple[_Spread, ...]

    def spreads(self, share: float) -> list[_Spread]:
        """Return the independent spreads of student's mean - share x reference's; two sets of
        equally many runs are one, by Welch.
        """
        runs = [one for one in self.runs if one.of(share) > 0]
        if len(runs) == 2 and runs[0].freedom == runs[1].freedom >= _MIN_WELCH_RUNS - 1:
            freedom = sum(one.of(share) for one in runs) ** 2 / sum(
                one.of(share) ** 2 / one.freedom for one in runs
            )
            runs = [_Spread(runs[0].student, runs[1].reference, 0.0, freedom)]
        return [self.items, *runs]

    def sources(self, share: float) -> list[ErrorSource]:
        """Return the independent errors of student's mean - share x reference's."""
        return [one.source(share) for one in self.spreads(share)]


def _moments(student: Runs, reference: Runs, parts: Parts, *, paired: bool) -> _Moments:
    """Sum up two sides; `paired` runs of one position are one training, of which one side was made
    from the other.

    Where no item differs the sample has no spread, and the truth may have: four imagined items at
    the corners of the values' range, of half a weight each, widen the variances and move no mean
    (Agresti & Min's remedy, 2005, for variances alone).
    """
    ours, theirs = (np.asarray(side, dtype=np.float64) for side in (student, reference))
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} and {theirs.shape[1]} values are not the same items")
    weights = item_weights(ours.shape[1], parts)
    s, t = ours.mean(axis=0), theirs.mean(axis=0)
    low, high = min(0.0, float(min(ours.min(), theirs.min()))), float(max(ours.max(), theirs.max()))
    unseen = 0.5 * (high - low) ** 2 * float((weights**2).sum()) ** 2
    paired = paired and len(ours) == len(theirs) > 1
    rest = (
        _residual_covariance(ours, ours, weights),
        _residual_covariance(theirs, theirs, weights),
        _residual_covariance(ours, theirs, weights) if paired else 0.0,
    )
    items = _Spread(
        max(0.0, covariance(s, s, parts) - rest[0]) + unseen,
        max(0.0, covariance(t, t, parts) - rest[1]) + unseen,
        covariance(s, t, parts) - rest[2],
        max(1, len(s) - max(1, len(parts))),
    )
    ends = (ours * weights).sum(axis=1), (theirs * weights).sum(axis=1)
    return _Moments(
        float((s * weights).sum()),
        float((t * weights).sum()),
        items,
        _between(*ends, paired=paired),
    )


def _residual_covariance(left: _Numbers, right: _Numbers, weights: _Numbers) -> float:
    """Return what is neither the run nor the item, as it stands in the (co)variance of two means
    over the runs; 0 of one run.
    """
    if len(left) < 2 or len(left) != len(right):
        return 0.0

    def residual(side: _Numbers) -> _Numbers:
        centred: _Numbers = side - side.mean(axis=0)
        rest: _Numbers = centred - (centred * weights).sum(axis=1, keepdims=True)
        return rest

    return float((residual(left) * residual(right) * weights**2).sum()) / (
        (len(left) - 1) * len(left)
    )


def _between(ours: _Numbers, theirs: _Numbers, *, paired: bool) -> tuple[_Spread, ...]:
    """Return how the means of runs scatter: of each side apart, or of runs that are pairs."""

    def variance(side: _Numbers) -> float:
        return float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.0

    if paired:
        together = float(((ours - ours.mean()) * (theirs - theirs.mean())).sum()) / (
            (len(ours) - 1) * len(ours)
        )
        return (_Spread(variance(ours), variance(theirs), together, len(ours) - 1),)
    return _Spread(variance(ours), 0.0, 0.0, len(ours) - 1), _Spread(
        0.0, variance(theirs), 0.0, len(theirs) - 1
    )


def _both_alike(student: Runs, reference: Runs) -> bool:
    return np.array_equal(np.asarray(student), np.asarray(reference))


def difference_interval(
    student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False
) -> Interval:
    """Return student's mean - reference's with its paired 95 % interval (Student's t)."""
    if len(student[0]) < 2:
        return Interval(
            run_figure(student[0], parts) - run_figure(reference[0], parts),
            reason="one item gives no interval",
        )
    moments = _moments(student, reference, parts, paired=paired)
    return interval_around(moments.student - moments.reference, moments.sources(1.0))


def ratio_interval(
    student: Runs, reference: Runs, parts: Parts = (), *, chance: float = 0.0, paired: bool = False
) -> Interval:
    """Return student's mean / reference's, both above `chance`, with its paired 95 % interval
    (Fieller, 1954).

    Undefined where the reference is not above chance, or so little that its ratio has no end. The
    degrees of freedom are those at the ratio that was seen.
    """
    if len(student[0]) < 2:
        base = run_figure(reference[0], parts) - chance
        return Interval(
            (run_figure(student[0], parts) - chance) / base if base > 0 else None,
            reason="one item gives no interval",
        )
    moments = _moments(student, reference, parts, paired=paired)
    s, t = moments.student - chance, moments.reference - chance
    why = "the teacher is at chance" if chance else "the teacher scores nothing"
    own = sum(one.reference for one in (moments.items, *moments.runs))
    if t <= 0 or (chance and t < MIN_ERRORS_ABOVE_CHANCE * math.sqrt(own)):
        return Interval(None, reason=why)
    squares = [(one, t_quantile(one.freedom) ** 2) for one in moments.spreads(s / t)]
    a = t * t - sum(square * one.reference for one, square in squares)
    b = s * t - sum(square * one.together for one, square in squares)
    c = s * s - sum(square * one.student for one, square in squares)
    if a <= 0:
        return Interval(s / t, reason="the teacher's own score is too uncertain for an interval")
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(s / t, (b - root) / a, (b + root) / a)


def retention_test(
    student: Runs,
    reference: Runs,
    margin: float,
    parts: Parts = (),
    *,
    points: bool = False,
    lower: bool = False,
    chance: float = 0.0,
    paired: bool = False,
) -> RetentionTest:
    """Test a margin: (p of "it does not keep it", p of "it does"), one-sided Student's t; as
    `stats.keeps` does for hits of one run.

    Kept is `margin` of what the reference's mean has above `chance`, or (`points`) all but
    `margin`; of a figure that is better when lower, at most 1 / `margin` of it, or `margin` more.
    """
    moments = _moments(student, reference, parts, paired=paired)
    share = 1.0 if points else 1 / margin if lower else margin
    gap = moments.student - share * moments.reference - (1 - share) * chance
    gap += 0.0 if not points else -margin if lower else margin
    p = one_sided_p(-gap if lower else gap, moments.sources(share))
    return RetentionTest(p, 1.0 - p)


def equality_test(
    student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False
) -> float:
    """Return the two-sided p of "both means are equal"; 1 where every number is."""
    if _both_alike(student, reference) or len(student[0]) < 2:
        return 1.0
    moments = _moments(student, reference, parts, paired=paired)
    return two_sided_p(moments.student - moments.reference, moments.sources(1.0))


def error_of_difference(student: Runs, reference: Runs, parts: Parts = ()) -> float:
    """Return the standard error of student's mean - reference's."""
    return math.sqrt(
        sum(one.variance for one in _moments(student, reference, parts, paired=False).sources(1.0))
    )


def inferiority_test(
    row: Runs, best: Runs, parts: Parts = (), *, lower: bool = False, paired: bool = False
) -> float:
    """Return the one-sided p of "the row is no worse than the best one" on the same items; 1 where
    they are equal.
    """
    if _both_alike(row, best) or len(row[0]) < 2:
        return 1.0
    return retention_test(row, best, 0.0, parts, points=True, lower=lower, paired=paired)[1]


def perplexity_ratio_interval(
    student: Sequence[Documents], reference: Sequence[Documents], *, bits: bool = False
) -> Interval:
    """Return a perplexity over a reference's on the same documents, run by run; with `bits` the
    ratio of nats a unit.

    The logarithm of the ratio has two kinds of error, as means have: over documents, which are
    clusters, and over each side's runs.
    """
    sides = [
        np.asarray([[total for total, _ in run] for run in side], dtype=np.float64)
        for side in (student, reference)
    ]
    if not all(side.size for side in sides) or sides[0].shape[1] != sides[1].shape[1]:
        return Interval(None, reason="scored on different items")
    if not all(np.isfinite(side).all() for side in sides):
        return Interval(None, reason="a document has no finite likelihood")
    units = np.asarray([size for _, size in student[0]], dtype=np.float64)
    ours, theirs = (side.mean(axis=0) for side in sides)
    if bits and not (ours.sum() < 0 and theirs.sum() < 0):
        return Interval(None, reason="a document has no finite likelihood")
    ratio = float(ours.sum() / theirs.sum()) if bits else float((theirs - ours).sum() / units.sum())
    figure = math.log(ratio) if bits else ratio
    if len(units) < 2:
        return Interval(math.exp(figure), reason="one document gives no interval")
    strayed, sizes = (
        (ours - ratio * theirs, -theirs) if bits else (theirs - ours - ratio * units, units)
    )
    documents = _cluster_error(
        strayed / abs(float(ours.sum()) if bits else float(units.sum())), sizes
    )
    runs = _between(*(_log_figures(side, units, bits=bits) for side in sides), paired=False)
    return interval_around_ratio(
        figure,
        _Moments(0.0, 0.0, _Spread(documents.variance, 0.0, 0.0, documents.freedom), runs).sources(
            1.0
        ),
    )


def _cluster_error(strayed: _Numbers, sizes: _Numbers) -> ErrorSource:
    """Return the error of a ratio of sums over clusters of some size, from what each adds to the
    estimate.

    Few clusters of unequal size: a large one pulls the estimate to itself, and there are fewer
    degrees of freedom than clusters. Residuals are corrected for their leverage, the degrees of
    freedom are Satterthwaite's for residuals that grow with the size (CR2 of Bell & McCaffrey,
    2002, "Bias reduction in standard errors for linear regression with multi-stage samples", Survey
    Methodology 28, 169-181).
    """
    leverage = np.minimum(sizes / sizes.sum(), 1 - 1e-9)
    scale = 1 / np.sqrt(1 - leverage)
    variance = float(((scale * strayed) ** 2).sum())
    # The quadratic form of the variance is diag(d) - u v' - v u' + s u u': its trace and the trace
    # of its square, without the matrix.
    d, u, v, s = (scale * sizes) ** 2, scale * leverage, scale * sizes**2, float((sizes**2).sum())
    uu, uv, vv = float((u * u).sum()), float((u * v).sum()), float((v * v).sum())
    trace = float(d.sum()) - 2 * uv + s * uu
    square = float((d * d).sum()) + 2 * float((d * (s * u * u - 2 * u * v)).sum())
    square += 2 * (uu * vv + uv * uv) + (s * uu) ** 2 - 4 * s * uu * uv
    return ErrorSource(variance, max(1.0, trace**2 / square))


def _log_figures(side: _Numbers, units: _Numbers, *, bits: bool) -> _Numbers:
    """Return the logarithm of every run's figure, up to a constant."""
    nats: _Numbers = -side.sum(axis=1) / units.sum()
    return np.log(nats) if bits else nats
