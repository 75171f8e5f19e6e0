"""Paired comparisons of figures that all items make together (F1, Matthews correlation, BLEU, chrF,
TER): a bootstrap over items.

No item has a value of its own, but each adds something: a pair of labels, the n-grams of a
sentence. A figure is a function of the sum of what its items add, so items are drawn again by
drawing sums again; student and teacher are given the same draws, which is what pairs them (Koehn,
2004). Several runs (seeds) share the draws too, and the spread between the runs' own figures is
added. Every draw is smoothed by what no item showed: without that, two models that differ on no
item would have an interval of no width. The functions mirror `harness/statistics/means.py`: the
same names, the same arguments, a `Corpus` where that has the values of a run. No torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.statistics.intervals import Interval, RetentionTest
from harness.statistics.means import MIN_ERRORS_ABOVE_CHANCE
from harness.statistics.pooled import FORMS as FORMS
from harness.statistics.pooled import RESAMPLES as RESAMPLES
from harness.statistics.pooled import SHARE_FORMS as SHARE_FORMS
from harness.statistics.pooled import SIGNED_FORMS as SIGNED_FORMS
from harness.statistics.pooled import Corpus as Corpus
from harness.statistics.pooled import Parts, corpus_figure, resample, strata
from harness.statistics.pooled import resample_counts as resample_counts
from harness.statistics.pooled import standard_error as standard_error

_Numbers = npt.NDArray[np.float64]
_TAIL = 0.025
Runs = Sequence[Corpus]
run_figure = corpus_figure  # the name that `means` has for the figure of a run too


@dataclass(frozen=True)
class _Bootstrap:
    """Figures and draws of student and reference, means over their runs, and what scatters beside
    the items drawn.
    """

    student: float
    reference: float
    of_student: _Numbers
    of_reference: _Numbers
    unseen: float  # variance of each side
    between: tuple[float, float, float]  # variances of both sides' runs, and their covariance
    runs: int

    def noise(self, share: float) -> tuple[float, float]:
        """Return the scale and the degrees of freedom of what is added to student's figure - share
        x reference's.
        """
        items, (ours, theirs, together) = self.unseen * (1 + share**2), self.between
        runs = max(0.0, ours + share**2 * theirs - 2 * share * together)
        freedom = (
            (self.runs - 1) * ((items + runs) / runs) ** 2
            if runs > 0 and self.runs > 1
            else math.inf
        )
        return math.sqrt(items + runs), freedom

    def below(self, share: float, limit: float = 0.0) -> float:
        """Return how much of the smoothed bootstrap has student's figure - share x reference's at
        or below a limit.
        """
        from scipy.special import ndtr, stdtr

        gaps = limit - (self.of_student - share * self.of_reference)
        scale, freedom = self.noise(share)
        if scale <= 0:
            return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
        return float(
            (ndtr(gaps / scale) if math.isinf(freedom) else stdtr(freedom, gaps / scale)).mean()
        )

    def variance(self, share: float) -> float:
        """Return the variance of student's figure - share x reference's."""
        return (
            float((self.of_student - share * self.of_reference).var()) + self.noise(share)[0] ** 2
        )


def _bootstrap(student: Runs, reference: Runs, parts: Parts, *, paired: bool = False) -> _Bootstrap:
    """Draw two sides together."""
    if len({len(run.statistics) for run in (*student, *reference)}) > 1:
        raise ValueError(
            f"{len(student[0].statistics)} and {len(reference[0].statistics)} items are not the "
            "same"
        )
    ours, theirs = (
        [resample(run, tuple(map(tuple, parts))) for run in side] for side in (student, reference)
    )
    count = len(student[0].statistics)
    # sum of squared weights
    share = sum(weight**2 / (here.stop - here.start) for here, weight in strata(count, parts))
    unseen = 0.5 * max(one.reach for one in (*ours, *theirs)) ** 2 * share**2
    values = [np.array([one.figure for one in side]) for side in (ours, theirs)]
    draws = [np.mean([one.draws for one in side], axis=0) for side in (ours, theirs)]
    return _Bootstrap(
        float(values[0].mean()),
        float(values[1].mean()),
        draws[0],
        draws[1],
        unseen,
        _between(*values, paired=paired),
        max(len(ours), len(theirs)),
    )


def _between(ours: _Numbers, theirs: _Numbers, *, paired: bool) -> tuple[float, float, float]:
    """Return the variances of the mean figures over runs, and their covariance where runs of one
    position are one training.
    """
    first, second = (
        float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.0 for side in (ours, theirs)
    )
    together = (
        float(np.cov(ours, theirs)[0, 1]) / len(ours)
        if paired and len(ours) == len(theirs) > 1
        else 0.0
    )
    return first, second, together


def _crossing(rising: Callable[[float], float], level: float, start: float, step: float) -> float:
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


# The comparisons, as in `harness/statistics/means.py`


def difference_interval(
    student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False
) -> Interval:
    """Return student's figure - reference's with its paired 95 % interval."""
    if len(student[0].statistics) < 2:
        return Interval(
            run_figure(student[0], parts) - run_figure(reference[0], parts),
            reason="one item gives no interval",
        )
    found = _bootstrap(student, reference, parts, paired=paired)
    gap, step = found.student - found.reference, math.sqrt(found.variance(1.0))
    if step <= 0:
        return Interval(gap, gap, gap)
    low, high = (
        _crossing(lambda limit: found.below(1.0, limit), level, gap, step)
        for level in (_TAIL, 1 - _TAIL)
    )
    return Interval(gap, low, high)


def ratio_interval(
    student: Runs, reference: Runs, parts: Parts = (), *, chance: float = 0.0, paired: bool = False
) -> Interval:
    """Return student's figure / reference's with its paired 95 % interval: where the test of
    `keeps` turns.

    For figures that have a zero; no such figure has a `chance`. Undefined where the reference
    scores nothing; without an interval where its own is too uncertain.
    """
    if len(student[0].statistics) < 2:
        base = run_figure(reference[0], parts)
        return Interval(
            run_figure(student[0], parts) / base if base > 0 else None,
            reason="one item gives no interval",
        )
    if chance:
        raise ValueError("a figure of all items together has no chance level")
    found = _bootstrap(student, reference, parts, paired=paired)
    if found.reference <= 0:
        return Interval(None, reason="the teacher scores nothing")
    value = found.student / found.reference
    error = math.sqrt(float(found.of_reference.var()) + found.unseen + found.between[1])
    if found.reference < MIN_ERRORS_ABOVE_CHANCE * error or not (found.of_reference > 0).all():
        return Interval(value, reason="the teacher's own score is too uncertain for an interval")
    step = math.sqrt(found.variance(value)) / found.reference
    low, high = (
        _crossing(lambda share: found.below(share), level, value, step)
        for level in (_TAIL, 1 - _TAIL)
    )
    return Interval(value, max(0.0, low), high)


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
    """Test a margin by the paired bootstrap: (p of "it does not keep it", p of "it does"),
    one-sided.

    Kept is `margin` of the reference's figure, or (`points`) all but `margin`; of a figure that is
    better when lower, at most 1 / `margin` of it, or `margin` more.
    """
    if chance:
        raise ValueError("a figure of all items together has no chance level")
    found = _bootstrap(student, reference, parts, paired=paired)
    share = 1.0 if points else 1 / margin if lower else margin
    limit = 0.0 if not points else margin if lower else -margin
    under = found.below(share, limit)
    return RetentionTest(1 - under, under) if lower else RetentionTest(under, 1 - under)


def error_of_difference(student: Runs, reference: Runs, parts: Parts = ()) -> float:
    """Return the standard error of student's figure - reference's."""
    return math.sqrt(_bootstrap(student, reference, parts).variance(1.0))


def equality_test(
    student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False
) -> float:
    """Return the two-sided p of "both figures are equal"; 1 where all that items add is."""
    if list(student) == list(reference) or len(student[0].statistics) < 2:
        return 1.0
    under = _bootstrap(student, reference, parts, paired=paired).below(1.0)
    return min(1.0, 2 * min(under, 1 - under))


def inferiority_test(
    row: Runs, best: Runs, parts: Parts = (), *, lower: bool = False, paired: bool = False
) -> float:
    """Return the one-sided p of "the row is no worse than the best one" on the same items; 1 where
    they are equal.
    """
    if list(row) == list(best) or len(row[0].statistics) < 2:
        return 1.0
    return retention_test(row, best, 0.0, parts, points=True, lower=lower, paired=paired)[1]
