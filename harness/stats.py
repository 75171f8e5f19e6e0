"""Retention, flips and differences on paired items, with intervals. Pure functions, no torch.

Notation: of n items both models answered, a: both right, b: teacher only, c: student only,
d: neither. Outcomes are strings of "0" and "1" in item order.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 4_000
_FARTHEST = 1e6  # a score interval that reaches so far has no end
RESOLVES = 4.0  # a teacher's distance from chance, in standard errors, below which a ratio to it means nothing


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
    first, second = (int(outcomes, 2) if outcomes else 0 for outcomes in (teacher, student))  # a bit an item
    both, right, left = (first & second).bit_count(), teacher.count("1"), student.count("1")
    return Pairs(both, right - both, left - both, len(teacher) - right - left + both)


# Weights of a contrast on the four cells, in the order of `Pairs`. Its mean over items is what a hypothesis sets to zero.
_Weights = tuple[float, float, float, float]


def _ratio_weights(ratio: float, chance: float) -> _Weights:
    """Weights of (S - g) - R (T - g): zero in the mean where the student keeps exactly R of what the teacher has above g."""
    base = -chance * (1 - ratio)
    return 1 - ratio + base, base - ratio, 1 + base, base


def _difference_weights(delta: float) -> _Weights:
    """Weights of S - T - delta."""
    return -delta, -1 - delta, 1 - delta, -delta


def score_z(counts: Pairs, weights: _Weights) -> float:
    """Return the score statistic of "the weights' mean is zero": estimate over its standard error *under that hypothesis*.

    The restricted estimates are p_i = n_i / (n (1 + l w_i)), l solving sum n_i w_i / (1 + l w_i) = 0; a cell without items takes what
    is left where the hypothesis needs it. For S - T - delta this is Tango's statistic (1998), for S - R T that of Nam & Blackwelder
    (2002) and Tang, Tang & Chan (2003); above chance it is the same principle with other weights.
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
        for _ in range(200):  # Newton's step where it stays inside, else halving: the slope falls between two poles
            parts = [count * weight / (1 + at * weight) for count, weight in seen]
            value, size = math.fsum(parts), math.fsum(map(abs, parts))
            if value > 0:
                low = at
            else:
                high = at
            if abs(value) <= 1e-12 * size or high - low <= 1e-15 * max(abs(low), abs(high)):
                break
            step = value / math.fsum(part**2 / count for part, (count, _) in zip(parts, seen, strict=True))
            # Beside a pole Newton's steps are tiny and lead nowhere: what does not move is halved too.
            at = at + step if low < at + step < high and abs(step) > 1e-9 * (high - low) else (low + high) / 2
    shares = [(count / (n * (1 + at * weight)), weight) for count, weight in seen]
    variance = math.fsum(share * weight**2 for share, weight in shares)
    if empty is not None:
        variance += max(0.0, 1 - math.fsum(share for share, _ in shares)) * empty**2
    if variance <= 0:
        return 0.0 if estimate == 0 else math.copysign(math.inf, estimate)
    return estimate / math.sqrt(variance / n)


def _ends(statistic: Callable[[float], float], observed: float, step: float, lowest: float, highest: float) -> tuple[float, float]:
    """Return where a statistic that falls in its argument, and is 0 at `observed`, passes z and -z: the ends of the score interval."""

    def end(direction: int, limit: float) -> float:
        inside, width = observed, step
        outside = observed
        while abs(statistic(outside)) < Z95:
            if outside == limit or width > _FARTHEST:
                return limit
            inside, width = outside, 2 * width
            outside = max(limit, observed - width) if direction < 0 else min(limit, observed + width)
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

    The usual interval of the paired log ratio (Nam & Blackwelder, 2002) covers 88 % instead of 95 % where flips are few and nearly all go
    one way (n = 100, p_T = .9, 5 % flips); this one covers 94.7 % at worst over the grid of `tests/benchmarks/interval-coverage.py`.
    """
    teacher, student = counts.both + counts.teacher_only, counts.both + counts.student_only
    if teacher == 0:
        return Interval(None, reason="the teacher solves nothing")
    if student == 0:
        # No score exists at 0 of n: the interval's upper end is the exact one of 0 successes (Clopper-Pearson).
        return Interval(0.0, 0.0, (1 - 0.025 ** (1 / counts.n)) * counts.n / teacher)
    ratio = student / teacher
    return Interval(ratio, *_ends(lambda one: score_z(counts, _ratio_weights(one, 0.0)), ratio, 0.05, 0.0, math.inf))


def retention_above_chance(counts: Pairs, chance: float) -> Interval:
    """Return (p_S - g) / (p_T - g) with its score interval; undefined where the teacher is near chance.

    Below four standard errors from chance the set of ratios that the data do not reject may be unbounded (Fieller, 1954).
    """
    n = counts.n
    teacher, student = (counts.both + counts.teacher_only) / n, (counts.both + counts.student_only) / n
    room = teacher - chance
    shrunk = (n * teacher + 0.5) / (n + 1)  # a perfect teacher of few items has an error too
    if room <= 0 or room / math.sqrt(shrunk * (1 - shrunk) / n) < RESOLVES:
        return Interval(None, reason="the teacher is at chance")
    ratio = (student - chance) / room
    return Interval(ratio, *_ends(lambda one: score_z(counts, _ratio_weights(one, chance)), ratio, 0.05, -math.inf, math.inf))


def difference(counts: Pairs) -> Interval:
    """Return p_S - p_T with Tango's score interval (1998), which holds with empty cells too."""
    observed = (counts.student_only - counts.teacher_only) / counts.n
    return Interval(observed, *_ends(lambda one: score_z(counts, _difference_weights(one)), observed, 0.02, -1.0, 1.0))


