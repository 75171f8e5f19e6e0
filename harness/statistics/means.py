"""Paired comparisons of means over items and runs, for tables and gate alike. Pure, no torch.

A run is one number an item: 1 and 0 where an item is hit or miss. Items are a sample that both
sides share; runs are trainings, which each side draws for itself. The model is that of crossed
random effects, number = mean + run + item + rest: the variance of a mean gap is

- over items: that of the items' mean gaps, less what the rest puts into it (it is counted with the
  runs), n - 1 degrees of freedom;
- over runs: that of each side's own means / runs, runs - 1 degrees of freedom. Two rows of equally
  many runs, three at least, share Satterthwaite's (Welch's) degrees of freedom; with two runs, or
  unequal numbers, each keeps its own, for Welch's are too many there.

How the sources join stands in `statistics.intervals`. Items may stand in parts of different weight
(a group of tasks that count alike): within a part they are a sample, the parts themselves are
fixed. Functions of two sides take the student first, then its reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
# a teacher that is fewer standard errors above chance has no ratio that means anything
MIN_ERRORS_ABOVE_CHANCE = 4.0
_MIN_WELCH_RUNS = 3
_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Spread:
    """Variances of two means and their covariance, with the degrees of freedom of all three."""

    student: float
    reference: float
    covariance: float
    freedom: float

    def variance(self, share: float) -> float:
        """Return the variance of student's mean - share x reference's."""
        return max(0.0, self.student + share**2 * self.reference - 2 * share * self.covariance)

    def source(self, share: float) -> ErrorSource:
        """Return that variance as a source of error."""
        return ErrorSource(self.variance(share), self.freedom)


@dataclass(frozen=True)
class _Moments:
    """Means of student and reference, and the spreads behind them.

    `items` is the spread over items, `runs` that over each side's runs.
    """

    student: float
    reference: float
    items: _Spread
    runs: tuple[_Spread, ...]

    def spreads(self, share: float) -> list[_Spread]:
        """Return the independent spreads of student's mean - share x reference's.

        Two sets of equally many runs are one spread, by Welch.
        """
        runs = [spread for spread in self.runs if spread.variance(share) > 0]
        if len(runs) == 2 and runs[0].freedom == runs[1].freedom >= _MIN_WELCH_RUNS - 1:
            freedom = sum(spread.variance(share) for spread in runs) ** 2 / sum(
                spread.variance(share) ** 2 / spread.freedom for spread in runs
            )
            runs = [_Spread(runs[0].student, runs[1].reference, 0.0, freedom)]
        return [self.items, *runs]

    def sources(self, share: float) -> list[ErrorSource]:
        """Return the independent errors of student's mean - share x reference's."""
        return [spread.source(share) for spread in self.spreads(share)]


def _moments(student: Runs, reference: Runs, parts: Parts, *, paired: bool) -> _Moments:
    """Return the means and spreads of two sides.

    `paired`: runs of one position are one training, and one side was made from the other.

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
    shared_rest = _residual_covariance(ours, theirs, weights) if paired else 0.0
    items = _Spread(
        max(0.0, covariance(s, s, parts) - _residual_covariance(ours, ours, weights)) + unseen,
        max(0.0, covariance(t, t, parts) - _residual_covariance(theirs, theirs, weights)) + unseen,
        covariance(s, t, parts) - shared_rest,
        max(1, len(s) - max(1, len(parts))),
    )
    run_means = (ours * weights).sum(axis=1), (theirs * weights).sum(axis=1)
    return _Moments(
        float((s * weights).sum()),
        float((t * weights).sum()),
        items,
        _spreads_of_runs(*run_means, paired=paired),
    )


def _residual_covariance(first: _Numbers, second: _Numbers, weights: _Numbers) -> float:
    """Return what neither run nor item explains of the covariance of two means over the runs.

    It is 0 of one run, where it cannot be told from the items.
    """
    runs = len(first)
    if runs < 2 or runs != len(second):
        return 0.0

    def residual(side: _Numbers) -> _Numbers:
        centred: _Numbers = side - side.mean(axis=0)
        rest: _Numbers = centred - (centred * weights).sum(axis=1, keepdims=True)
        return rest

    products = residual(first) * residual(second) * weights**2
    return float(products.sum()) / ((runs - 1) * runs)


def _spreads_of_runs(ours: _Numbers, theirs: _Numbers, *, paired: bool) -> tuple[_Spread, ...]:
    """Return how the means of runs scatter: for each side, or once for runs that are pairs."""

    def variance(side: _Numbers) -> float:
        return float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.0

    if paired:
        products = float(((ours - ours.mean()) * (theirs - theirs.mean())).sum())
        together = products / ((len(ours) - 1) * len(ours))
        return (_Spread(variance(ours), variance(theirs), together, len(ours) - 1),)
    return (
        _Spread(variance(ours), 0.0, 0.0, len(ours) - 1),
        _Spread(0.0, variance(theirs), 0.0, len(theirs) - 1),
    )


