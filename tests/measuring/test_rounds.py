"""Rounds that end by a rule: what is typed, when it stops, how often its intervals hold."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from harness.errors import HarnessError
from harness.measuring.rounds import HALF_WIDTH, RoundsRule, rounds_on
from harness.statistics.intervals import ratio_after_looks, ratio_of_rounds


def test_a_number_is_fixed_and_keeps_the_interval_that_it_had():
    rule = RoundsRule.parse("6")
    assert rule == RoundsRule.parse(6) and rule.is_fixed and rule.most == rule.expected == 6
    ratios = [1.1, 1.2, 1.3, 1.15, 1.22, 1.19]
    # however narrow they are, all rounds are taken
    assert [rule.is_enough(count, [[1.0] * count]) for count in range(1, 7)] == [False] * 5 + [True]
    assert rule.interval(ratios, spread=0.015) == ratio_of_rounds(ratios, spread=0.015)


@pytest.mark.parametrize(
    ("spelled", "looks", "half_width"),
    [
        ("auto", (4, 6, 8, 12), HALF_WIDTH),
        ("AUTO", (4, 6, 8, 12), HALF_WIDTH),
        ("auto:0.01", (4, 6, 8, 12), 0.01),
        ("auto:.005:3-40", (3, 7, 17, 40), 0.005),
        ("auto:0.01:5-5", (5,), 0.01),
    ],
)
def test_a_rule_is_typed_as_one_word(spelled, looks, half_width):
    rule = RoundsRule.parse(spelled)
    assert (rule.looks, rule.half_width, rule.is_fixed) == (looks, half_width, False)


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("0", "at least one round"),
        (-3, "at least one round"),
        ("many", "is no number of rounds: write a number of rounds, or auto"),
        ("auto:1", "is no number of rounds"),
        ("auto:0.01:9", "is no number of rounds"),
        ("auto:0.00", "the half-width is above 0"),
        ("auto:0.01:2-9", "the least number of rounds is 3"),
        ("auto:0.01:9-5", "no more than the most"),
    ],
)
def test_what_is_no_rule_is_said_with_what_to_type(spelled, said):
    with pytest.raises(HarnessError, match=said):
        RoundsRule.parse(spelled)


def test_the_default_is_that_of_the_device():
    assert rounds_on("cpu", None) == 6 and rounds_on("cuda:0", None) == "auto"
    assert rounds_on("cuda", "6") == rounds_on("cpu", 6) == 6
    assert rounds_on("cpu", "auto:0.01") == "auto:0.01"


def test_it_stops_at_the_first_look_at_which_every_quantity_is_narrow():
    rule = RoundsRule.parse("auto:0.02:4-12")
    still, noisy = [1.0, 1.001] * 6, [1.0, 1.2] * 6
    assert not rule.is_enough(3, [still[:3]])
    assert rule.is_enough(4, [still[:4]])
    assert not rule.is_enough(5, [still[:5]])  # no look
    assert not rule.is_enough(4, [still[:4], noisy[:4]])
    assert not rule.is_enough(8, [noisy[:8]]) and rule.is_enough(12, [noisy])
    # nothing to compare with: there is no interval to wait for
    assert rule.is_enough(4, [])


def test_an_interval_after_looks_by_hand():
    # logarithms 0, 0.02, 0.04, 0.06: mean 0.03, deviation 0.025820, error 0.012910; four looks
    # spend 3 %, so each has Student's t of 3 degrees of freedom at 0.375 % on either side
    ratios = [math.exp(log) for log in (0.0, 0.02, 0.04, 0.06)]
    interval = ratio_after_looks(ratios, looks=4)
    half = math.log(interval.high / interval.value)
    assert interval.value == pytest.approx(math.exp(0.03))
    assert half == pytest.approx(0.0129099 * student_t.ppf(1 - 0.00375, 3), rel=1e-5)
    assert math.log(interval.value / interval.low) == pytest.approx(half)
    # what no round can show widens both ends in quadrature
    wide = ratio_after_looks(ratios, looks=4, spread=0.015)
    assert math.log(wide.high / wide.value) == pytest.approx(math.hypot(half, 1.959964 * 0.015))
    assert ratio_after_looks([1.0, 1.1], looks=4).low is None


@pytest.mark.parametrize("width", [0.004, 0.02, 0.06])
def test_intervals_of_rounds_that_a_rule_ended_hold_the_truth(width):
    rule = RoundsRule.parse("auto")
    random = np.random.default_rng(7)
    covered = stopped = 0
    for _ in range(300):
        ratios = np.exp(0.05 + width * random.standard_normal(rule.most)).tolist()
        count = next(n for n in range(1, rule.most + 1) if rule.is_enough(n, [ratios[:n]]))
        interval = rule.interval(ratios[:count], spread=0.0)
        covered += interval.low <= math.exp(0.05) <= interval.high
        stopped += count < rule.most
    assert covered / 300 >= 0.94
    assert stopped == 300 if width == 0.004 else stopped == 0 if width == 0.06 else stopped > 0
