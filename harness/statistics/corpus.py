"""Paired comparisons of figures that all items make together: a bootstrap over items. No torch.

They are F1, Matthews correlation, BLEU, chrF, TER, Brier and perplexity. No item has a value of its
own, but each adds something: a pair of labels, the n-grams of a sentence. A figure is a function of
the sum of what its items add, so drawing items again is drawing sums again. Student and reference
get the same draws, which pairs them (Koehn, 2004). Several runs (seeds) share the draws too, and
the spread between the runs' own figures is added. Every draw is smoothed by what no item showed:
without that, two models that differ on no item would have an interval of no width.

The functions mirror
`harness/statistics/means.py`: the same names, the same arguments, a `Corpus` in place of the values
of a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class _RunVariances(NamedTuple):
    """Variances of both sides' mean figures over runs, and their covariance."""

    student: float
    reference: float
    covariance: float


class _Noise(NamedTuple):
    """What smooths a bootstrap: its standard deviation and its degrees of freedom."""

    scale: float
    freedom: float


@dataclass(frozen=True)
class _Bootstrap:
    """Figures and draws of student and reference, as means over their runs."""

    student: float
    reference: float
    student_draws: _Numbers
    reference_draws: _Numbers
    unseen: float  # variance of each side beside the items drawn
    between: _RunVariances
    runs: int

    def noise(self, share: float) -> _Noise:
        """Return what is added to every draw of student's figure - share x reference's."""
        items, (ours, theirs, together) = self.unseen * (1 + share**2), self.between
        runs = max(0.0, ours + share**2 * theirs - 2 * share * together)
        if runs > 0 and self.runs > 1:
            freedom = (self.runs - 1) * ((items + runs) / runs) ** 2
        else:
            freedom = math.inf
        return _Noise(math.sqrt(items + runs), freedom)

    def share_below(self, share: float, limit: float = 0.0) -> float:
        """Return the smoothed share of draws with student - share x reference at most `limit`."""
        from scipy.special import ndtr, stdtr

        gaps = limit - (self.student_draws - share * self.reference_draws)
        scale, freedom = self.noise(share)
        if scale <= 0:
            return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
        scaled = gaps / scale
        shares = ndtr(scaled) if math.isinf(freedom) else stdtr(freedom, scaled)
        return float(shares.mean())

    def variance(self, share: float) -> float:
        """Return the variance of student's figure - share x reference's."""
        draws = self.student_draws - share * self.reference_draws
        return float(draws.var()) + self.noise(share).scale ** 2


def _bootstrap(student: Runs, reference: Runs, parts: Parts, *, paired: bool = False) -> _Bootstrap:
    """Draw the items of two sides again, the same ones for both."""
    count = len(student[0].statistics)
    if len({len(run.statistics) for run in (*student, *reference)}) > 1:
        raise ValueError(f"{count} and {len(reference[0].statistics)} items are not the same")
    key = tuple(map(tuple, parts))
    ours, theirs = ([resample(run, key) for run in side] for side in (student, reference))
    # sum of squared weights
    share = sum(weight**2 / (items.stop - items.start) for items, weight in strata(count, parts))
    unseen = 0.5 * max(run.reach for run in (*ours, *theirs)) ** 2 * share**2
    figures = [np.array([run.figure for run in side]) for side in (ours, theirs)]
    student_draws, reference_draws = (
        np.mean([run.draws for run in side], axis=0) for side in (ours, theirs)
    )
    return _Bootstrap(
        float(figures[0].mean()),
        float(figures[1].mean()),
        student_draws,
        reference_draws,
        unseen,
        _run_variances(*figures, paired=paired),
        max(len(ours), len(theirs)),
    )


def _run_variances(ours: _Numbers, theirs: _Numbers, *, paired: bool) -> _RunVariances:
    """Return the variances of the mean figures over runs.

    They have a covariance where `paired` runs of one position are one training.
    """
    first, second = (
        float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.0 for side in (ours, theirs)
    )
    if paired and len(ours) == len(theirs) > 1:
        return _RunVariances(first, second, float(np.cov(ours, theirs)[0, 1]) / len(ours))
    return _RunVariances(first, second, 0.0)


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
    bootstrap = _bootstrap(student, reference, parts, paired=paired)
    gap, step = bootstrap.student - bootstrap.reference, math.sqrt(bootstrap.variance(1.0))
    if step <= 0:
        return Interval(gap, gap, gap)
    low, high = (
        _crossing(lambda limit: bootstrap.share_below(1.0, limit), level, gap, step)
        for level in (_TAIL, 1 - _TAIL)
    )
    return Interval(gap, low, high)


def ratio_interval(
    student: Runs, reference: Runs, parts: Parts = (), *, chance: float = 0.0, paired: bool = False
) -> Interval:
    """Return student's figure / reference's with its paired 95 % interval.

    Its ends are where the result of `retention_test` turns. For figures that have a zero; no such
    figure has a `chance`. Undefined where the reference scores nothing; without an interval where
    its own is too uncertain.
    """
    if len(student[0].statistics) < 2:
        base = run_figure(reference[0], parts)
        return Interval(
            run_figure(student[0], parts) / base if base > 0 else None,
            reason="one item gives no interval",
        )
    _refuse_chance(chance)
    bootstrap = _bootstrap(student, reference, parts, paired=paired)
    if bootstrap.reference <= 0:
        return Interval(None, reason="the teacher scores nothing")
    value = bootstrap.student / bootstrap.reference
    reference_draws = bootstrap.reference_draws
    error = math.sqrt(float(reference_draws.var()) + bootstrap.unseen + bootstrap.between.reference)
    if bootstrap.reference < MIN_ERRORS_ABOVE_CHANCE * error or not (reference_draws > 0).all():
        return Interval(value, reason="the teacher's own score is too uncertain for an interval")
    step = math.sqrt(bootstrap.variance(value)) / bootstrap.reference
    low, high = (
        _crossing(bootstrap.share_below, level, value, step) for level in (_TAIL, 1 - _TAIL)
    )
    return Interval(value, max(0.0, low), high)


def _refuse_chance(chance: float) -> None:
    if chance:
        raise ValueError("a figure of all items together has no chance level")


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
    """Test whether a student keeps a margin, one-sided, by the paired bootstrap.

    It keeps `margin` of the reference's figure, or (`points`) all but `margin`. Of a figure that
    is better when lower (`lower`) it has at most 1 / `margin` of the reference's, or `margin` more.
    """
    _refuse_chance(chance)
    bootstrap = _bootstrap(student, reference, parts, paired=paired)
    share = 1.0 if points else 1 / margin if lower else margin
    limit = 0.0 if not points else margin if lower else -margin
    below = bootstrap.share_below(share, limit)
    return RetentionTest(1 - below, below) if lower else RetentionTest(below, 1 - below)


def error_of_difference(student: Runs, reference: Runs, parts: Parts = ()) -> float:
    """Return the standard error of student's figure - reference's."""
    return math.sqrt(_bootstrap(student, reference, parts).variance(1.0))


def equality_test(
    student: Runs, reference: Runs, parts: Parts = (), *, paired: bool = False
) -> float:
    """Return the two-sided p of "both figures are equal"; 1 where all that items add is."""
    if list(student) == list(reference) or len(student[0].statistics) < 2:
        return 1.0
    below = _bootstrap(student, reference, parts, paired=paired).share_below(1.0)
    return min(1.0, 2 * min(below, 1 - below))


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
    if list(student) == list(reference) or len(student[0].statistics) < 2:
        return 1.0
    test = retention_test(student, reference, 0.0, parts, points=True, lower=lower, paired=paired)
    return test.p_inferior