def mcnemar(worse: int, better: int) -> float:
    """Return the exact one-sided p value of "no more items were lost than won": P(X >= worse), X ~ Bin(worse + better, 1/2); 1 of none."""
    from scipy.special import bdtrc

    return 1.0 if worse == 0 else float(bdtrc(worse - 1, worse + better, 0.5))


def holm(values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values (1979), in the order given: reject those up to alpha, and at most alpha of all families errs."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = largest
    return adjusted


def keeps(row: Sequence[str], teacher: Sequence[str], margin: float, *, points: bool = False, chance: float = 0.0) -> tuple[float, float]:
    """Test whether a student keeps `margin` of what its teacher has above `chance`, or (`points`) loses less than that share of the items.

    Returns (p of "it does not", p of "it does"): the first small means *passed*, the second small *regressed*, neither that these items
    cannot tell. One run each: score statistic with the variance under "exactly at the margin" (Nam & Blackwelder, 2002; Tango, 1998).
    Several: Student's t of the mean gap. Its variance is that of the two-level bootstrap, in which the spread between s seeds, which draws
    with replacement make too small, is widened by s / (s - 1); the degrees of freedom are Satterthwaite's.
    """
    if len(row) == len(teacher) == 1:
        z = score_z(pairs(teacher[0], row[0]), _difference_weights(-margin) if points else _ratio_weights(margin, chance))
        return NormalDist().cdf(-z), NormalDist().cdf(z)
    ours, theirs, of_ours, of_theirs = _resampled(row, teacher)
    above = (1 - margin) * chance
    gap = ours / of_ours - theirs / of_theirs + margin if points else ours / of_ours - margin * (theirs / of_theirs) - above
    from scipy.special import stdtr

    teachers = [run.count("1") / len(run) for run in teacher]
    base = sum(teachers) / len(teachers)
    seeds = np.array([run.count("1") / len(run) for run in row]) - base + margin if points else np.array(
        [run.count("1") / len(run) for run in row]
    ) - margin * base - above  # fmt: skip
    count = len(seeds)
    between = float(seeds.var(ddof=1)) / count if count > 1 else 0.0
    variance = float(gap.var()) + between / count
    if variance <= 0:  # not one item differs in any run
        mean = float(seeds.mean())
        return (0.5, 0.5) if mean == 0 else (0.0, 1.0) if mean > 0 else (1.0, 0.0)
    freedom = (count - 1) * (variance / between) ** 2 if between > 0 else 1e6
    t = float(seeds.mean()) / math.sqrt(variance)
    return float(stdtr(freedom, -t)), float(stdtr(freedom, t))


def net_loss(before: Sequence[str], after: Sequence[str]) -> tuple[list[int], float]:
    """Compare several runs with the same runs of before: each item's net change over the runs, and the one-sided p of "nothing was lost".

    One run: exact McNemar. Several: an item is a cluster; under the hypothesis the signs of the net changes are a matter of chance, so
    their sum has the variance of the sum of their squares (normal approximation of the sign-flip test, with continuity correction).
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
    return totals, 1.0 if squares == 0 else NormalDist().cdf(-(-sum(totals) - 0.5) / math.sqrt(squares))


def mean_below(values: Sequence[float]) -> float:
    """Return the one-sided p of "the mean is not below zero" by Student's t over few values (seeds); 1 of fewer than two."""
    from scipy.special import stdtr

    if len(values) < 2:
        return 1.0
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    if error == 0:
        return 0.0 if found.mean() < 0 else 1.0
    return float(stdtr(len(found) - 1, found.mean() / error))


def perplexity_keeps(student: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], limit: float) -> tuple[float, float]:
    """Test whether a perplexity is at most `limit` times the reference's; (p of "it is not", p of "it is"), documents as clusters."""
    return ratio_keeps(perplexity_ratio(student, reference), limit)


