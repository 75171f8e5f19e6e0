"""Retention against speed and against size, with intervals and the frontier: points, and PNG and
SVG of them. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """One row of a picture: how much of the teacher it keeps, and what that buys."""

    label: str
    block: str  # teacher, family or control
    kept: Interval  # of the teacher's score
    gain: Interval  # times faster, or times smaller
    frontier: bool = False


AXES = {"speed": DECODE_X, "memory": DISK_X, "weights": WEIGHTS_X}
_BYTES = {"memory": DISK, "weights": WEIGHTS}


def points_of(group: Group, task: str, axis: str) -> list[Point]:
    """Return the rows that have both figures; the frontier holds those that no other row beats in
    both (controls stand apart).
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
        kept = compare(row, teacher, task, ratio=True)
        gain = Interval(1.0) if row is teacher else _gain(row, teacher, axis)
        if kept.value is not None and gain.value is not None:
            points.append(Point(row.label, row_block(row), kept, gain))
    return [
        Point(one.label, one.block, one.kept, one.gain, _on_frontier(one, points)) for one in points
    ]


def _gain(row: ResultRow, teacher: ResultRow, axis: str) -> Interval:
    if axis == "speed":
        return speed_ratio(row, AXES[axis].key)
    own, base = mean_measurement(row, _BYTES[axis].key), mean_measurement(teacher, _BYTES[axis].key)
    return Interval(base / own) if own and base else Interval(None)


def _on_frontier(point: Point, points: Sequence[Point]) -> bool:
    if point.block == "control":
        return False

    def place(one: Point) -> tuple[float, float]:
        return one.kept.value or 0.0, one.gain.value or 0.0

    def beats(other: Point) -> bool:
        ours, theirs = place(point), place(other)
        return theirs != ours and theirs[0] >= ours[0] and theirs[1] >= ours[1]

    return not any(beats(other) for other in points if other.block != "control")


# near Okabe & Ito's, darker: 3:1 on white
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#997700", "#3388bb", "#777711")


def colours(group: Group) -> dict[str, str]:
    """Give each family a colour, the same in every picture of a group."""
    families = sorted({row_block(row) for row in group.rows} - {TEACHER, "control"})
    return {
        TEACHER: "#000000",
        "control": "#888888",
        **{name: PALETTE[at % len(PALETTE)] for at, name in enumerate(families)},
    }


def write_plots(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write every picture as PNG and SVG; return what was written."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "compression-harness"
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    written = []
    groups = group_records(records)
    for number, found in enumerate(groups, 1):
        for task in found.tasks:
            for axis, quantity in AXES.items():
                points = points_of(found, task, axis)
                if len(points) < 2:
                    continue
                figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
                _draw(axes, points, colours(found))
                _label(axes, points, quantity, task)
                name = f"retention-{axis}-{task}" + ("" if len(groups) == 1 else f"-{number}")
                for form in ("png", "svg"):
                    written.append(folder / f"{name}.{form}")
                    figure.savefig(
                        written[-1],
                        dpi=160,
                        metadata={"Date": None} if form == "svg" else {"Software": None},
                    )
                pyplot.close(figure)
    return written


def _coordinates(point: Point) -> tuple[float, float]:
    """Return where a point lies: times faster or smaller, and retention in per cent."""
    return point.gain.value or 0.0, 100 * (point.kept.value or 0.0)


def _draw(axes: Any, points: Sequence[Point], shades: Mapping[str, str]) -> None:
    """Draw every row with its intervals, the frontier as stairs, and the rows' names."""
    for block in dict.fromkeys(point.block for point in points):
        own = [point for point in points if point.block == block]
        axes.errorbar(
            [point.gain.value for point in own],
            [_coordinates(point)[1] for point in own],
            yerr=_error_bars([point.kept for point in own], 100),
            xerr=_error_bars([point.gain for point in own], 1),
            fmt="s" if block == TEACHER else "o",
            mfc="none" if block == "control" else shades[block],
            color=shades[block],
            ms=5,
            elinewidth=0.8,
            label=block,
        )
    front = sorted(_coordinates(point) for point in points if point.frontier)
    stairs = [x for x, _ in front], [y for _, y in front]
    axes.step(*stairs, where="pre", color="#555555", lw=0.8, ls="--", label="frontier", zorder=0)
    for point in points:
        axes.annotate(
            point.label, _coordinates(point), fontsize=6, xytext=(4, 3), textcoords="offset points"
        )


def _label(axes: Any, points: Sequence[Point], quantity: Quantity, task: str) -> None:
    """Name both axes; powers of two along the lower one."""
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
    below, above = [], []
    for one in intervals:
        value = one.value or 0.0
        below.append(max(0.0, scale * (value - (value if one.low is None else one.low))))
        above.append(max(0.0, scale * ((value if one.high is None else one.high) - value)))
    return [below, above]
