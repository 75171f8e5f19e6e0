"""Coverage of intervals whose rounds end by the rule: how often they hold the true ratio.

Rounds are drawn, never measured: a round is four visits (base, student, student, base) to a machine
that has noise of several kinds, that drifts, and that others use in bursts. The rule stops as in a
timing (`--rounds auto`); what starting processes adds (`START_SPREAD`) is left out, since it only
widens. Beside it, as the peer: plain 95 % intervals of Student's t, looked at as often.

python tests/benchmarks/timing-rounds.py [DRAWS]
"""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _form import figure, write_figures

from harness.measuring.rounds import AUTO, RoundsRule
from harness.statistics.intervals import t_quantile, tail_of_looks

DRAWS = 20_000
CHECKED = 200  # draws of each case that the product's own rule is asked about too
TODAY = 6  # fixed rounds of a run
Numbers = npt.NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, int]], Numbers]


def normal(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    """Return noise of one standard deviation."""
    return random.standard_normal(shape)


def skewed(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    """Return log-normal noise of one standard deviation around 0 (skewness 1.75)."""
    sigma = 0.5
    mean, deviation = math.exp(sigma**2 / 2), math.sqrt(math.expm1(sigma**2) * math.exp(sigma**2))
    return (np.exp(sigma * random.standard_normal(shape)) - mean) / deviation


def heavy(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    """Return Student's t with 3 degrees of freedom, of one standard deviation."""
    return random.standard_t(3, shape) / math.sqrt(3)


def spiked(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    """Return normal noise of which each tenth value is ten times as wide."""
    return random.standard_normal(shape) * np.where(random.random(shape) < 0.1, 10.0, 1.0)


def correlated(share: float) -> Noise:
    """Return noise in which a round keeps `share` of the one before (autoregression)."""

    def draw(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
        values = random.standard_normal(shape)
        for number in range(1, shape[1]):
            fresh = math.sqrt(1 - share**2) * values[:, number]
            values[:, number] = share * values[:, number - 1] + fresh
        return values

    return draw


def of_rounds(noise: Noise, width: float) -> Callable[[np.random.Generator, int, int], Numbers]:
    """Return logarithms of ratios, one a round, with noise of a width."""
    return lambda random, draws, rounds: width * noise(random, (draws, rounds))


def of_visits(
    slowdown: Callable[[np.random.Generator, int, int], Numbers], width: float = 0.01
) -> Callable[[np.random.Generator, int, int], Numbers]:
    """Return logarithms of ratios of visits to a machine whose slowdown differs by the visit."""

    def draw(random: np.random.Generator, draws: int, rounds: int) -> Numbers:
        shape = (draws, 4 * rounds)
        seconds = slowdown(random, draws, 4 * rounds) * np.exp(
            width * random.standard_normal(shape)
        )
        base, first, second, last = np.moveaxis(seconds.reshape(draws, rounds, 4), 2, 0)
        return np.log((base + last) / (first + second))

    return draw


def drifting(most: float) -> Callable[[np.random.Generator, int, int], Numbers]:
    """Return a machine that becomes slower by up to `most` a visit, in a straight line."""
    return lambda random, draws, visits: (
        1 + most * random.random((draws, 1)) * np.arange(visits)[None, :]
    )


def cooling(random: np.random.Generator, draws: int, visits: int) -> Numbers:
    """Return a machine that is a tenth slower at first, and less so with each visit."""
    pace = random.uniform(2, 30, (draws, 1))
    return 1 + 0.1 * np.exp(-np.arange(visits)[None, :] / pace)


def used_in_bursts(random: np.random.Generator, draws: int, visits: int) -> Numbers:
    """Return a machine that others slow by three tenths, in bursts of some visits."""
    busy = np.empty((draws, visits), dtype=bool)
    busy[:, 0] = random.random(draws) < 0.5
    for visit in range(1, visits):
        changes = random.random(draws) < 0.3
        busy[:, visit] = busy[:, visit - 1] ^ changes
    return np.where(busy, 1.3, 1.0)


CASES: Mapping[str, Callable[[np.random.Generator, int, int], Numbers]] = {
    **{f"normal, {width:.1%}": of_rounds(normal, width) for width in (0.003, 0.01, 0.02, 0.05)},
    **{f"log-normal, {width:.1%}": of_rounds(skewed, width) for width in (0.003, 0.01, 0.02, 0.05)},
    **{f"heavy tails, {width:.1%}": of_rounds(heavy, width) for width in (0.003, 0.01, 0.02, 0.05)},
    **{f"spikes, {width:.1%}": of_rounds(spiked, width) for width in (0.003, 0.01)},
    **{
        f"a round keeps {share:.0%} of the last, {width:.1%}": of_rounds(correlated(share), width)
        for share in (0.1, 0.2, 0.3)
        for width in (0.01, 0.02, 0.05)
    },
    "drift to 0.5 % a visit": of_visits(drifting(0.005)),
    "drift to 2 % a visit": of_visits(drifting(0.02)),
    "cooling": of_visits(cooling),
    "bursts": of_visits(used_in_bursts),
}


def outcomes(logs: Numbers, rule: RoundsRule, tail: float) -> tuple[Numbers, Numbers, Numbers]:
    """Return rounds, half-width and distance from the truth (0) of each draw, where it stops.

    An interval has Student's t with `tail` on either side.
    """
    rounds, half_widths, means = (np.zeros(len(logs)) for _ in range(3))
    open_draws = np.ones(len(logs), dtype=bool)
    for count in rule.looks:
        values = logs[:, :count]
        error = values.std(axis=1, ddof=1) / math.sqrt(count)
        half = t_quantile(count - 1, tail) * error
        assert rule.half_width is not None
        stops = open_draws & (np.expm1(half) <= rule.half_width) | (
            open_draws & (count == rule.most)
        )
        rounds[stops], half_widths[stops] = count, half[stops]
        means[stops] = values.mean(axis=1)[stops]
        open_draws &= ~stops
    return rounds, half_widths, means


def check_product(logs: Numbers, rule: RoundsRule, rounds: Numbers, holds: Numbers) -> None:
    """Assert that the product's rule and interval say the same of the first draws."""
    for row, count, inside in zip(logs[:CHECKED], rounds, holds, strict=False):
        ratios = np.exp(row).tolist()
        stop = next(n for n in range(1, rule.most + 1) if rule.is_enough(n, [ratios[:n]]))
        interval = rule.interval(ratios[:stop], spread=0.0)
        assert interval.low is not None and interval.high is not None
        assert stop == count and (interval.low <= 1 <= interval.high) == bool(inside), (row, stop)


def main() -> None:
    """Draw every case and write how often the intervals hold the truth."""
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else DRAWS
    rule = RoundsRule.parse(AUTO)
    coverage, plain, mean_rounds, widths = ({}, {}, {}, {})
    for number, (name, draw) in enumerate(CASES.items()):
        logs = draw(np.random.default_rng(number), draws, rule.most)
        rounds, half_widths, means = outcomes(logs, rule, tail_of_looks(len(rule.looks)))
        holds = np.abs(means) <= half_widths
        check_product(logs, rule, rounds, holds)
        coverage[name] = round(float(holds.mean()), 4)
        mean_rounds[name] = round(float(rounds.mean()), 2)
        widths[name] = round(float(np.median(half_widths)), 4)
        _, plain_widths, plain_means = outcomes(logs, rule, 0.025)
        plain[name] = round(float((np.abs(plain_means) <= plain_widths).mean()), 4)
        print(
            f"{name}: {coverage[name]}, plain {plain[name]}, {mean_rounds[name]} rounds, "
            f"+- {widths[name]:.2%}",
            flush=True,
        )
    worst, worst_plain = (min(of, key=of.__getitem__) for of in (coverage, plain))
    quiet = [mean_rounds[name] for name in mean_rounds if name.endswith("0.3%")]
    details = {
        "worst": worst,
        "rule": f"looks after {rule.looks}, half-width {rule.half_width}",
        "draws of each case": draws,
        "coverage": coverage,
        "coverage of plain intervals": plain,
        "mean rounds": mean_rounds,
        "median half-width": widths,
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "timing-rounds:coverage",
                [coverage[worst]],
                unit="coverage of a 95 % interval, the lowest",
                better="higher",
                target=0.94,
                peer=f"plain 95 % intervals looked at as often: {plain[worst_plain]} "
                f"({worst_plain})",
                details=details,
            ),
            figure(
                "timing-rounds:rounds",
                [float(np.mean(quiet))],
                unit=f"rounds at a noise of 0.3 % (fixed: {TODAY}, the most: {rule.most})",
                better="lower",
                target=TODAY,
            ),
        ],
    )


if __name__ == "__main__":
    main()