def ratio_keeps(found: Interval, limit: float) -> tuple[float, float]:
    """Test by its interval whether a ratio is at most `limit`; (p of "it is not", p of "it is"), both 1 where it has no interval."""
    if found.value is None or found.low is None or found.high is None or not 0 < found.low < found.high < math.inf:
        return 1.0, 1.0
    z = (math.log(limit) - math.log(found.value)) / (math.log(found.high / found.low) / (2 * Z95))
    return NormalDist().cdf(-z), NormalDist().cdf(z)


def items_for(flips: float, drop: float, *, alpha: float, power: float = 0.8) -> int:
    """Return how many paired items show a true drop, at a share of flips (never below the drop itself); one-sided alpha."""
    spread = max(flips, drop)
    needed = NormalDist().inv_cdf(1 - alpha) * math.sqrt(spread) + NormalDist().inv_cdf(power) * math.sqrt(max(0.0, spread - drop**2))
    return math.ceil((needed / drop) ** 2)


def items_to_decide(p: float, n: int, *, alpha: float, power: float = 0.8) -> int | None:
    """Return how many items would decide a test that has one-sided `p` with n of them, if the truth is what was seen; None at p = 1/2."""
    z = NormalDist().inv_cdf(min(max(p, 1e-12), 1 - 1e-12))
    if abs(z) < 1e-3:
        return None
    return math.ceil(n * ((NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)) / z) ** 2)


_Counts = npt.NDArray[np.int64]
_totals: dict[str, _Counts] = {}  # of each run's outcomes: right answers in every draw of the items
_KEPT = 200_000_000  # bytes of them


def prepare(runs: Iterable[str]) -> None:
    """Draw the items of many runs again at once, which costs little more than one run's draw: later comparisons find theirs made."""
    asked = [run for run in dict.fromkeys(runs) if run]
    fresh = [run for run in asked if run not in _totals]
    if fresh and 8 * RESAMPLES * (len(_totals) + len(fresh)) > _KEPT:
        _totals.clear()
        fresh = asked
    by_length: dict[int, list[str]] = {}
    for run in fresh:
        by_length.setdefault(len(run), []).append(run)
    for length, alike in by_length.items():
        marks = np.stack([np.frombuffer(run.encode(), dtype=np.uint8) for run in alike], axis=1).astype(np.float32) - ord("0")
        _totals.update(zip(alike, _drawn_again(length, marks).T, strict=True))


