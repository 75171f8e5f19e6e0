"""Ratios of rounds, by hand."""

import pytest

from harness.measuring.ratios import lower_quartile, speed_ratios, token_gaps

# one round of two visits: base is 2 s a token and 1 s a prefill, the student 1 s and 0.5 s
BASE = [[[0.0, 1.0, 3.0, 5.0], [0.0, 1.0]], [[0.0, 1.0, 3.0, 5.0]]]
STUDENT = [[[0.0, 0.5, 1.5, 2.5]], [[0.0, 0.5, 1.5, 2.5]]]


def test_a_round_is_the_bases_seconds_over_the_students():
    ratios = speed_ratios({"base": BASE, "student": STUDENT})
    assert ratios == {"prefill": (2.0,), "decode": (2.0,), "end_to_end": (2.0,)}
    assert speed_ratios({"student": STUDENT}) == {}


def test_captured_steps_count_where_there_are_some_and_the_prefill_stays():
    captured = {
        "base": [[[0.0, 9.0, 9.8, 10.6]]] * 2,  # 0.8 s a token; its own prefill does not count
        "student": [[[0.0, 9.0, 9.2, 9.4]]] * 2,
    }
    ratios = speed_ratios({"base": BASE, "student": STUDENT}, captured)
    assert ratios["prefill"] == (2.0,) and ratios["decode"] == pytest.approx((4.0,))
    assert ratios["end_to_end"] == pytest.approx(((1.0 + 1.6) / (0.5 + 0.4),))


def test_a_disturbed_run_does_not_move_the_lower_quartile():
    assert lower_quartile([1.0, 1.0, 1.0, 9.0]) == 1.0
    assert token_gaps([[0.0, 1.0, 3.0], [0.0, 5.0]]) == [2.0]
