"""Retention, flips and differences on paired items, with intervals. Pure functions, no torch.

Notation: of n items both models answered, a: both right, b: teacher only, c: student only,
d: neither. Outcomes are strings of "0" and "1" in item order. Functions of two models take the
student first, then its reference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from harness.statistics import means
from harness.statistics.intervals import Z95, RetentionTest, one_sided_p
from harness.statistics.intervals import Interval as Interval
from harness.statistics.intervals import ratio_of_rounds as ratio_of_rounds
from harness.statistics.means import MIN_ERRORS_ABOVE_CHANCE

_MAX_WIDTH = 1e6  # a score interval that is wider on one side has no end there


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


def count_pairs(student: str, teacher: str) -> Pairs:
    """Count the four outcomes of two models on the same items."""
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} and {len(teacher)} outcomes are not the same items")
    # one bit per item
    student_bits, teacher_bits = (int(marks, 2) if marks else 0 for marks in (student, teacher))
    both = (student_bits & teacher_bits).bit_count()
    student_right, teacher_right = student.count("1"), teacher.count("1")
    neither = len(teacher) - teacher_right - student_right + both
    return Pairs(both, teacher_right - both, student_right - both, neither)


# Weights of a contrast on the four cells, in the order of `Pairs`. Its mean over items is what a
# hypothesis sets to zero.
_Weights = tuple[float, float, float, float]


def ratio_weights(ratio: float, chance: float) -> _Weights:
    """Return the weights of (S - g) - R (T - g).

    Their mean is zero where the student keeps exactly R of what the teacher has above chance g.
    """
    base = -chance * (1 - ratio)
    return 1 - ratio + base, base - ratio, 1 + base, base


def difference_weights(delta: float) -> _Weights:
    """Return the weights of S - T - delta."""
    return -delta, -1 - delta, 1 - delta, -delta


def score_z(counts: Pairs, weights: _Weights) -> float:
    """Return the score statistic of the hypothesis that the mean of the weights is zero.

    It is the estimate over its standard error *under that hypothesis*. The restricted estimates
    are p_i = n_i / (n (1 + l w_i)), where l solves sum n_i w_i / (1 + l w_i) = 0; a cell without
    items gets the remaining probability where the hypothesis needs it. For S - T - delta this is
    Tango's statistic (1998), for S - R T that of Nam & Blackwelder (2002) and Tang, Tang & Chan
    (2003); above chance it is the same principle with other weights.
    """
    cells = (counts.both, counts.teacher_only, counts.student_only, counts.neither)
    n = counts.n
    estimate = sum(count * weight for count, weight in zip(cells, weights, strict=True)) / n
    largest, smallest = max(weights), min(weights)
    if largest <= 0 or smallest >= 0:  # no table at all has this mean, unless every weight is zero
        return 0.0 if estimate == 0 else math.copysign(math.inf, estimate)
    filled = [(count, weight) for count, weight in zip(cells, weights, strict=True) if count]
    low, high = -1 / largest, -1 / smallest

    def slope(multiplier: float) -> float:
        return math.fsum(count * weight / (1 + multiplier * weight) for count, weight in filled)

    empty_weight = None  # of the empty cell that the hypothesis needs
    if all(weight > smallest for _, weight in filled) and slope(high) >= 0:
        multiplier, empty_weight = high, smallest
    elif all(weight < largest for _, weight in filled) and slope(low) <= 0:
        multiplier, empty_weight = low, largest
    else:
        multiplier = _multiplier(filled, low, high)
    shares = [(count / (n * (1 + multiplier * weight)), weight) for count, weight in filled]
    variance = math.fsum(share * weight**2 for share, weight in shares)
    if empty_weight is not None:
        variance += max(0.0, 1 - math.fsum(share for share, _ in shares)) * empty_weight**2
    if variance <= 0:
        return 0.0 if estimate == 0 else math.copysign(math.inf, estimate)
    return estimate / math.sqrt(variance / n)


def _multiplier(filled: Sequence[tuple[int, float]], low: float, high: float) -> float:
    """Return the l between two poles at which sum n_i w_i / (1 + l w_i) is zero.

    `filled` holds (n_i, w_i) of the cells with items.
    """
    multiplier = 0.0
    # Newton's step where it stays inside, else halving: the slope falls between two poles
    for _ in range(200):
        parts = [count * weight / (1 + multiplier * weight) for count, weight in filled]
        value, size = math.fsum(parts), math.fsum(map(abs, parts))
        if value > 0:
            low = multiplier
        else:
            high = multiplier
        if abs(value) <= 1e-12 * size or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        slopes = (part**2 / count for part, (count, _) in zip(parts, filled, strict=True))
        step = value / math.fsum(slopes)
        # Beside a pole Newton's steps are tiny and lead nowhere: such steps are halvings too.
        newton_moves = low < multiplier + step < high and abs(step) > 1e-9 * (high - low)
        multiplier = multiplier + step if newton_moves else (low + high) / 2
    return multiplier


class _Ends(NamedTuple):
    low: float
    high: float


def _score_interval(
    statistic: Callable[[float], float], observed: float, step: float, lowest: float, highest: float
) -> _Ends:
    """Return the ends of a score interval: where a falling statistic passes z and -z.

    The statistic is 0 at `observed`; the search starts with `step` and stays within `lowest` and
    `highest`.
    """

    def end(direction: int, limit: float) -> float:
        inside, width = observed, step
        outside = observed
        while abs(statistic(outside)) < Z95:
            if outside == limit or width > _MAX_WIDTH:
                return limit
            inside, width = outside, 2 * width
            farther = observed + direction * width
            outside = max(limit, farther) if direction < 0 else min(limit, farther)
        for _ in range(48):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) < Z95:
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    return _Ends(end(-1, lowest), end(1, highest))


def retention_interval(counts: Pairs) -> Interval:
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

    def statistic(ratio: float) -> float:
        return score_z(counts, ratio_weights(ratio, 0.0))

    observed = student / teacher
    return Interval(observed, *_score_interval(statistic, observed, 0.05, 0.0, math.inf))


def above_chance_interval(counts: Pairs, chance: float) -> Interval:
    """Return (p_S - g) / (p_T - g) with its score interval; none for a teacher near chance g.

    Below four standard errors from chance the set of ratios that the data do not reject may be
    unbounded (Fieller, 1954).
    """
    n = counts.n
    teacher = (counts.both + counts.teacher_only) / n
    student = (counts.both + counts.student_only) / n
    room = teacher - chance
    shrunk = (n * teacher + 0.5) / (n + 1)  # a perfect teacher of few items has an error too
    if room <= 0 or room / math.sqrt(shrunk * (1 - shrunk) / n) < MIN_ERRORS_ABOVE_CHANCE:
        return Interval(None, reason="the teacher is at chance")

    def statistic(ratio: float) -> float:
        return score_z(counts, ratio_weights(ratio, chance))

    observed = (student - chance) / room
    return Interval(observed, *_score_interval(statistic, observed, 0.05, -math.inf, math.inf))


def difference_interval(counts: Pairs) -> Interval:
    """Return p_S - p_T with Tango's score interval (1998), which holds with empty cells too."""
    observed = (counts.student_only - counts.teacher_only) / counts.n

    def statistic(difference: float) -> float:
        return score_z(counts, difference_weights(difference))

    return Interval(observed, *_score_interval(statistic, observed, 0.02, -1.0, 1.0))


