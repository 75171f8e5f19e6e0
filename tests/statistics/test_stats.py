"""Statistics against hand-computed numbers, laws and simulated coverage."""

import math

import numpy as np
import pytest

from harness.statistics import stats
from harness.statistics.stats import Pairs


def outcomes(counts):
    return (
        "1" * counts.both
        + "1" * counts.teacher_only
        + "0" * counts.student_only
        + "0" * counts.neither,
        "1" * counts.both
        + "0" * counts.teacher_only
        + "1" * counts.student_only
        + "0" * counts.neither,
    )


def test_pairs_are_counted():
    assert stats.count_pairs("1100", "1010") == Pairs(1, 1, 1, 1)
    with pytest.raises(ValueError, match="not the same items"):
        stats.count_pairs("11", "1")


def test_retention_by_hand():
    # a 700, b 100, c 50, d 150: R = 750/800; SE(ln R) = sqrt(150 / (800 * 750)) = .0158: the log
    # ratio's interval is near at this n
    interval = stats.retention_interval(Pairs(700, 100, 50, 150))
    assert interval.value == pytest.approx(0.9375)
    spread = 1.959964 * math.sqrt(150 / (800 * 750))
    assert interval.low == pytest.approx(0.9375 * math.exp(-spread), abs=2e-3)
    assert interval.high == pytest.approx(0.9375 * math.exp(spread), abs=2e-3)


@pytest.mark.parametrize("chance", [0.0, 0.25])
@pytest.mark.parametrize(
    "cells", [(70, 10, 5, 15), (60, 3, 0, 37), (60, 0, 3, 37), (98, 2, 0, 0), (40, 30, 12, 18)]
)
def test_ends_of_ratios_agree_with_an_independent_score_test(cells, chance):
    """Scipy maximises the restricted likelihood over the simplex: no formula is shared with ours.

    Both ends lie at z = 1.96.
    """
    from scipy.optimize import minimize

    n, counts = sum(cells), Pairs(*cells)
    interval = (
        stats.above_chance_interval(counts, chance) if chance else stats.retention_interval(counts)
    )

    def statistic(ratio):
        values = np.array(
            [
                (1 - chance) - ratio * (1 - chance),
                -chance - ratio * (1 - chance),
                1 - chance + ratio * chance,
                -chance + ratio * chance,
            ]
        )  # fmt: skip  (S - g) - R (T - g)
        data = np.array(cells) / n

        def loss(p):
            return -float(np.sum(data[data > 0] * np.log(np.maximum(p[data > 0], 1e-300))))

        fitted = minimize(
            loss,
            np.full(4, 0.25),
            bounds=[(1e-12, 1)] * 4,
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-15},
            constraints=[
                {"type": "eq", "fun": lambda p: p.sum() - 1},
                {"type": "eq", "fun": lambda p: float(p @ values)},
            ],
        )
        return float(data @ values) / math.sqrt(float(fitted.x @ values**2) / n)

    assert statistic(interval.low) == pytest.approx(1.96, abs=0.01)
    assert statistic(interval.high) == pytest.approx(-1.96, abs=0.01)
    assert interval.low < interval.value < interval.high


def test_a_model_retains_exactly_all_of_itself():
    # no flip among 1,000 items leaves room for a few among all items
    same = stats.retention_interval(Pairs(600, 0, 0, 400))
    assert same.value == 1.0 and 0.992 < same.low < 0.996 and 1.004 < same.high < 1.008
    assert stats.difference_interval(Pairs(60, 0, 0, 40)).value == 0.0
    assert stats.above_chance_interval(Pairs(60, 0, 0, 40), 0.25).value == pytest.approx(1.0)


def test_above_chance_by_hand():
    # teacher 45 %, student 40 % on four choices: plain retention 89 %, above chance 75 %
    counts = Pairs(300, 150, 100, 450)
    assert stats.retention_interval(counts).value == pytest.approx(0.888889, abs=1e-6)
    interval = stats.above_chance_interval(counts, 0.25)
    assert interval.value == pytest.approx(0.75)
    # delta method, near at this n: v_S = .24, v_T = .2475, cov = .3 - .18 = .12, R = .75
    spread = 1.959964 * math.sqrt((0.24 - 2 * 0.75 * 0.12 + 0.75**2 * 0.2475) / 1000) / 0.2
    assert interval.low == pytest.approx(0.75 - spread, abs=6e-3)


def test_ratios_to_a_teacher_without_skill_are_undefined():
    assert stats.retention_interval(Pairs(0, 0, 3, 97)).value is None
    assert "chance" in stats.above_chance_interval(Pairs(20, 6, 5, 69), 0.25).reason


