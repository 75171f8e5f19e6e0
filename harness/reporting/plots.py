"""Retention against speed and size, with intervals and the frontier: points, PNG, SVG. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness.analysis.comparison import (
    Group,
    ResultRow,
    compare,
    group_records,
    ordered_rows,
    row_block,
    teacher_at_chance,
)
from harness.records.columns import DECODE_X, DISK, DISK_X, RETENTION, WEIGHTS, WEIGHTS_X, Quantity
from harness.records.record import TEACHER, RunRecord
from harness.reporting.costs import speed_ratio
from harness.reporting.table import mean_measurement
from harness.statistics.intervals import Interval


@dataclass(frozen=True)
class Point:
    """One row of a picture: how much of the teacher's score it keeps, and what it gains."""

    label: str
    block: str  # teacher, family or control
    retention: Interval  # of the teacher's score
    gain: Interval  # times faster, or times smaller
    on_frontier: bool = False


AXES = {"speed": DECODE_X, "memory": DISK_X, "weights": WEIGHTS_X}
_BYTES = {"memory": DISK, "weights": WEIGHTS}


def points_of(group: Group, task: str, axis: str) -> list[Point]:
    """Return the rows that have both figures, and which of them lie on the frontier.

    No other row is better in both figures than one on the frontier. Controls are never on it.
    """
    teacher = group.teacher
    if teacher is None or teacher_at_chance(group, task):
        return []
    points = []
    for row in ordered_rows(group):
        if row_block(row) == TEACHER and row is not teacher:
            continue
        scores = row.scores(task)
        if not scores or not scores[0].retains:
            continue
        retention = compare(row, teacher, task, ratio=True)
        gain = Interval(1.0) if row is teacher else _gain(row, teacher, axis)
        if retention.value is not None and gain.value is not None:
            points.append(Point(row.label, row_block(row), retention, gain))
    return [replace(point, on_frontier=_on_frontier(point, points)) for point in points]


def _gain(row: ResultRow, teacher: ResultRow, axis: str) -> Interval:
    if axis == "speed":
        return speed_ratio(row, AXES[axis].key)
    name = _BYTES[axis].key
    row_bytes, teacher_bytes = mean_measurement(row, name), mean_measurement(teacher, name)
    return Interval(teacher_bytes / row_bytes) if row_bytes and teacher_bytes else Interval(None)


def _on_frontier(point: Point, points: Sequence[Point]) -> bool:
    if point.block == "control":
        return False

    def is_beaten_by(other: Point) -> bool:
        old, new = _coordinates(point), _coordinates(other)
        return new != old and new.retention >= old.retention and new.gain >= old.gain

    return not any(is_beaten_by(other) for other in points if other.block != "control")


# near Okabe & Ito's, darker: 3:1 on white
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#997700", "#3388bb", "#777711")


def colours(group: Group) -> dict[str, str]:
    """Return the colour of each family, the same in every picture of a group."""
    families = sorted({row_block(row) for row in group.rows} - {TEACHER, "control"})
    return {
        TEACHER: "#000000",
        "control": "#888888",
        **{name: PALETTE[number % len(PALETTE)] for number, name in enumerate(families)},
    }


def write_plots(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write every picture as PNG and SVG, and return the paths that were written."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "compression-harness"
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    written = []
    groups = group_records(records)
    for number, group in enumerate(groups, 1):
        for task in group.tasks:
            for axis, quantity in AXES.items():
                points = points_of(group, task, axis)
                if len(points) < 2:
                    continue
                figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
                _draw(axes, points, colours(group))
                _label(axes, points, quantity, task)
                name = f"retention-{axis}-{task}" + ("" if len(groups) == 1 else f"-{number}")
                for form in ("png", "svg"):
                    written.append(folder / f"{name}.{form}")
                    metadata = {"Date": None} if form == "svg" else {"Software": None}
                    figure.savefig(written[-1], dpi=160, metadata=metadata)
                pyplot.close(figure)
    return written


class _Coordinates(NamedTuple):
    """Where a point lies."""

    gain: float  # times faster, or times smaller
    retention: float  # per cent


def _coordinates(point: Point) -> _Coordinates:
    return _Coordinates(point.gain.value or 0.0, 100 * (point.retention.value or 0.0))


def _draw(axes: Any, points: Sequence[Point], shades: Mapping[str, str]) -> None:
    """Draw every row with its intervals, the frontier as stairs, and the rows' names."""
    for block in dict.fromkeys(point.block for point in points):
        of_block = [point for point in points if point.block == block]
        axes.errorbar(
            [point.gain.value for point in of_block],
            [_coordinates(point).retention for point in of_block],
            yerr=_error_bars([point.retention for point in of_block], 100),
            xerr=_error_bars([point.gain for point in of_block], 1),
            fmt="s" if block == TEACHER else "o",
            mfc="none" if block == "control" else shades[block],
            color=shades[block],
            ms=5,
            elinewidth=0.8,
            label=block,
        )
    frontier = sorted(_coordinates(point) for point in points if point.on_frontier)
    stairs = [place.gain for place in frontier], [place.retention for place in frontier]
    axes.step(*stairs, where="pre", color="#555555", lw=0.8, ls="--", label="frontier", zorder=0)
    offset = {"xytext": (4, 3), "textcoords": "offset points"}
    for point in points:
        axes.annotate(point.label, _coordinates(point), fontsize=6, **offset)


def _label(axes: Any, points: Sequence[Point], quantity: Quantity, task: str) -> None:
    """Name both axes, and put powers of two along the lower one."""
    axes.set_xlabel(quantity.axis)
    axes.set_ylabel(f"{RETENTION.header} on {task}, % of the teacher")
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16) if _tick_fits(tick, points)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.grid(alpha=0.25, lw=0.5)
    axes.legend(fontsize=7, frameon=False)


def _tick_fits(tick: float, points: Sequence[Point]) -> bool:
    values = [point.gain.value or 1.0 for point in points]
    return min(values) / 1.5 <= tick <= max(values) * 1.5


def _error_bars(intervals: Sequence[Interval], scale: float) -> list[list[float]]:
    """Return how far intervals reach below and above their values, scaled."""
    below, above = [], []
    for interval in intervals:
        value = interval.value or 0.0
        low = value if interval.low is None else interval.low
        high = value if interval.high is None else interval.high
        below.append(max(0.0, scale * (value - low)))
        above.append(max(0.0, scale * (high - value)))
    return [below, above]
