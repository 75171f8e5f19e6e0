"""Intervals of one figure alone, against numbers worked out by hand and by other code."""

import math

import pytest
from made_records import make

from harness.analysis.single import score_interval


def first_score(**changes):
    return make("row", **changes).scores[0]


def test_hits_have_wilsons_interval():
    score = first_score().model_copy(
        update={"outcomes": {"strict-match": "1" * 8 + "0" * 2}, "n": 10, "value": 0.8}
    )
    interval = score_interval(score)
    # (p + z2/2n -+ z sqrt(p q/n + z2/4n2)) / (1 + z2/n) with p = 0.8, n = 10, z = 1.959964
    z2 = 1.959964**2
    middle, half = 0.8 + z2 / 20, math.sqrt(z2 * (0.016 + z2 / 400))
    assert interval.value == 0.8
    assert interval.low == pytest.approx((middle - half) / (1 + z2 / 10), abs=1e-5)
    assert interval.high == pytest.approx((middle + half) / (1 + z2 / 10), abs=1e-5)
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.490, 0.943)


def test_a_perplexity_has_the_interval_of_its_logarithm():
    totals = ((-20.0, 10.0), (-33.0, 12.0), (-18.0, 8.0), (-27.0, 11.0))
    score = first_score().model_copy(
        update={
            "kind": "perplexity",
            "totals": totals,
            "outcomes": {},
            "n": 4,
            "value": math.exp(98 / 41),
        }
    )
    interval = score_interval(score)
    assert interval.value == pytest.approx(math.exp(98 / 41))
    assert interval.low < interval.value < interval.high
    assert interval.low * interval.high == pytest.approx(interval.value**2)


def test_numbers_have_students_interval_and_figures_of_all_items_none():
    numbers = first_score().model_copy(
        update={"values": {"strict-match": tuple(float(n % 7) for n in range(200))}, "n": 200}
    )
    interval = score_interval(numbers)
    mean = sum(n % 7 for n in range(200)) / 200
    spread = math.sqrt(sum((n % 7 - mean) ** 2 for n in range(200)) / 199 / 200)
    assert interval.value == pytest.approx(mean)
    assert interval.high - mean == pytest.approx(1.972 * spread, rel=0.03)  # t of 199
    pooled = first_score().model_copy(update={"form": "f1", "statistics": ("1 1",), "value": 0.5})
    assert (score_interval(pooled).low, score_interval(pooled).value) == (None, 0.5)
