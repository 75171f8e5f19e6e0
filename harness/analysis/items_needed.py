"""How many items would decide, and whether a task has as many. No torch."""

from typing import NamedTuple, Protocol

from harness.data.sizes import ITEMS_BY_TASK


class _ScoreSize(Protocol):
    """The task and the number of items of a score, be it of a record or of a baseline."""

    @property
    def task(self) -> str: ...
    @property
    def n(self) -> int: ...


class ItemsNeeded(NamedTuple):
    """How many items would decide, if the task has as many."""

    needed: int | None  # None: not known, or more than the task has
    task_items: int | None  # how many the task has; None: not known
    text: str  # for people; "" if nothing is known


def task_items(score: _ScoreSize, *, limited: bool) -> int | None:
    """Return how many items a score's task has, None if that is not known.

    All of them were scored, unless the run was `limited` to a sample (`--limit`) or to a subset
    (`--subset`).
    """
    if not limited:
        return score.n
    return max(score.n, ITEMS_BY_TASK[score.task]) if score.task in ITEMS_BY_TASK else None


def items_needed(
    needed: int | None, score: _ScoreSize, limited: bool, *, unit: str = "items"
) -> ItemsNeeded:
    """Return how many items would decide a score's finding, if its task has as many."""
    return items_needed_among(needed, task_items(score, limited=limited), score.task, unit=unit)


def items_needed_among(
    needed: int | None, available: int | None, name: str, *, unit: str = "items"
) -> ItemsNeeded:
    """Return the same for a task or tasks (`name`: "a", "a and b") with `available` items."""
    if needed is None:
        return ItemsNeeded(None, available, "")
    if available is not None and needed > available:
        verb, subject = ("have", "these tasks") if " and " in name else ("has", "this task")
        text = f"it would take more than {name} {verb} ({available:,}): {subject} cannot decide it"
        return ItemsNeeded(None, available, text)
    return ItemsNeeded(needed, available, f"about {needed:,} {unit} would decide")