def _drawn_again(items: int, marks: npt.NDArray[np.float32]) -> _Counts:
    """Return the right answers of every run (columns of `marks`) in every draw of the items, the same draws for all: (draws, runs).

    Whole numbers below 2^24 are exact in float32 and the generator's bounded integers are integer arithmetic, so no processor and no
    order of summation shows in a table.
    """
    draw = np.random.Generator(np.random.PCG64([20260901, items]))
    found = np.empty((RESAMPLES, marks.shape[1]), dtype=np.int64)
    size = max(1, 4_000_000 // items)
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
        taken = draw.integers(0, items, size=(count, items), dtype=np.int32) + np.arange(count, dtype=np.int32)[:, None] * np.int32(items)
        weights = np.bincount(taken.ravel(), minlength=count * items).reshape(count, items).astype(np.float32)
        found[start : start + count] = weights @ marks
    return found


@lru_cache(maxsize=64)
def _picks(runs: int, stream: int) -> _Counts:
    """Return how often each run is drawn, (draws, runs)."""
    taken = np.random.Generator(np.random.PCG64([20260902, stream, runs])).integers(0, runs, size=(RESAMPLES, runs))
    return np.stack([(taken == run).sum(axis=1) for run in range(runs)], axis=1)


def _resampled(student: Sequence[str], reference: Sequence[str]) -> tuple[_Counts, _Counts, int, int]:
    """Draw runs and items again; return the right answers of both sides in every draw, and of how many answers they are each."""
    if len({len(run) for run in (*student, *reference)}) > 1:
        raise ValueError("runs of other items cannot be paired")
    prepare([*student, *reference])
    ours, theirs = (np.stack([_totals[run] for run in side], axis=1) for side in (student, reference))
    runs, others, items = len(student), len(reference), len(student[0])
    total_ours = (ours * _picks(runs, 0)).sum(axis=1)
    if others == 1:
        return total_ours, theirs[:, 0], runs * items, items
    stream = 0 if others == runs else 1  # two rows with different seeds are drawn apart
    return total_ours, (theirs * _picks(others, stream)).sum(axis=1), runs * items, others * items


def two_level(student: Sequence[str], reference: Sequence[str], *, ratio: bool, chance: float = 0.0) -> Interval:
    """Compare several runs (seeds) of a student with a reference on the same items: bootstrap over runs and items.

    `reference` has one run (a teacher), or as many as the student: then runs of one position are one seed and are
    drawn together; with another number of runs both are drawn apart. Returns the ratio of the parts above `chance`, or the difference.
    """
    total_ours, total_theirs, answers_ours, answers_theirs = _resampled(student, reference)
    mean_ours, mean_theirs = total_ours / answers_ours, total_theirs / answers_theirs
    items = len(student[0])
    observed_ours = sum(run.count("1") for run in student) / answers_ours
    observed_theirs = sum(run.count("1") for run in reference) / answers_theirs
    if not ratio:
        low, high = np.quantile(mean_ours - mean_theirs, [0.025, 0.975])
        return Interval(observed_ours - observed_theirs, float(low), float(high))
    room = observed_theirs - chance
    spread = math.sqrt(observed_theirs * (1 - observed_theirs) / items)
    if room <= 0 or (chance > 0 and spread > 0 and room / spread < RESOLVES):
        return Interval(None, reason="the teacher is at chance" if chance else "the teacher solves nothing")
    low, high = np.quantile((mean_ours - chance) / np.maximum(mean_theirs - chance, 1e-12), [0.025, 0.975])
    return Interval((observed_ours - chance) / room, float(low), float(high))


def worse(row: Sequence[str], best: Sequence[str]) -> float:
    """Return the one-sided p value of "the row is no worse than the best one" on the same items.

    One run each: exact McNemar. Several: the share of the two-level bootstrap's draws in which the row is at least as good.
    """
    if len(row) == len(best) == 1:
        counts = pairs(best[0], row[0])
        return mcnemar(counts.teacher_only, counts.student_only)
    ours, theirs, of_ours, of_theirs = _resampled(row, best)
    return float((np.count_nonzero(ours * of_theirs >= theirs * of_ours) + 1) / (RESAMPLES + 1))


def perplexity_ratio(student: Sequence[tuple[float, float]], teacher: Sequence[tuple[float, float]]) -> Interval:
    """Return student's perplexity / teacher's on the same documents, each given as (log-likelihood, words).

    exp of the difference of log-likelihoods per word; the interval takes documents as clusters (ratio estimator).
    """
    if len(student) != len(teacher) or not student:
        return Interval(None, reason="scored on different items")
    if not all(math.isfinite(total) for total, _ in (*student, *teacher)):
        return Interval(None, reason="a document has no finite likelihood")
    gaps = [theirs[0] - ours[0] for ours, theirs in zip(student, teacher, strict=True)]
    words = [ours[1] for ours in student]
    mean = sum(gaps) / sum(words)
    if len(gaps) < 2:
        return Interval(math.exp(mean))
    squares = sum((gap - mean * size) ** 2 for gap, size in zip(gaps, words, strict=True))
    error = math.sqrt(squares * len(gaps) / (len(gaps) - 1)) / sum(words)
    return Interval(math.exp(mean), math.exp(mean - Z95 * error), math.exp(mean + Z95 * error))


def ratio_of_rounds(ratios: Sequence[float], *, spread: float = 0.0, resamples: int = 10_000) -> Interval:
    """Return the geometric mean of one ratio a round, with a 95 % bootstrap interval over the rounds.

    The percentile interval of few rounds is too short; its tails are moved out to what Student's t and the factor
    sqrt(n / (n - 1)) ask for (the expanded percentile interval of Hesterberg, 2015, "What teachers should know about
    the bootstrap", section 5.2). `spread` is a standard deviation of the log ratio that no round can show, because all of
    them share it; it widens both ends in quadrature. Fewer than three rounds give no interval.
    """
    from scipy.special import stdtrit

    logs = np.log(np.asarray(ratios, dtype=np.float64))
    count = len(logs)
    value = float(np.exp(logs.mean()))
    if count < 3:
        return Interval(value, reason=f"{count} rounds give no interval")
    draw = np.random.Generator(np.random.PCG64(20261124))
    means = logs[draw.integers(0, count, size=(resamples, count))].mean(axis=1)
    tail = NormalDist().cdf(math.sqrt(count / (count - 1)) * float(stdtrit(count - 1, 0.025)))
    below, above = (abs(float(end) - math.log(value)) for end in np.quantile(means, [tail, 1 - tail]))
    below, above = math.hypot(below, Z95 * spread), math.hypot(above, Z95 * spread)
    return Interval(value, value * math.exp(-below), value * math.exp(above))


def smallest_drop(n: int, flips: float) -> float | None:
    """Return the smallest true drop that n paired items with this share of flips show (alpha .05 one-sided, power .8)."""
    if n == 0:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        drop = (low + high) / 2
        low, high = (low, drop) if items_for(flips, drop, alpha=0.05) <= n else (drop, high)
    return high