def _are_equal(student: Runs, reference: Runs) -> bool:
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
    """Return student's mean / reference's, both above `chance`, with its paired 95 % interval.

    The interval is Fieller's (1954), with the degrees of freedom at the observed ratio. Undefined
    where the reference is not above chance, or by so little that its ratio has no end.
    """
    if len(student[0]) < 2:
        base = run_figure(reference[0], parts) - chance
        return Interval(
            (run_figure(student[0], parts) - chance) / base if base > 0 else None,
            reason="one item gives no interval",
        )
    moments = _moments(student, reference, parts, paired=paired)
    s, t = moments.student - chance, moments.reference - chance
    variance = sum(spread.reference for spread in (moments.items, *moments.runs))
    if t <= 0 or (chance and t < MIN_ERRORS_ABOVE_CHANCE * math.sqrt(variance)):
        reason = "the teacher is at chance" if chance else "the teacher scores nothing"
        return Interval(None, reason=reason)
    squares = [(spread, t_quantile(spread.freedom) ** 2) for spread in moments.spreads(s / t)]
    # the ends are the roots of a R^2 - 2 b R + c
    a = t * t - sum(square * spread.reference for spread, square in squares)
    b = s * t - sum(square * spread.covariance for spread, square in squares)
    c = s * s - sum(square * spread.student for spread, square in squares)
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
    """Test whether a student keeps a margin, one-sided, by Student's t.

    It keeps `margin` of what the reference's mean has above `chance`, or (`points`) all but
    `margin`. Of a figure that is better when lower (`lower`) it has at most 1 / `margin` of the
    reference's, or `margin` more. `stats.retention_test` does the same for hits of one run.
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
    if _are_equal(student, reference) or len(student[0]) < 2:
        return 1.0
    moments = _moments(student, reference, parts, paired=paired)
    return two_sided_p(moments.student - moments.reference, moments.sources(1.0))


def error_of_difference(student: Runs, reference: Runs, parts: Parts = ()) -> float:
    """Return the standard error of student's mean - reference's."""
    sources = _moments(student, reference, parts, paired=False).sources(1.0)
    return math.sqrt(sum(source.variance for source in sources))


def inferiority_test(
    student: Runs,
    reference: Runs,
    parts: Parts = (),
    *,
    lower: bool = False,
    paired: bool = False,
) -> float:
    """Return the one-sided p of "the student is no worse than the reference" on the same items.

    It is 1 where they are equal; `lower` says that lower figures are better.
    """
    if _are_equal(student, reference) or len(student[0]) < 2:
        return 1.0
    test = retention_test(student, reference, 0.0, parts, points=True, lower=lower, paired=paired)
    return test.p_inferior


def perplexity_ratio_interval(
    student: Sequence[Documents], reference: Sequence[Documents], *, bits: bool = False
) -> Interval:
    """Return a perplexity over a reference's on the same documents, run by run.

    With `bits` it is the ratio of nats a unit, as bits per byte have it. The logarithm of the
    ratio has two kinds of error, as means have: over documents, which are clusters, and over each
    side's runs.
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
    log_ratio, error = (_bits_ratio if bits else _perplexity_ratio)(ours, theirs, units)
    if error is None:
        return Interval(math.exp(log_ratio), reason="one document gives no interval")
    runs = _spreads_of_runs(*(_log_figures(side, units, bits=bits) for side in sides), paired=False)
    documents = _Spread(error.variance, 0.0, 0.0, error.freedom)
    return interval_around_ratio(log_ratio, _Moments(0.0, 0.0, documents, runs).sources(1.0))


class _LogRatio(NamedTuple):
    """The logarithm of a ratio of two figures, and its error over documents (None of one)."""

    value: float
    error: ErrorSource | None


def _perplexity_ratio(ours: _Numbers, theirs: _Numbers, units: _Numbers) -> _LogRatio:
    """Compare two perplexities by the log-likelihoods of documents and their words or bytes."""
    log_ratio = float((theirs - ours).sum() / units.sum())
    if len(units) < 2:
        return _LogRatio(log_ratio, None)
    residuals = theirs - ours - log_ratio * units
    return _LogRatio(log_ratio, _cluster_error(residuals / abs(float(units.sum())), units))


def _bits_ratio(ours: _Numbers, theirs: _Numbers, units: _Numbers) -> _LogRatio:
    """Compare two numbers of bits per byte by the log-likelihoods of documents."""
    ratio = float(ours.sum() / theirs.sum())
    if len(units) < 2:
        return _LogRatio(math.log(ratio), None)
    residuals = ours - ratio * theirs
    error = _cluster_error(residuals / abs(float(ours.sum())), -theirs)
    return _LogRatio(math.log(ratio), error)


def _cluster_error(influences: _Numbers, sizes: _Numbers) -> ErrorSource:
    """Return the error of a ratio of sums over clusters, from what each adds to the estimate.

    Few clusters of unequal size: a large one pulls the estimate to itself, and there are fewer
    degrees of freedom than clusters. Residuals are corrected for their leverage, the degrees of
    freedom are Satterthwaite's for residuals that grow with the size (CR2 of Bell & McCaffrey,
    2002, "Bias reduction in standard errors for linear regression with multi-stage samples", Survey
    Methodology 28, 169-181).
    """
    leverage = np.minimum(sizes / sizes.sum(), 1 - 1e-9)
    scale = 1 / np.sqrt(1 - leverage)
    variance = float(((scale * influences) ** 2).sum())
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
