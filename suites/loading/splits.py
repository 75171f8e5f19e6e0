"""Holds out validation items where a task has only a training split."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")
MOST_HELD_OUT = 500


def hold_out(items: Sequence[Item], *, validation: bool) -> Sequence[Item]:
    """Return the last tenth of the training items for `validation`, else the items before it.

    At least 1 and at most `MOST_HELD_OUT` are held out: a small set keeps most of its items.
    """
    count = min(MOST_HELD_OUT, max(1, len(items) // 10))
    return items[-count:] if validation else items[:-count]