def test_a_student_that_solves_nothing_has_an_upper_limit():
    interval = stats.retention_interval(Pairs(0, 80, 0, 20))
    assert (interval.value, interval.low) == (0.0, 0.0)
    assert 0 < interval.high < 0.06


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [(Pairs(43, 1, 0, 0), -0.118, 0.0590), (Pairs(0, 9, 3, 32), -0.2834, 0.0154)],
)
def test_difference_agrees_with_an_independent_tango_interval(counts, low, high):
    """Return the score interval by a grid search, which shares no formula with ours."""
    n, b, c = counts.n, counts.teacher_only, counts.student_only

    def statistic(delta):
        grid = np.linspace(max(0.0, -delta) + 1e-9, min(1.0, 1.0 - max(0.0, delta)) - 1e-9, 200_001)
        losses = grid  # P(teacher only); P(student only) = losses + delta
        gains = losses + delta
        rest = 1 - losses - gains
        valid = (gains > 0) & (rest > 0) & (losses > 0)
        likelihood = np.where(
            valid,
            b * np.log(np.where(valid, losses, 1))
            + c * np.log(np.where(valid, gains, 1))
            + (n - b - c) * np.log(np.where(valid, rest, 1)),
            -np.inf,
        )
        best = losses[int(np.argmax(likelihood))]
        variance = n * (2 * best + delta - delta**2)
        return (c - b - n * delta) / math.sqrt(max(variance, 1e-12))

    interval = stats.difference_interval(counts)
    assert interval.value == pytest.approx((c - b) / n)
    assert abs(statistic(interval.low)) == pytest.approx(1.96, abs=0.02)
    assert abs(statistic(interval.high)) == pytest.approx(1.96, abs=0.02)
    assert interval.low < interval.value < interval.high


def simulate(trials, n, teacher, retention, flips, seed):
    """Draw paired outcomes with a given retention and share of flips."""
    draw = np.random.default_rng(seed)
    drop = teacher * (1 - retention)
    b, c = (flips + drop) / 2, (flips - drop) / 2
    return draw.multinomial(n, [teacher - b, b, c, 1 - teacher - c], size=trials)


@pytest.mark.slow
def test_retention_interval_covers_the_truth():
    interval = [
        stats.retention_interval(Pairs(*map(int, row)))
        for row in simulate(2000, 250, 0.75, 0.95, 0.10, 1)
    ]
    share = sum(value.low <= 0.95 <= value.high for value in interval) / len(interval)
    assert 0.935 <= share <= 0.97


@pytest.mark.slow
def test_above_chance_interval_covers_the_truth():
    interval = [
        stats.above_chance_interval(Pairs(*map(int, row)), 0.25)
        for row in simulate(2000, 1000, 0.75, 0.95, 0.10, 2)
    ]
    truth = (0.75 * 0.95 - 0.25) / 0.5
    assert (
        0.935 <= sum(value.low <= truth <= value.high for value in interval) / len(interval) <= 0.97
    )


@pytest.mark.slow
def test_difference_interval_covers_the_truth():
    interval = [
        stats.difference_interval(Pairs(*map(int, row)))
        for row in simulate(1000, 250, 0.75, 0.95, 0.10, 3)
    ]
    assert (
        0.93
        <= sum(value.low <= -0.0375 <= value.high for value in interval) / len(interval)
        <= 0.97
    )


def test_the_score_statistic_has_no_holes():
    """Newton's first step once landed beside a pole at R = 2/3 of these counts, and read 0."""
    counts = Pairs(80, 10, 0, 10)
    for ratio in (0.6 / 0.9, 2 / 3, 0.66666667, 0.6666):
        assert stats.score_z(counts, stats.ratio_weights(ratio, 0.0)) == pytest.approx(
            4.472, abs=2e-3
        )
    from scipy.optimize import brentq

    draw = np.random.default_rng(5)
    compared = 0
    for _ in range(400):
        cells = draw.multinomial(draw.integers(5, 400), draw.dirichlet([0.6] * 4))
        for ratio, chance in (
            (draw.uniform(0.05, 1.6), 0.0),
            (draw.integers(1, 13) / 9, 0.0),
            (draw.uniform(0.05, 1.6), 0.25),
        ):
            weights = np.array(stats.ratio_weights(float(ratio), chance))
            seen = weights[cells > 0]
            if not (seen.min() == weights.min() < 0 < weights.max() == seen.max()):
                continue  # an end without items: the other branch, tested by hand above
            ends = -1 / weights.max(), -1 / weights.min()
            root = brentq(
                lambda at, w=weights, c=cells: float(np.sum(c * w / (1 + at * w))),
                ends[0] * (1 - 1e-12),
                ends[1] * (1 - 1e-12),
                xtol=1e-14,
                rtol=1e-14,
                maxiter=500,
            )
            shares = cells / (cells.sum() * (1 + root * weights))
            expected = (
                float(cells @ weights)
                / cells.sum()
                / math.sqrt(float(shares @ weights**2) / cells.sum())
            )
            assert stats.score_z(
                Pairs(*map(int, cells)), tuple(map(float, weights))
            ) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            compared += 1
    assert compared > 300


