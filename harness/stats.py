"""Retention, flips and differences on paired items, with intervals. Pure functions, no torch.

Notation: of n items both models answered, a: both right, b: teacher only, c: student only,
d: neither. Outcomes are strings of "0" and "1" in item order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000
_RESOLVES = 4.0  # a teacher's distance from chance, in standard errors, below which a ratio to it means nothing


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; `low` and `high` are None where it is undefined, `reason` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Pairs:
    """The four counts of a paired comparison."""

    both: int
    teacher_only: int
    student_only: int
    neither: int

    @property
    def n(self) -> int:
        """Number of items."""
        return self.both + self.teacher_only + self.student_only + self.neither


def pairs(teacher: str, student: str) -> Pairs:
    """Count the four outcomes of two models on the same items."""
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} and {len(student)} outcomes are not the same items")
    counts = {"11": 0, "10": 0, "01": 0, "00": 0}
    for left, right in zip(teacher, student, strict=True):
        counts[left + right] += 1
    return Pairs(counts["11"], counts["10"], counts["01"], counts["00"])


def retention(counts: Pairs) -> Interval:
    """Return p_S / p_T with the interval of the paired log ratio (Nam & Blackwelder, 2002).

    SE(ln R) = sqrt((b + c) / ((a + b)(a + c))).
    """
    teacher, student = counts.both + counts.teacher_only, counts.both + counts.student_only
    if teacher == 0:
        return Interval(None, reason="the teacher solves nothing")
    ratio = student / teacher
    if student == 0:
        # No log ratio exists at 0 of n: the interval's upper end is the exact one of 0 successes (Clopper-Pearson).
        return Interval(0.0, 0.0, (1 - 0.025 ** (1 / counts.n)) * counts.n / teacher)
    spread = Z95 * math.sqrt((counts.teacher_only + counts.student_only) / (teacher * student))
    return Interval(ratio, ratio * math.exp(-spread), ratio * math.exp(spread))


def retention_above_chance(counts: Pairs, chance: float) -> Interval:
    """Return (p_S - g) / (p_T - g) with a delta-method interval; undefined where the teacher is near chance.

    The variance is that of the ratio itself, (v_S - 2 R cov + R^2 v_T) / (n (p_T - g)^2): unlike the log form it
    exists for a student at or below chance.
    """
    n = counts.n
    teacher, student = (counts.both + counts.teacher_only) / n, (counts.both + counts.student_only) / n
    variance_t, variance_s = teacher * (1 - teacher), student * (1 - student)
    room = teacher - chance
    if room <= 0 or (variance_t > 0 and room / math.sqrt(variance_t / n) < _RESOLVES):
        return Interval(None, reason="the teacher is at chance")
    ratio = (student - chance) / room
    covariance = counts.both / n - teacher * student
    spread = Z95 * math.sqrt(max(0.0, variance_s - 2 * ratio * covariance + ratio**2 * variance_t) / n) / room
    return Interval(ratio, ratio - spread, ratio + spread)


def difference(counts: Pairs) -> Interval:
    """Return p_S - p_T with Tango's score interval (1998), which holds with empty cells too."""
    n, b, c = counts.n, counts.teacher_only, counts.student_only
    return Interval((c - b) / n, _tango_limit(n, c, b, low=True), _tango_limit(n, c, b, low=False))


def _tango_limit(n: int, gains: int, losses: int, *, low: bool) -> float:
    """Solve |score(delta)| = z for one limit by bisection; the score falls as delta grows."""
    observed = (gains - losses) / n

    def score(delta: float) -> float:
        # q: the restricted estimate of the loss probability, the larger root of 2n q^2 + B q + C = 0.
        second = -gains - losses + (2 * n - gains + losses) * delta
        third = -losses * delta * (1 - delta)
        root = (math.sqrt(max(0.0, second**2 - 8 * n * third)) - second) / (4 * n)
        variance = n * (2 * root + delta * (1 - delta))
        top = gains - losses - n * delta
        return top / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, top) if top else 0.0

    left, right = (-1.0, observed) if low else (observed, 1.0)
    for _ in range(60):
        middle = (left + right) / 2
        inside = abs(score(middle)) <= Z95
        if low:
            left, right = (left, middle) if inside else (middle, right)
        else:
            left, right = (middle, right) if inside else (left, middle)
    return (left + right) / 2


_Outcomes = npt.NDArray[np.float64]


def _matrix(outcomes: Sequence[str]) -> _Outcomes:
    """Turn outcome strings of equal length into a (runs, items) matrix of 0 and 1."""
    return np.array([[float(mark) for mark in run] for run in outcomes])


