"""A value with its interval, where the error has several independent sources.

Pure functions, no torch.

An error that comes from items alone has as many degrees of freedom as there are items, one that
comes from trainings as many as there are trainings less one. Adding both variances and giving the
sum one number of degrees of freedom (Satterthwaite's) is too sure where the few trainings happen to
agree: two trainings against a fixed model were called different in 11.6 % of draws that were equal,
two against five in 12.1 % (`results/benchmarks/verdict-oc.json`). So every source keeps its own
quantile of Student's t, and the half-widths add in quadrature (Banerjee, 1960, "Approximate
confidence interval for linear functions of means of k populations when the population variances are
not equal", Sankhya 22, 357-358: the coverage is never below the nominal one).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z95 = NormalDist().inv_cdf(0.975)


class ErrorSource(NamedTuple):
    """One independent source of error.

    `freedom` is the number of degrees of freedom with which its variance was estimated.
    """

    variance: float
    freedom: float


class RetentionTest(NamedTuple):
    """The p values of both one-sided tests of "the student keeps a margin of its reference".

    At most one of them is small. Neither is: the items cannot tell.
    """

    p_noninferior: float  # of "it does not keep the margin": small where it is shown to keep it
    p_inferior: float  # of "it keeps the margin": small where it is shown not to


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval.

    `low` and `high` are None where there is no interval; `reason` says why. `sources` are the
    errors behind it: of the value, or of its logarithm where it is a ratio that cannot be negative.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    sources: tuple[ErrorSource, ...] = field(default=(), compare=False, repr=False)


def t_quantile(freedom: float, tail: float = 0.025) -> float:
    """Return Student's t that is exceeded with probability `tail`."""
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, tail))


def half_width(sources: Sequence[ErrorSource], tail: float = 0.025) -> float:
    """Return the half-width of an interval that either side exceeds with probability `tail`."""
    squares = (
        source.variance * t_quantile(source.freedom, tail) ** 2
        for source in sources
        if source.variance > 0
    )
    return math.sqrt(sum(squares))


def one_sided_p(gap: float, sources: Sequence[ErrorSource]) -> float:
    """Return the one-sided p of "the true value is not above zero" for an observed `gap`.

    It is small for a large positive gap: the level at which the interval's lower end touches zero.
    """
    if not any(source.variance > 0 for source in sources):
        return 0.5 if gap == 0 else 0.0 if gap > 0 else 1.0
    if gap < 0:
        return 1.0 - one_sided_p(-gap, sources)
    low, high = -230.0, math.log(0.5)  # of the logarithm of p; the half-width falls as it rises
    if half_width(sources, math.exp(low)) <= gap:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if half_width(sources, math.exp(middle)) > gap else (low, middle)
    return math.exp((low + high) / 2)


def two_sided_p(gap: float, sources: Sequence[ErrorSource]) -> float:
    """Return the two-sided p of "the true value is zero"."""
    return min(1.0, 2 * one_sided_p(abs(gap), sources))


def interval_around(value: float, sources: Sequence[ErrorSource]) -> Interval:
    """Return a value with its interval, from the sources of its error."""
    half = half_width(sources)
    return Interval(value, value - half, value + half, sources=tuple(sources))


def interval_around_ratio(log_value: float, sources: Sequence[ErrorSource]) -> Interval:
    """Return a ratio with its interval, from its logarithm and the sources of that one's error."""
    half = half_width(sources)
    value = math.exp(log_value) if log_value < 700 else math.inf
    low, high = (math.exp(min(end, 700.0)) for end in (log_value - half, log_value + half))
    return Interval(value, low, high, sources=tuple(sources))


def ratio_of_rounds(
    ratios: Sequence[float], *, spread: float = 0.0, resamples: int = 10_000
) -> Interval:
    """Return the geometric mean of the rounds' ratios, with a 95 % bootstrap interval over rounds.

    The percentile interval of few rounds is too short; its tails are moved out to what Student's t
    and the factor sqrt(n / (n - 1)) ask for (the expanded percentile interval of Hesterberg, 2015,
    "What teachers should know about the bootstrap", section 5.2). `spread` is a standard deviation
    of the log ratio that no round can show, because all of them share it; it widens both ends in
    quadrature. Fewer than three rounds give no interval.
    """
    from scipy.special import stdtrit

    logs = np.log(np.asarray(ratios, dtype=np.float64))
    count = len(logs)
    value = float(np.exp(logs.mean()))
    if count < 3:
        return Interval(value, reason=f"{count} rounds give no interval")
    random = np.random.Generator(np.random.PCG64(20261124))
    means = logs[random.integers(0, count, size=(resamples, count))].mean(axis=1)
    tail = NormalDist().cdf(math.sqrt(count / (count - 1)) * float(stdtrit(count - 1, 0.025)))
    below, above = (
        abs(float(end) - math.log(value)) for end in np.quantile(means, [tail, 1 - tail])
    )
    below, above = math.hypot(below, Z95 * spread), math.hypot(above, Z95 * spread)
    return Interval(value, value * math.exp(-below), value * math.exp(above))


# What all looks of a rule spend together. For independent rounds it could be 5 %; where a round
# keeps three tenths of the one before, these looks hold the truth in 94 of 100 (timing-rounds).
_LOOKS_ERROR = 0.03


def tail_of_looks(looks: int) -> float:
    """Return the error that each of so many looks may make on either side."""
    return _LOOKS_ERROR / 2 / looks


def ratio_after_looks(ratios: Sequence[float], *, looks: int, spread: float = 0.0) -> Interval:
    """Return the geometric mean of rounds that a rule ended, with an interval that allows for it.

    A rule that looks at its interval `looks` times, after numbers of rounds fixed beforehand, and
    may stop at each, errs at any look with at most the sum of the looks' errors (Bonferroni; with
    equal parts it is the simplest spending of error, Lan & DeMets, 1983, "Discrete sequential
    boundaries for clinical trials"). So every look has Student's t of the logarithms at an equal
    part of the error (`_LOOKS_ERROR`). `spread` is as in `ratio_of_rounds`. Fewer than three rounds
    give no interval.
    """
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    count = len(logs)
    value = float(np.exp(logs.mean()))
    if count < 3:
        return Interval(value, reason=f"{count} rounds give no interval")
    error = float(logs.std(ddof=1)) / math.sqrt(count)
    half = math.hypot(t_quantile(count - 1, tail_of_looks(looks)) * error, Z95 * spread)
    return Interval(value, value * math.exp(-half), value * math.exp(half))