def mcnemar(losses: int, wins: int) -> float:
    """Return McNemar's exact one-sided p of "no more items were lost than won".

    It is P(X >= losses) for X ~ Bin(losses + wins, 1/2), and 1 where nothing was lost.
    """
    from scipy.special import bdtrc

    return 1.0 if losses == 0 else float(bdtrc(losses - 1, losses + wins, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values (1979), in the order of the given ones.

    Rejecting those up to alpha, at most a share alpha of all families contains an error.
    """
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def retention_test(
    student: Sequence[str],
    teacher: Sequence[str],
    margin: float,
    *,
    points: bool = False,
    chance: float = 0.0,
) -> RetentionTest:
    """Test whether a student keeps `margin` of what its teacher has above `chance`.

    With `points`: whether it loses less than that share of the items. Outcomes stand run by run.
    One run each: score statistic with the variance under "exactly at the margin" (Nam &
    Blackwelder, 2002; Tango, 1998). Several: Student's t over runs and items, as the tables'
    intervals have it (`harness.statistics.means`).
    """
    if len(student) == len(teacher) == 1:
        weights = difference_weights(-margin) if points else ratio_weights(margin, chance)
        z = score_z(count_pairs(student[0], teacher[0]), weights)
        # cdf() loses small tails
        return RetentionTest(math.erfc(z / math.sqrt(2)) / 2, math.erfc(-z / math.sqrt(2)) / 2)
    return means.retention_test(
        outcome_values(student), outcome_values(teacher), margin, points=points, chance=chance
    )


def equality_test(
    student: Sequence[str], reference: Sequence[str], *, paired: bool = False
) -> float:
    """Return the two-sided p of "both score alike".

    One run each: the score statistic (of Tango's interval). Several: Student's t.
    """
    if len(student) == len(reference) == 1:
        z = score_z(count_pairs(student[0], reference[0]), difference_weights(0.0))
        return math.erfc(abs(z) / math.sqrt(2))
    return means.equality_test(outcome_values(student), outcome_values(reference), paired=paired)


def inferiority_test(student: Sequence[str], reference: Sequence[str]) -> float:
    """Return the one-sided p of "the student is no worse than the reference" on the same items.

    One run each: exact McNemar. Several: Student's t.
    """
    if len(student) == len(reference) == 1:
        counts = count_pairs(student[0], reference[0])
        return mcnemar(counts.teacher_only, counts.student_only)
    return means.inferiority_test(outcome_values(student), outcome_values(reference))


@lru_cache(maxsize=4096)
def _values_of_run(run: str) -> tuple[float, ...]:
    return tuple(float(mark == "1") for mark in run)


def outcome_values(runs: Sequence[str]) -> list[tuple[float, ...]]:
    """Return outcomes as numbers, run by run: 1 right and 0 wrong."""
    return [_values_of_run(run) for run in runs]


class NetChange(NamedTuple):
    """What several runs lost or won against the same runs before."""

    items: list[int]  # wins less losses of each item, over the runs
    p: float  # one-sided, of "nothing was lost"


def net_change_test(current: Sequence[str], before: Sequence[str]) -> NetChange:
    """Compare several runs with the same runs before a change.

    One run: exact McNemar. Several: an item is a cluster; under the hypothesis the signs of the net
    changes are a matter of chance, so their sum has the variance of the sum of their squares
    (normal approximation of the sign-flip test, with continuity correction).
    """
    changes = [0] * len(current[0])
    for run_before, run_now in zip(before, current, strict=True):
        if run_before == run_now:
            continue
        for item, (old, new) in enumerate(zip(run_before, run_now, strict=True)):
            if old != new:
                changes[item] += 1 if new == "1" else -1
    if len(current) == 1:
        losses, wins = sum(net < 0 for net in changes), sum(net > 0 for net in changes)
        return NetChange(changes, mcnemar(losses, wins))
    squares = sum(net * net for net in changes)
    if squares == 0:
        return NetChange(changes, 1.0)
    return NetChange(changes, NormalDist().cdf(-(-sum(changes) - 0.5) / math.sqrt(squares)))


def negative_mean_test(values: Sequence[float]) -> float:
    """Return the one-sided p of "the mean is not below zero" by Student's t over few values.

    The values are those of seeds; fewer than two give 1.
    """
    from scipy.special import stdtr

    if len(values) < 2:
        return 1.0
    numbers = np.asarray(values, dtype=np.float64)
    error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    if error == 0:
        return 0.0 if numbers.mean() < 0 else 1.0
    return float(stdtr(len(numbers) - 1, numbers.mean() / error))


def ratio_test(ratio: Interval, limit: float) -> RetentionTest:
    """Test by a ratio's own errors whether it is at most `limit`; both p are 1 without an interval.

    The ratio is a figure that is better when lower over its reference's.
    """
    if ratio.value is None or not ratio.sources or not 0 < ratio.value < math.inf:
        return RetentionTest(1.0, 1.0)
    p = one_sided_p(math.log(limit) - math.log(ratio.value), ratio.sources)
    return RetentionTest(p, 1.0 - p)


def items_to_detect(flips: float, drop: float, *, alpha: float, power: float = 0.8) -> int:
    """Return how many paired items show a true drop in a one-sided test at `alpha`.

    `flips` is the share of items that change at all; it counts as no less than the drop itself.
    """
    spread = max(flips, drop)
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha), NormalDist().inv_cdf(power)
    needed = z_alpha * math.sqrt(spread) + z_power * math.sqrt(max(0.0, spread - drop**2))
    return math.ceil((needed / drop) ** 2)


def items_to_detect_ratio(
    n: int, variance: float, loss: float, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Return how many items show a true ratio of 1 + `loss` in a one-sided test at `alpha`.

    `variance` is that of the logarithm of the ratio with `n` items; it falls as 1 / n.
    """
    z = NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)
    return math.ceil(n * variance * (z / math.log1p(loss)) ** 2)


def items_to_decide(p: float, n: int, *, alpha: float, power: float = 0.8) -> int | None:
    """Return how many items would decide a test that has one-sided `p` with n of them.

    It supposes that the observed effect is the true one; None at p = 1/2, where there is none.
    """
    z = NormalDist().inv_cdf(min(max(p, 1e-12), 1 - 1e-12))
    if abs(z) < 1e-3:
        return None
    return math.ceil(n * ((NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)) / z) ** 2)


def detectable_drop(n: int, flips: float) -> float | None:
    """Return the smallest true drop that n paired items show; None without items.

    `flips` is the share of items that change; one-sided alpha .05, power .8.
    """
    if n == 0:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        drop = (low + high) / 2
        low, high = (low, drop) if items_to_detect(flips, drop, alpha=0.05) <= n else (drop, high)
    return high
