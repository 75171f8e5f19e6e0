"""A task's figure and its standard error, from its items' numbers. No torch.

`statistics/means.py` compares two of them.
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import numpy.typing as npt

Parts = Sequence[tuple[int, float]]  # items of a part, and the weight of each of them
BITS_PER_BYTE = "bits_per_byte"  # the one figure of documents that is no exponential
_Numbers = npt.NDArray[np.float64]


def weighted_mean(values: Sequence[float], parts: Parts = ()) -> float:
    """Return the mean of values; with `parts` (items, weight of each) the weighted one."""
    if not parts:
        return math.fsum(values) / len(values)
    weights = item_weights(len(values), parts)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True))


def standard_error(values: Sequence[float], parts: Parts = ()) -> float | None:
    """Return the standard error of that mean, None of fewer than two values."""
    if len(values) < 2:
        return None
    items = np.asarray(values, dtype=np.float64)
    return math.sqrt(covariance(items, items, parts))


def item_weights(count: int, parts: Parts) -> _Numbers:
    """Return the weight of each of `count` items; they sum to 1."""
    if not parts:
        return np.full(count, 1 / count)
    return np.repeat([weight for _, weight in parts], [items for items, _ in parts])


def covariance(first: _Numbers, second: _Numbers, parts: Parts) -> float:
    """Return the covariance of two weighted means over the same items, with parts as strata.

    A part of one item has no mean of its own to deviate from: the mean of all items is taken.
    """
    weights = item_weights(len(first), parts)
    total, start = 0.0, 0
    for items, _ in parts or ((len(first), 0.0),):
        part = slice(start, start + items)
        start += items
        sample = (first[part], second[part]) if items > 1 else (first, second)
        first_mean, second_mean = (values.mean() for values in sample)
        scale = items / (items - 1) if items > 1 else 1.0
        deviations = (first[part] - first_mean) * (second[part] - second_mean)
        total += scale * float((deviations * weights[part] ** 2).sum())
    return total


def as_number(value: object) -> float | None:
    """Return an item's metric as a number; None for what is none, or NaN.

    Items of a figure that all items make together have no number of their own.
    """
    try:
        if hasattr(value, "item"):  # numpy's scalars
            number = float(value.item())
        elif isinstance(value, Real):
            number = float(value)
        else:
            return None
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if math.isnan(number) else number