def test_mcnemar_is_the_binomial_tail():
    assert stats.mcnemar(0, 0) == 1.0 and stats.mcnemar(0, 7) == 1.0
    # P(X >= 8) of ten fair throws
    assert stats.mcnemar(8, 2) == pytest.approx((45 + 10 + 1) / 2**10)
    assert stats.mcnemar(5, 5) == pytest.approx(638 / 1024)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == [] and stats.holm([0.6, 0.9]) == [1.0, 1.0]


def test_a_students_claim_is_judged_at_its_margin():
    """The score statistic of R = 0.95 by hand.

    The estimate is (750 - .95 * 800) / 1000, the restricted variance R (p10 + p01).
    """
    met, unmet = stats.retention_test(*outcomes_lists(Pairs(740, 60, 55, 145)), 0.95)
    assert met < 0.01 and unmet > 0.99
    met, unmet = stats.retention_test(*outcomes_lists(Pairs(600, 200, 20, 180)), 0.95)
    assert met > 0.99 and unmet < 0.01
    # exactly at the margin: 760 of 800
    at, _ = stats.retention_test(*outcomes_lists(Pairs(710, 90, 50, 150)), 0.95)
    assert at == pytest.approx(0.5)
    # a loss of 4 points exactly
    points, _ = stats.retention_test(*outcomes_lists(Pairs(710, 90, 50, 150)), 0.04, points=True)
    assert points == pytest.approx(0.5)


def test_several_runs_and_one_agree_on_a_claim():
    student, teacher = outcomes_lists(Pairs(700, 100, 70, 130))
    value, _ = stats.retention_test(student, teacher, 0.95)
    # the same run twice: no spread between runs
    several, _ = stats.retention_test(student * 2, teacher, 0.95)
    assert several == pytest.approx(value, abs=0.03)
    above, _ = stats.retention_test(student, teacher, 0.95, chance=0.25)
    assert above > value and stats.retention_test(student * 2, teacher, 0.95, chance=0.25)[
        0
    ] == pytest.approx(above, abs=0.03)


def test_two_rows_are_unequal_where_the_interval_of_their_difference_misses_zero():
    for counts in (
        Pairs(600, 90, 60, 250),
        Pairs(600, 85, 60, 255),
        Pairs(100, 9, 0, 20),
        Pairs(100, 3, 3, 20),
    ):
        teacher, student = outcomes(counts)
        gap = stats.difference_interval(counts)
        assert (stats.equality_test([student], [teacher]) < 0.05) == (not gap.low <= 0 <= gap.high)


def outcomes_lists(counts):
    teacher, student = outcomes(counts)
    return [student], [teacher]


def test_items_that_would_decide():
    # evaluation reference, one-sided .05, power .8: flips 10 %, a drop of 2 points takes 1,544
    # items
    assert stats.items_to_detect(0.10, 0.02, alpha=0.05) == 1544
    assert stats.items_to_detect(0.20, 0.05, alpha=0.05) == 493
    # z = 1.2816 at 500: (1.6449 + .8416)^2 / 1.2816^2 times as many
    n = stats.items_to_decide(0.1, 500, alpha=0.05)
    assert n == pytest.approx(500 * (2.4865 / 1.28155) ** 2, abs=1)
    assert stats.items_to_decide(0.5, 500, alpha=0.05) is None


def test_smallest_drop_agrees_with_the_published_table():
    # evaluation reference: n 1,319, flips 10 %: 2.2 points; n 250, flips 20 %: 7.0 points
    assert 100 * stats.detectable_drop(1319, 0.10) == pytest.approx(2.2, abs=0.05)
    assert 100 * stats.detectable_drop(250, 0.20) == pytest.approx(7.0, abs=0.05)


def test_items_that_show_a_ratio_have_the_power_that_was_asked_for():
    """Log ratios of documents with spread .1 each: the test at n items rejects in 80 % of draws."""
    rng, loss = np.random.default_rng(3), 0.02
    n = stats.items_to_detect_ratio(50, 0.1**2 / 50, loss)
    draws = math.log1p(loss) + rng.normal(0, 0.1, (4_000, n))
    z = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    assert 0.77 <= (z > 1.6449).mean() <= 0.83