def two_level(
    student: Sequence[str], reference: Sequence[str], *, ratio: bool, chance: float = 0.0, resamples: int = RESAMPLES
) -> Interval:
    """Compare several runs (seeds) of a student with a reference on the same items: bootstrap over runs and items.

    `reference` has one run (a teacher), or as many as the student: then runs of one position are one seed and are
    drawn together; with another number of runs both are drawn apart. Returns the ratio of the parts above `chance`, or the difference.
    """
    ours, theirs = _matrix(student), _matrix(reference)
    draw = np.random.Generator(np.random.PCG64(20260901))
    runs, items = ours.shape
    paired = theirs.shape[0] == runs
    # Items with the same outcomes in every run are interchangeable: resampling their counts is resampling the items.
    patterns, counts = np.unique(np.vstack([ours, theirs]), axis=1, return_counts=True)
    weights = draw.multinomial(items, counts / items, size=resamples) / items
    picks = draw.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    by_ours, by_theirs = weights @ patterns[:runs].T, weights @ patterns[runs:].T
    mean_ours = np.einsum("br,br->b", by_ours, picks)
    others = theirs.shape[0]
    if not paired and others > 1:  # two rows with different seeds: drawn apart
        picks_theirs = draw.multinomial(others, np.full(others, 1 / others), size=resamples) / others
        mean_theirs = np.einsum("br,br->b", by_theirs, picks_theirs)
    else:
        mean_theirs = np.einsum("br,br->b", by_theirs, picks) if paired else by_theirs.mean(axis=1)
    observed_ours, observed_theirs = float(ours.mean()), float(theirs.mean())
    if not ratio:
        low, high = np.quantile(mean_ours - mean_theirs, [0.025, 0.975])
        return Interval(observed_ours - observed_theirs, float(low), float(high))
    room = observed_theirs - chance
    spread = math.sqrt(observed_theirs * (1 - observed_theirs) / items)
    if room <= 0 or (chance > 0 and spread > 0 and room / spread < _RESOLVES):
        return Interval(None, reason="the teacher is at chance" if chance else "the teacher solves nothing")
    low, high = np.quantile((mean_ours - chance) / np.maximum(mean_theirs - chance, 1e-12), [0.025, 0.975])
    return Interval((observed_ours - chance) / room, float(low), float(high))


def perplexity_ratio(student: Sequence[tuple[float, float]], teacher: Sequence[tuple[float, float]]) -> Interval:
    """Return student's perplexity / teacher's on the same documents, each given as (log-likelihood, words).

    exp of the difference of log-likelihoods per word; the interval takes documents as clusters (ratio estimator).
    """
    if len(student) != len(teacher) or not student:
        return Interval(None, reason="scored on different items")
    gaps = [theirs[0] - ours[0] for ours, theirs in zip(student, teacher, strict=True)]
    words = [ours[1] for ours in student]
    mean = sum(gaps) / sum(words)
    if len(gaps) < 2:
        return Interval(math.exp(mean))
    squares = sum((gap - mean * size) ** 2 for gap, size in zip(gaps, words, strict=True))
    error = math.sqrt(squares * len(gaps) / (len(gaps) - 1)) / sum(words)
    return Interval(math.exp(mean), math.exp(mean - Z95 * error), math.exp(mean + Z95 * error))


def ratio_of_rounds(ratios: Sequence[float], *, spread: float = 0.0, resamples: int = RESAMPLES) -> Interval:
    """Return the geometric mean of one ratio a round, with a 95 % bootstrap interval over the rounds.

    The percentile interval of few rounds is too short; its tails are moved out to what Student's t and the factor
    sqrt(n / (n - 1)) ask for (the expanded percentile interval of Hesterberg, 2015, "What teachers should know about
    the bootstrap", section 5.2). `spread` is a standard deviation of the log ratio that no round can show, because all of
    them share it; it widens both ends in quadrature. Fewer than three rounds give no interval.
    """
    from scipy.stats import t

    logs = np.log(np.asarray(ratios, dtype=np.float64))
    count = len(logs)
    value = float(np.exp(logs.mean()))
    if count < 3:
        return Interval(value, reason=f"{count} rounds give no interval")
    draw = np.random.Generator(np.random.PCG64(20261124))
    means = logs[draw.integers(0, count, size=(resamples, count))].mean(axis=1)
    tail = NormalDist().cdf(math.sqrt(count / (count - 1)) * float(t.ppf(0.025, count - 1)))
    below, above = (abs(float(end) - math.log(value)) for end in np.quantile(means, [tail, 1 - tail]))
    below, above = math.hypot(below, Z95 * spread), math.hypot(above, Z95 * spread)
    return Interval(value, value * math.exp(-below), value * math.exp(above))


def smallest_drop(n: int, flips: float) -> float | None:
    """Return the smallest true drop that n paired items with this share of flips show (alpha .05 one-sided, power .8)."""
    if n == 0:
        return None
    alpha, power = NormalDist().inv_cdf(0.95), NormalDist().inv_cdf(0.8)
    low, high = 0.0, 1.0
    for _ in range(50):
        drop = (low + high) / 2
        spread = max(flips, drop)
        needed = (alpha * math.sqrt(spread) + power * math.sqrt(max(0.0, spread - drop**2))) ** 2 / drop**2
        low, high = (low, drop) if needed <= n else (drop, high)
    return high
