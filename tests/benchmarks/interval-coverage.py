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


def main() -> None:
    """Sum up every case."""
    ours: dict[str, float] = {}
    usual: dict[str, float] = {}
    cases = product(
        (100, 250, 1319), (0.3, 0.6, 0.9), (0.05, 0.15, 0.3), (0.5, 0.75, 1.0), (0.0, 0.25)
    )
    for number, (n, teacher, flips, share, chance) in enumerate(cases):
        lost, won = flips * share, flips * (1 - share)
        both, student = teacher - lost, teacher - lost + won
        if both < -1e-12 or both + lost + won > 1 + 1e-12 or student <= 1e-12:
            continue
        if (
            chance
            and (teacher - chance) / math.sqrt(teacher * (1 - teacher) / n)
            < MIN_ERRORS_ABOVE_CHANCE
        ):
            continue
        truth = (student - chance) / (teacher - chance)
        label = f"n={n} p={teacher} flips={flips} losses={share} chance={chance}"
        ours_holds = usual_holds = total = 0.0
        checked = 0
        for counts, weight in tables_with_weights(n, max(0.0, both), lost, won, number):
            inside = our_interval_holds(counts, truth, chance)
            if checked < 200:  # the test and the printed ends are the same statement
                interval = (
                    stats.above_chance_interval(counts, chance)
                    if chance
                    else stats.retention_interval(counts)
                )
                if (
                    interval.low is not None
                    and interval.high is not None
                    and min(abs(interval.low - truth), abs(interval.high - truth)) > 1e-9
                ):
                    assert inside == (interval.low <= truth <= interval.high), (
                        label,
                        counts,
                        interval,
                    )
                checked += 1
            ours_holds += weight * inside
            usual_holds += 0.0 if chance else weight * wald_interval_holds(counts, truth)
            total += weight
        ours[label] = round(ours_holds / total, 4)
        if not chance:
            usual[label] = round(usual_holds / total, 4)
        print(label, ours[label], usual.get(label, ""), file=sys.stderr)
    worst, worst_usual = (
        min(ours, key=lambda case: ours[case]),
        min(usual, key=lambda case: usual[case]),
    )
    details = {
        "worst": worst,
        "the usual interval's worst": worst_usual,
        "coverage": ours,
        "usual": usual,
        "cases": len(ours),
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "interval-coverage",
                [ours[worst]],
                unit="coverage of a 95 % interval, the lowest",
                better="higher",
                target=0.94,
                peer="Wald interval of the paired log ratio: " + str(usual[worst_usual]),
                details=details,
            ),
        ],
    )


if __name__ == "__main__":
    main()
