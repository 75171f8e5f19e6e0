"""Distances at the tokens of texts: by hand, and the coverage of their intervals by simulation."""

import math

import numpy as np
import pytest

from harness.statistics.token_distances import (
    mean_interval,
    quantile_interval,
    root_mean_square,
    share_interval,
)

TEXTS = [np.array([1.0, 3.0]), np.array([2.0, 2.0, 5.0]), np.array([4.0])]


def test_the_mean_and_its_interval_are_the_ratio_estimators_by_hand():
    """Totals 4, 9, 4 over sizes 2, 3, 1: mean 17/6; residuals -5/3, 1/2, 7/6."""
    mean = mean_interval(TEXTS)
    variance = ((5 / 3) ** 2 + (1 / 2) ** 2 + (7 / 6) ** 2) * 3 / 2 / 36
    half_width = 4.302652729911275 * math.sqrt(variance)  # Student's t with 2 degrees of freedom
    assert mean.value == pytest.approx(17 / 6)
    assert mean.high - mean.value == pytest.approx(half_width)
    assert mean.value - mean.low == pytest.approx(half_width)


def test_quantiles_are_numpys_and_inside_their_intervals():
    tokens = np.concatenate(TEXTS)
    for share in (0.5, 0.9, 0.99):
        interval = quantile_interval(TEXTS, share)
        assert interval.value == pytest.approx(np.quantile(tokens, share))
        assert tokens.min() <= interval.low <= interval.value <= interval.high <= tokens.max()


def test_a_root_mean_square_and_a_share_keep_their_bounds():
    change = root_mean_square([np.array([0.3, -0.4]), np.array([0.0, 0.0])])
    assert change.value == pytest.approx(0.25) and change.low >= 0
    share = share_interval([np.array([True, True]), np.array([True, True, False])])
    assert share.value == pytest.approx(0.8) and share.low >= 0 and share.high <= 1
    assert share_interval([np.array([True])] * 3).low == 1.0


def test_one_text_has_no_interval():
    [text, *_] = TEXTS
    for interval in (
        mean_interval([text]),
        quantile_interval([text], 0.9),
        root_mean_square([text]),
        share_interval([text > 1]),
    ):
        assert interval.value is not None and interval.low is None and interval.high is None


def texts_of(rng, count):
    """Texts of 40 to 200 tokens whose levels differ: tokens of one text are alike."""
    return [
        np.exp(rng.normal(-4, 1.2, rng.integers(40, 200)) + rng.normal(0, 0.5))
        for _ in range(count)
    ]


@pytest.mark.parametrize("texts", [12, 32])
def test_intervals_cover_the_truth_where_texts_differ(texts):
    """95 % intervals of 400 draws; intervals over tokens alone would cover about half of them."""
    rng = np.random.default_rng(5)
    everything = np.sort(np.concatenate(texts_of(rng, 20_000)))
    truth = {"mean": everything.mean(), 0.5: np.median(everything), 0.9: None}
    truth[0.9] = np.quantile(everything, 0.9)
    covered, covered_alone = dict.fromkeys(truth, 0), 0
    for _ in range(400):
        drawn = texts_of(rng, texts)
        for name, value in truth.items():
            interval = mean_interval(drawn) if name == "mean" else quantile_interval(drawn, name)
            covered[name] += interval.low <= value <= interval.high
        tokens = np.concatenate(drawn)
        half_width = 1.96 * tokens.std() / math.sqrt(len(tokens))
        covered_alone += abs(tokens.mean() - truth["mean"]) <= half_width
    assert all(0.90 <= count / 400 <= 0.99 for count in covered.values()), covered
    assert covered_alone / 400 < 0.75
