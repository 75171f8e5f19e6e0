"""The tables of distances to the teacher on texts: in full, and by prompt length. No torch."""

from statistics import fmean

from harness.analysis.comparison import Group, ResultRow, ordered_rows
from harness.records import columns
from harness.records.columns import Quantity
from harness.records.record import Measurement
from harness.reporting.table import RowBuilder, RowCells, Table, build_table
from harness.statistics.intervals import Interval

_FIGURES = (
    columns.TEXT_KL,
    columns.TEXT_KL_MEDIAN,
    columns.TEXT_KL_90,
    columns.TEXT_KL_99,
    columns.TEXT_KL_999,
    columns.TEXT_KL_MAX,
    columns.PROBABILITY_CHANGE,
    columns.SAME_TOP,
)


def text_distance_table(group: Group) -> Table | None:
    """Return the distances of every row on every task that measures perplexity; None without."""
    lines = [
        _distance_cells(row, task)
        for task in group.tasks
        for row in ordered_rows(group)
        if _measured(row, columns.TEXT_KL, task)
    ]
    if not lines:
        return None
    return build_table("text-distance", "Distance to the teacher on texts", lines)


def prompt_length_table(group: Group) -> Table | None:
    """Return the distances of rows with a quantized cache by prompt length; None without any."""
    prefix = f"{columns.KL_AT_LENGTH.key}:"
    lines = []
    for row in ordered_rows(group):
        parts = dict.fromkeys(
            measurement.name.removeprefix(prefix)
            for record in row.succeeded
            for measurement in record.measurements
            if measurement.name.startswith(prefix)
        )
        lines += [_length_cells(row, part) for part in parts]
    if not lines:
        return None
    return build_table("prompt-length", "Distance to the teacher by prompt length", lines)


def _length_cells(row: ResultRow, part: str) -> RowCells:
    line = RowBuilder(row)
    task, _, band = part.rpartition(":")
    line.add_words(columns.TASK, task)
    line.add_words(columns.PROMPT_LENGTH, band)
    for quantity in (columns.KL_AT_LENGTH, columns.PERPLEXITY_AT_LENGTH):
        line.add_interval(quantity, _over_seeds(_measured(row, quantity, part), quantity))
    return line.cells


def _distance_cells(row: ResultRow, task: str) -> RowCells:
    line = RowBuilder(row)
    line.add_words(columns.TASK, task)
    for quantity in _FIGURES:
        line.add_interval(quantity, _over_seeds(_measured(row, quantity, task), quantity))
    return line.cells


def _measured(row: ResultRow, quantity: Quantity, task: str) -> list[Measurement]:
    """Return a figure of each seed that has it."""
    name = f"{quantity.key}:{task}"
    return [
        measurement
        for record in row.succeeded
        if (measurement := record.measurement(name)) is not None
    ]


def _over_seeds(measurements: list[Measurement], quantity: Quantity) -> Interval:
    """Return the mean over seeds, from the lowest to the highest end of their intervals."""
    if not measurements:
        return Interval(None)
    lows = [measurement.low for measurement in measurements]
    highs = [measurement.high for measurement in measurements]
    return Interval(
        quantity.scaled(fmean(measurement.value for measurement in measurements)),
        min((low for low in map(quantity.scaled, lows) if low is not None), default=None),
        max((high for high in map(quantity.scaled, highs) if high is not None), default=None),
    )
