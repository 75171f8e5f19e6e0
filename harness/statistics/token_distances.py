"""Figures of distances at the tokens of several texts, with intervals over the texts.

Tokens of one text are not independent, so the texts are the units: intervals widen where texts
differ. All intervals are of 95 %, by Student's t with one degree of freedom less than texts.

Shapes: N tokens of a text.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.statistics.intervals import Interval, t_quantile

_Numbers = NDArray[np.float64]


class _Mean(NamedTuple):
    """A mean over all tokens, and the half-width of its interval; None with one text alone."""

    value: float
    half_width: float | None


def mean_interval(texts: Sequence[_Numbers]) -> Interval:
    """Return the mean over all tokens of all texts, (N,) each, with its interval.

    The ratio estimator of survey sampling (Cochran 1977, chapter 6).
    """
    mean = _mean_over_tokens(texts)
    if mean.half_width is None:
        return Interval(mean.value)
    return Interval(mean.value, mean.value - mean.half_width, mean.value + mean.half_width)


def share_interval(texts: Sequence[NDArray[np.bool_]]) -> Interval:
    """Return the share of tokens that are True; its interval ends at 0 and 1."""
    share = mean_interval([text.astype(np.float64) for text in texts])
    if share.value is None or share.low is None or share.high is None:
        return share
    return Interval(share.value, max(0.0, share.low), min(1.0, share.high))


def root_mean_square(texts: Sequence[_Numbers]) -> Interval:
    """Return the root of the mean square over all tokens, with its interval."""
    square = mean_interval([text**2 for text in texts])
    if square.value is None or square.low is None or square.high is None:
        return Interval(math.sqrt(square.value or 0.0))
    return Interval(
        math.sqrt(square.value), math.sqrt(max(0.0, square.low)), math.sqrt(square.high)
    )


def quantile_interval(texts: Sequence[_Numbers], share: float) -> Interval:
    """Return the value below which a `share` of all tokens lies, with Woodruff's interval (1952).

    It is the interval of the share of tokens below that value, read off the tokens themselves. An
    end that lies beyond all tokens is their lowest or highest value.
    """
    tokens = np.sort(np.concatenate(texts))
    value = _quantile(tokens, share)
    below = _mean_over_tokens([(text <= value).astype(np.float64) for text in texts])
    if below.half_width is None:
        return Interval(value)
    low, high = share - below.half_width, share + below.half_width
    return Interval(value, _quantile(tokens, low), _quantile(tokens, high))


def _quantile(ordered: _Numbers, share: float) -> float:
    """Return a quantile of ordered values, between neighbours in proportion."""
    return float(np.interp(share * (len(ordered) - 1), np.arange(len(ordered)), ordered))


def _mean_over_tokens(texts: Sequence[_Numbers]) -> _Mean:
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    totals = np.array([math.fsum(text) for text in texts])
    mean = float(totals.sum() / sizes.sum())
    if len(texts) < 2:
        return _Mean(mean, None)
    residuals = totals - mean * sizes
    variance = (residuals**2).sum() * len(texts) / (len(texts) - 1) / sizes.sum() ** 2
    return _Mean(mean, t_quantile(len(texts) - 1) * math.sqrt(variance))
