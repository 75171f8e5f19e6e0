"""Retention, flips and differences on paired items, with intervals. Pure functions, no torch.

Notation: of n items both models answered, a: both right, b: teacher only, c: student only,
d: neither. Outcomes are strings of "0" and "1" in item order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from harness.statistics import means
from harness.statistics.intervals import Z95, one_sided
from harness.statistics.intervals import Interval as Interval
from harness.statistics.intervals import ratio_of_rounds as ratio_of_rounds
from harness.statistics.means import RESOLVES

_FARTHEST = 1e6  # a score interval that reaches so far has no end


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
    # a bit an item
    first, second = (int(outcomes, 2) if outcomes else 0 for outcomes in (teacher, student))
    both, right, left = (first & second).bit_count(), teacher.count("1"), student.count("1")
    return Pairs(both, right - both, left - both, len(teacher) - right - left + both)


# Weights of a contrast on the four cells, in the order of `Pairs`. Its mean over items is what a
# hypothesis sets to zero.
_Weights = tuple[float, float, float, float]


def _ratio_weights(ratio: float, chance: float) -> _Weights:
    """Weights of (S - g) - R (T - g): zero in the mean where the student keeps exactly R of what
    the teacher has above g.
    """
    base = -chance * (1 - ratio)
    return 1 - ratio + base, base - ratio, 1 + base, base


def _difference_weights(delta: float) -> _Weights:
    """Weights of S - T - delta."""
    return -delta, -1 - delta, 1 - delta, -delta


def score_z(counts: Pairs, weights: _Weights) -> float:
    """Return the score statistic of "the weights' mean is zero": estimate over its standard error
    *under that hypothesis*.

    The restricted estimates are p_i = n_i / (n (1 + l w_i)), l solving sum n_i w_i / (1 + l w_i) =
    0; a cell without items takes what is left where the hypothesis needs it. For S - T - delta this
    is Tango's statistic (1998), for S - R T that of Nam & Blackwelder (2002) and Tang, Tang & Chan
    (2003); above chance it is the same principle with other weights.
    """
    cells = (counts.both, counts.teacher_only, counts.student_only, counts.neither)
    n = counts.n
    estimate = sum(count * weight for count, weight in zip(cells, weights, strict=True)) / n
    largest, smallest = max(weights), min(weights)
    if largest <= 0 or smallest >= 0:  # no table at all has this mean, unless every weight is zero
        return 0.0 if estimate == 0 else math.copysign(math.inf, estimate)
    seen = [(count, weight) for count, weight in zip(cells, weights, strict=True) if count]
    low, high = -1 / largest, -1 / smallest

    def slope(at: float) -> float:
        return math.fsum(count * weight / (1 + at * weight) for count, weight in seen)

    at, empty = 0.0, None
    if all(weight > smallest for _, weight in seen) and slope(high) >= 0:
        at, empty = high, smallest
    elif all(weight < largest for _, weight in seen) and slope(low) <= 0:
        at, empty = low, largest
    else:
        at = _multiplier(seen, low, high)
    shares = [(count / (n * (1 + at * weight)), weight) for count, weight in seen]
    variance = math.fsum(share * weight**2 for share, weight in shares)
    if empty is not None:
        variance += max(0.0, 1 - math.fsum(share for share, _ in shares)) * empty**2
    if variance <= 0:
        return 0.0 if estimate == 0 else math.copysign(math.inf, estimate)
    return estimate / math.sqrt(variance / n)


def _multiplier(seen: Sequence[tuple[int, float]], low: float, high: float) -> float:
    """Return the l between two poles at which sum n_i w_i / (1 + l w_i) is zero; `seen` are (n_i,
    w_i) of the cells with items.
    """
    at = 0.0
    # Newton's step where it stays inside, else halving: the slope falls between two poles
    for _ in range(200):
        parts = [count * weight / (1 + at * weight) for count, weight in seen]
        value, size = math.fsum(parts), math.fsum(map(abs, parts))
        if value > 0:
            low = at
        else:
            high = at
        if abs(value) <= 1e-12 * size or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        step = value / math.fsum(
            part**2 / count for part, (count, _) in zip(parts, seen, strict=True)
        )
        # Beside a pole Newton's steps are tiny and lead nowhere: what does not move is halved too.
        at = (
            at + step
            if low < at + step < high and abs(step) > 1e-9 * (high - low)
            else (low + high) / 2
        )
    return at


def _ends(
    statistic: Callable[[float], float], observed: float, step: float, lowest: float, highest: float
) -> tuple[float, float]:
    """Return where a statistic that falls in its argument, and is 0 at `observed`, passes z and -z:
    the ends of the score interval.
    """

    def end(direction: int, limit: float) -> float:
        inside, width = observed, step
        outside = observed
        while abs(statistic(outside)) < Z95:
            if outside == limit or width > _FARTHEST:
                return limit
            inside, width = outside, 2 * width
            outside = (
                max(limit, observed - width) if direction < 0 else min(limit, observed + width)
            )
        for _ in range(48):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) < Z95:
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    return end(-1, lowest), end(1, highest)


def retention(counts: Pairs) -> Interval:
    """Return p_S / p_T with its score interval (Tang, Tang & Chan, 2003).

    The usual interval of the paired log ratio (Nam & Blackwelder, 2002) covers 88 % instead of 95 %
    where flips are few and nearly all go one way (n = 100, p_T = .9, 5 % flips); this one covers
    94.7 % at worst over the grid of `tests/benchmarks/interval-coverage.py`.
    """
    teacher, student = counts.both + counts.teacher_only, counts.both + counts.student_only
    if teacher == 0:
        return Interval(None, reason="the teacher solves nothing")
    if student == 0:
        # No score exists at 0 of n: the interval's upper end is the exact one of 0 successes
        # (Clopper-Pearson).
        return Interval(0.0, 0.0, (1 - 0.025 ** (1 / counts.n)) * counts.n / teacher)
    ratio = student / teacher
    return Interval(
        ratio,
        *_ends(lambda one: score_z(counts, _ratio_weights(one, 0.0)), ratio, 0.05, 0.0, math.inf),
    )


def retention_above_chance(counts: Pairs, chance: float) -> Interval:
    """Return (p_S - g) / (p_T - g) with its score interval; undefined where the teacher is near
    chance.

    Below four standard errors from chance the set of ratios that the data do not reject may be
    unbounded (Fieller, 1954).
    """
    n = counts.n
    teacher, student = (
        (counts.both + counts.teacher_only) / n,
        (counts.both + counts.student_only) / n,
    )
    room = teacher - chance
    shrunk = (n * teacher + 0.5) / (n + 1)  # a perfect teacher of few items has an error too
    if room <= 0 or room / math.sqrt(shrunk * (1 - shrunk) / n) < RESOLVES:
        return Interval(None, reason="the teacher is at chance")
    ratio = (student - chance) / room
    return Interval(
        ratio,
        *_ends(
            lambda one: score_z(counts, _ratio_weights(one, chance)),
            ratio,
            0.05,
            -math.inf,
            math.inf,
        ),
    )


def difference(counts: Pairs) -> Interval:
    """Return p_S - p_T with Tango's score interval (1998), which holds with empty cells too."""
    observed = (counts.student_only - counts.teacher_only) / counts.n
    return Interval(
        observed,
        *_ends(lambda one: score_z(counts, _difference_weights(one)), observed, 0.02, -1.0, 1.0),
    )


