"""Coverage of the retention intervals: how often the interval of a draw holds the truth.

Every case of teacher p in {.3, .6, .9}, flips in {5, 15, 30 %}, half, three quarters or all of the
flips being losses, n in {100, 250, 1,319}, chance 0 or .25. Exact sums over all tables for n up to
250, 100,000 draws beyond. Left out: impossible cells, students that solve nothing, and teachers
within four standard errors of chance, where the tables print *undefined*. Beside it, in the same
cases, the interval that is usual elsewhere: the Wald interval of the paired log ratio.

python tests/benchmarks/interval-coverage.py
"""

import math
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _form import figure, write_figures
from scipy.stats import binom

from harness.statistics import stats
from harness.statistics.intervals import Z95
from harness.statistics.means import MIN_ERRORS_ABOVE_CHANCE
from harness.statistics.stats import Pairs

EXACT, DRAWS, TAIL = 250, 100_000, 1e-7


def tables_with_weights(
    n: int, both: float, lost: float, won: float, seed: int
) -> Iterator[tuple[Pairs, float]]:
    """Yield tables with their probabilities: all that matter, or those of many draws."""
    if n > EXACT:
        tables_drawn = np.random.default_rng(seed).multinomial(
            n, [both, lost, won, max(0.0, 1 - both - lost - won)], size=DRAWS
        )
        for cells, count in zip(*np.unique(tables_drawn, axis=0, return_counts=True), strict=True):
            yield Pairs(*map(int, cells)), count / DRAWS
        return
    for b, pb in _masses(n, lost):
        for c, pc in _masses(n - b, won / (1 - lost)):
            for a, pa in _masses(n - b - c, min(1.0, both / (1 - lost - won))):
                yield Pairs(a, b, c, n - a - b - c), pb * pc * pa


def _masses(n: int, p: float) -> list[tuple[int, float]]:
    low, high = int(binom.ppf(TAIL, n, p)), int(binom.ppf(1 - TAIL, n, p))
    values = np.arange(low, high + 1)
    return list(zip(values.tolist(), binom.pmf(values, n, p).tolist(), strict=True))


def our_interval_holds(counts: Pairs, truth: float, chance: float) -> bool:
    """Tell whether our interval of a table holds the truth, by its score test.

    It is the same statement without the search for the interval's ends.
    """
    teacher, student = counts.both + counts.teacher_only, counts.both + counts.student_only
    if teacher == 0 or (student == 0 and not chance):
        interval = stats.retention_interval(counts)
        return (
            interval.low is not None
            and interval.high is not None
            and interval.low <= truth <= interval.high
        )
    return abs(stats.score_z(counts, stats.ratio_weights(truth, chance))) < Z95


def wald_interval_holds(counts: Pairs, truth: float) -> bool:
    """Tell whether the usual (Wald) interval of a table holds the truth."""
    teacher, student = counts.both + counts.teacher_only, counts.both + counts.student_only
    if not teacher or not student:
        return False
    spread = math.sqrt((counts.teacher_only + counts.student_only) / (teacher * student))
    return abs(math.log(student / teacher / truth)) <= Z95 * spread + 1e-12


class Design(NamedTuple):
    """One case: items, the teacher's and the student's shares, flips, and the chance level."""

    n: int
    teacher: float
    flips: float
    losses: float  # share of the flips
    chance: float

    @property
    def lost(self) -> float:
        return self.flips * self.losses

    @property
    def won(self) -> float:
        return self.flips * (1 - self.losses)

    @property
    def both(self) -> float:
        return self.teacher - self.lost

    @property
    def student(self) -> float:
        return self.teacher - self.lost + self.won

    @property
    def truth(self) -> float:
        """The retention that the interval should hold."""
        return (self.student - self.chance) / (self.teacher - self.chance)

    def is_left_out(self) -> bool:
        """Tell whether the case is impossible, or the tables print *undefined* for it."""
        if self.both < -1e-12 or self.both + self.lost + self.won > 1 + 1e-12:
            return True
        error = math.sqrt(self.teacher * (1 - self.teacher) / self.n)
        near_chance = (self.teacher - self.chance) / error < MIN_ERRORS_ABOVE_CHANCE
        return self.student <= 1e-12 or bool(self.chance and near_chance)

    def __str__(self) -> str:
        return (
            f"n={self.n} p={self.teacher} flips={self.flips} losses={self.losses} "
            f"chance={self.chance}"
        )


class Coverage(NamedTuple):
    """How often two intervals of a case hold the truth."""

    ours: float
    usual: float


def coverage_of(case: Design, number: int) -> Coverage:
    """Return the coverage of our interval, and of the usual one (which knows no chance level)."""
    ours = usual = total = 0.0
    tables = tables_with_weights(case.n, max(0.0, case.both), case.lost, case.won, number)
    for checked, (counts, weight) in enumerate(tables):
        inside = our_interval_holds(counts, case.truth, case.chance)
        if checked < 200:
            check_printed_interval(counts, case, inside)
        ours += weight * inside
        usual += 0.0 if case.chance else weight * wald_interval_holds(counts, case.truth)
        total += weight
    return Coverage(round(ours / total, 4), round(usual / total, 4))


def check_printed_interval(counts: Pairs, case: Design, inside: bool) -> None:
    """Assert that the test and the printed ends say the same, unless an end is the truth."""
    interval = (
        stats.above_chance_interval(counts, case.chance)
        if case.chance
        else stats.retention_interval(counts)
    )
    low, high, truth = interval.low, interval.high, case.truth
    if low is not None and high is not None and min(abs(low - truth), abs(high - truth)) > 1e-9:
        assert inside == (low <= truth <= high), (str(case), counts, interval)


def main() -> None:
    """Sum up every case."""
    ours: dict[str, float] = {}
    usual: dict[str, float] = {}
    cases = product(
        (100, 250, 1319), (0.3, 0.6, 0.9), (0.05, 0.15, 0.3), (0.5, 0.75, 1.0), (0.0, 0.25)
    )
    for number, case in enumerate(map(Design._make, cases)):
        if case.is_left_out():
            continue
        label, coverage = str(case), coverage_of(case, number)
        ours[label] = coverage.ours
        if not case.chance:
            usual[label] = coverage.usual
        print(label, ours[label], usual.get(label, ""), file=sys.stderr)
    worst, worst_usual = min(ours, key=ours.__getitem__), min(usual, key=usual.__getitem__)
    details = {
        "worst": worst,
        "the usual interval's worst": worst_usual,
        "coverage": ours,
        "usual": usual,
        "cases": len(ours),
    }
    result = figure(
        "interval-coverage",
        [ours[worst]],
        unit="coverage of a 95 % interval, the lowest",
        better="higher",
        target=0.94,
        peer="Wald interval of the paired log ratio: " + str(usual[worst_usual]),
        details=details,
    )
    write_figures(Path(__file__).stem, [result])


if __name__ == "__main__":
    main()
