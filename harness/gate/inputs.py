"""Parse what users give a check: margins, weights of tasks, the path of records."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.records.record import RunRecord


class Margin(NamedTuple):
    """A share that must be kept or, with `points`, may be lost; None: no margin was given."""

    share: float | None
    points: bool


def parse_margin(text: str | None, *, option: str = "--margin") -> Margin:
    """Read a margin: `0.95` or `95%` is a share to keep, `2points` are points that may be lost.

    Raises `HarnessError` for anything else.
    """
    if text is None:
        return Margin(None, points=False)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|points?|pp|pt)?\s*", text)
    value, unit = (float(match[1]), match[2] or "") if match else (-1.0, "")
    points = unit not in ("", "%")
    share = value / 100 if unit else value
    if match and not points and share == 1:
        raise HarnessError(
            f"{option} {text}: no number of items can show that a student keeps all of it, unless "
            "it is better than its teacher; say how much less would do: 0.95, 95% or 2points"
        )
    if not 0 < share < 1 or (unit == "%" and value < 1):
        suggestion = ""
        if match and not unit and 1 < value < 100:
            suggestion = f"; did you mean {value:g}%?"
        elif unit == "%" and 0 < value < 1:
            suggestion = f"; did you mean {value:g}?"
        raise HarnessError(
            f"{option} {text}: give the share that must be kept, between 0 and 1 (0.95 or "
            f"95%), or what may be lost (2points){suggestion}"
        )
    return Margin(share, points)


def parse_task_weights(text: str | None) -> str | tuple[tuple[str, float], ...]:
    """Read how tasks count in the pooled decision: `items`, `tasks` or `mmlu=2,gsm8k=1`.

    The default is `items`.
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
    """Read `tasks` or `pooled`; the default is `tasks`."""
    if text in (None, "tasks"):
        return "tasks"
    if text == "pooled":
        return "pooled"
    raise HarnessError(
        f"--decide {text}: give tasks, or pooled (a pool that passed settles what single tasks "
        "cannot tell)"
    )


_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_bytes(text: str, *, option: str = "--memory") -> float:
    """Read a number of bytes: `8GiB` (2^30), `8GB` (10^9), `500MiB`.

    Raises `HarnessError` for anything else.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?i?B?)\s*", text)
    if not match or match[2] not in _UNITS or not float(match[1]):
        raise HarnessError(f"{option} {text}: give bytes with their unit, such as 8GiB or 500MiB")
    return float(match[1]) * _UNITS[match[2]]


def percent_of(name: str, value: float) -> float:
    """Return an option that was given in points as a share of 1."""
    if not (0 if name == "tolerance" else 1e-9) <= value <= 100:
        raise HarnessError(f"--{name} {value:g}: give points between 0 and 100")
    return value / 100


def records_of(path: Path) -> "list[RunRecord]":
    """Read the records below a path; of a store, those of its newest run.

    Raises `HarnessError` for a file that is no complete record, a run that lacks cells, and two
    records of one row and seed: a check ignores nothing.
    """
    from harness.records.store import duplicate_row, newest_run, read_records

    path = newest_run(path)
    records, problems = read_records(path)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise HarnessError(f"{problems[0]}{more}")
    if duplicate := duplicate_row(records):
        raise HarnessError(
            f"{path}: two records of {duplicate}; name one run's file (results/runs/runs/NAME.json)"
        )
    return records
