"""What users give a check, parsed: margins, weights of tasks, records of a place."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.records.record import RunRecord


def parse_margin(text: str | None) -> tuple[float | None, bool]:
    """Read `0.95` or `95%` as a share to keep, `2points` as points that may be lost; (None, False)
    of None.
    """
    if text is None:
        return None, False
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|points?|pp|pt)?\s*", text)
    value, unit = (float(match[1]), match[2] or "") if match else (-1.0, "")
    points = unit not in ("", "%")
    share = value / 100 if unit else value
    if match and not points and share == 1:
        raise HarnessError(
            f"--margin {text}: that a student keeps all of it can be shown by no number of items, "
            "unless it is better than its teacher; "
            "say how much less would do: 0.95, 95% or 2points"
        )
    if not 0 < share < 1 or (unit == "%" and value < 1):
        near = (
            f" ({value:g}%?)"
            if match and not unit and 1 < value < 100
            else f" ({value:g}?)"
            if unit == "%" and 0 < value < 1
            else ""
        )
        raise HarnessError(
            f"--margin {text}: give the share that must be kept, between 0 and 1 (0.95 or "
            f"95%){near}, or what may be lost (2points)"
        )
    return share, points


def parse_task_weights(text: str | None) -> str | tuple[tuple[str, float], ...]:
    """Read `items`, `tasks` or `mmlu=2,gsm8k=1`: how tasks count in the pooled decision; `items` of
    None.
    """
    if text is None or text.strip() in ("items", "tasks"):
        return (text or "items").strip()
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or not 0 < weight < math.inf or name in weights:
            raise HarnessError(
                f"--task-weights {text}: give items, tasks, or a weight above 0 for each task once "
                f"(mmlu=2,gsm8k=1), not {part.strip()!r}"
            )
        weights[name] = weight
    return tuple(weights.items())


def parse_decide(text: str | None) -> Literal["tasks", "pooled"]:
    """Read `tasks` or `pooled`; `tasks` of None."""
    if text in (None, "tasks"):
        return "tasks"
    if text == "pooled":
        return "pooled"
    raise HarnessError(
        f"--decide {text}: give tasks, or pooled (a pool that passed settles what single tasks "
        "cannot tell)"
    )


def percent_of(name: str, value: float) -> float:
    """Read an option that is given in points."""
    if not (0 if name == "tolerance" else 1e-9) <= value <= 100:
        raise HarnessError(f"--{name} {value:g}: give points between 0 and 100")
    return value / 100


def records_of(place: Path) -> "list[RunRecord]":
    """Read the records of a place, of a store those of its newest run.

    A file that is no whole record, a run that lacks cells, and two records of one row and seed are
    mistakes: a check passes over nothing.
    """
    from harness.records.store import duplicate_row, newest_run, read_records

    place = newest_run(place)
    records, problems = read_records(place)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise HarnessError(f"{problems[0]}{more}")
    if double := duplicate_row(records):
        raise HarnessError(
            f"{place}: two records of {double}; name one run's file (results/runs/runs/NAME.json)"
        )
    return records
