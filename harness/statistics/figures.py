"""A task's figure and its standard error, from its items' numbers. What compares two of them stands
in `statistics/means.py`. No torch.
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
    """Return each item's weight; they sum to 1."""
    if not parts:
        return np.full(count, 1 / count)
    return np.repeat([weight for _, weight in parts], [items for items, _ in parts])


def covariance(left: _Numbers, right: _Numbers, parts: Parts) -> float:
    """Return the covariance of two weighted means over the same items, parts as strata; a part of
    one item strays from the mean of all.
    """
    weights = item_weights(len(left), parts)
    total, start = 0.0, 0
    for items, _ in parts or ((len(left), 0.0),):
        part = slice(start, start + items)
        start += items
        here = (left[part], right[part], weights[part])
        middles = [side.mean() for side in here[:2]] if items > 1 else [left.mean(), right.mean()]
        scale = items / (items - 1) if items > 1 else 1.0
        total += scale * float(
            ((here[0] - middles[0]) * (here[1] - middles[1]) * here[2] ** 2).sum()
        )
    return total


def as_number(value: object) -> float | None:
    """Return what a metric gave an item as a number, None for parts of a figure of all items
    together and for what is no number.
    """
    try:
        # numpy's have item()
        found = (
            float(value.item())
            if hasattr(value, "item")
            else float(value)
            if isinstance(value, Real)
            else None
        )
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found == found else None