def mcnemar(worse: int, better: int) -> float:
    """Return the exact one-sided p value of "no more items were lost than won": P(X >= worse), X ~
    Bin(worse + better, 1/2); 1 of none.
    """
    from scipy.special import bdtrc

    return 1.0 if worse == 0 else float(bdtrc(worse - 1, worse + better, 0.5))


def holm(values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values (1979), in the order given: reject those up to alpha, and at
    most alpha of all families errs.
    """
    order = sorted(range(len(values)), key=lambda at: values[at])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = largest
    return adjusted


def keeps(
    row: Sequence[str],
    teacher: Sequence[str],
    margin: float,
    *,
    points: bool = False,
    chance: float = 0.0,
) -> tuple[float, float]:
    """Test whether a student keeps `margin` of what its teacher has above `chance`, or (`points`)
    loses less than that share of the items.

    Returns (p of "it does not", p of "it does"): the first small means *passed*, the second small
    *regressed*, neither that these items cannot tell. One run each: score statistic with the
    variance under "exactly at the margin" (Nam & Blackwelder, 2002; Tango, 1998). Several:
    Student's t over runs and items, as the tables' intervals have it (`harness.statistics.means`).
    """
    if len(row) == len(teacher) == 1:
        z = score_z(
            pairs(teacher[0], row[0]),
            _difference_weights(-margin) if points else _ratio_weights(margin, chance),
        )
        # cdf() loses small tails
        return math.erfc(z / math.sqrt(2)) / 2, math.erfc(-z / math.sqrt(2)) / 2
    return means.keeps(numbers_of(row), numbers_of(teacher), margin, points=points, chance=chance)


def unequal(row: Sequence[str], other: Sequence[str], *, paired: bool = False) -> float:
    """Return the two-sided p of "both score alike": the score statistic of one run each (Tango's
    interval), Student's t of several.
    """
    if len(row) == len(other) == 1:
        return math.erfc(
            abs(score_z(pairs(other[0], row[0]), _difference_weights(0.0))) / math.sqrt(2)
        )
    return means.unequal(numbers_of(row), numbers_of(other), paired=paired)


@lru_cache(maxsize=4096)
def _numbers(run: str) -> tuple[float, ...]:
    return tuple(float(mark == "1") for mark in run)


def numbers_of(runs: Sequence[str]) -> list[tuple[float, ...]]:
    """Return outcomes as numbers, 1 right and 0 wrong."""
    return [_numbers(run) for run in runs]


def net_loss(before: Sequence[str], after: Sequence[str]) -> tuple[list[int], float]:
    """Compare several runs with the same runs of before: each item's net change over the runs, and
    the one-sided p of "nothing was lost".

    One run: exact McNemar. Several: an item is a cluster; under the hypothesis the signs of the net
    changes are a matter of chance, so their sum has the variance of the sum of their squares
    (normal approximation of the sign-flip test, with continuity correction).
    """
    totals = [0] * len(after[0])
    for then, now in zip(before, after, strict=True):
        if then != now:
            for at, (old, new) in enumerate(zip(then, now, strict=True)):
                if old != new:
                    totals[at] += 1 if new == "1" else -1
    if len(after) == 1:
        return totals, mcnemar(sum(net < 0 for net in totals), sum(net > 0 for net in totals))
    squares = sum(net * net for net in totals)
    return totals, 1.0 if squares == 0 else NormalDist().cdf(
        -(-sum(totals) - 0.5) / math.sqrt(squares)
    )


def mean_below(values: Sequence[float]) -> float:
    """Return the one-sided p of "the mean is not below zero" by Student's t over few values
    (seeds); 1 of fewer than two.
    """
    from scipy.special import stdtr

    if len(values) < 2:
        return 1.0
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    if error == 0:
        return 0.0 if found.mean() < 0 else 1.0
    return float(stdtr(len(found) - 1, found.mean() / error))


def ratio_keeps(ratio: Interval, limit: float) -> tuple[float, float]:
    """Test by its errors whether a ratio is at most `limit`; (p of "it is not", p of "it is"), both
    1 where it has no interval.
    """
    if ratio.value is None or not ratio.sources or not 0 < ratio.value < math.inf:
        return 1.0, 1.0
    p = one_sided(math.log(limit) - math.log(ratio.value), ratio.sources)
    return p, 1.0 - p


def items_for(flips: float, drop: float, *, alpha: float, power: float = 0.8) -> int:
    """Return how many paired items show a true drop, at a share of flips (never below the drop
    itself); one-sided alpha.
    """
    spread = max(flips, drop)
    needed = NormalDist().inv_cdf(1 - alpha) * math.sqrt(spread) + NormalDist().inv_cdf(
        power
    ) * math.sqrt(max(0.0, spread - drop**2))
    return math.ceil((needed / drop) ** 2)


def items_to_decide(p: float, n: int, *, alpha: float, power: float = 0.8) -> int | None:
    """Return how many items would decide a test that has one-sided `p` with n of them, if the truth
    is what was seen; None at p = 1/2.
    """
    z = NormalDist().inv_cdf(min(max(p, 1e-12), 1 - 1e-12))
    if abs(z) < 1e-3:
        return None
    return math.ceil(n * ((NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)) / z) ** 2)


def worse(row: Sequence[str], best: Sequence[str]) -> float:
    """Return the one-sided p of "the row is no worse than the best one" on the same items: exact
    McNemar, of several runs Student's t.
    """
    if len(row) == len(best) == 1:
        counts = pairs(best[0], row[0])
        return mcnemar(counts.teacher_only, counts.student_only)
    return means.worse(numbers_of(row), numbers_of(best))


def smallest_drop(n: int, flips: float) -> float | None:
    """Return the smallest true drop that n paired items with this share of flips show (alpha .05
    one-sided, power .8).
    """
    if n == 0:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        drop = (low + high) / 2
        low, high = (low, drop) if items_for(flips, drop, alpha=0.05) <= n else (drop, high)
    return high
