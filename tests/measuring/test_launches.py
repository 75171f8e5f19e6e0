"""The share of time in which a GPU works, from spans and runs that are written by hand."""

import pytest

from harness.measuring.launches import busy_shares, covered


def test_overlapping_kernels_count_once():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5  # 0 to 3 and 5 to 7
    assert covered([(0, 10), (2, 3), (9, 12)]) == 12


def test_shares_are_the_gpus_seconds_over_those_that_pass():
    # a prefill of 4 ms and two steps of 3 ms; the GPU works 3 ms, then 1 ms a step
    busy = {1: 0.003, 3: 0.005}
    shares = busy_shares(busy.__getitem__, lambda tokens: [10.0, 10.004, 10.007, 10.010], 3)
    assert shares == {"prefill": pytest.approx(0.75), "decode": pytest.approx(2 / 6)}
    # clocks of two kinds: never above the whole
    assert busy_shares(lambda _: 9.0, lambda _: [0.0, 1.0, 2.0], 2)["prefill"] == 1.0


def test_a_driver_that_reports_no_kernels_gives_no_share():
    shares = busy_shares(lambda tokens: None, lambda tokens: pytest.fail("ran for nothing"), 3)
    assert shares == {"prefill": None, "decode": None}
