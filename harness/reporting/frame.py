"""Records as a pandas frame: one row for each cell and figure. No torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.records import columns
from harness.records.record import RunRecord

if TYPE_CHECKING:
    import pandas

_FrameRow = dict[str, object]  # header -> value
_COSTS = (
    columns.TOKENS_SEEN,
    columns.TOKENS_TRAINED,
    columns.TRAIN_SECONDS,
    columns.DEVICE_SECONDS,
    columns.FLOPS,
    columns.ENERGY,
    columns.TRAINING_PEAK,
    columns.TEACHER_TOKENS,
    columns.TEACHER_SECONDS,
    columns.TEACHER_FLOPS,
)


def frame_of(records: Sequence[RunRecord]) -> "pandas.DataFrame":
    """Return scores, measurements and costs of records; a record without any has one row."""
    import pandas

    rows = [row for record in records for row in _record_rows(record)]
    return pandas.DataFrame(rows, columns=[quantity.header for quantity in columns.FRAME])


def _record_rows(record: RunRecord) -> list[_FrameRow]:
    cell = _cell_columns(record)
    costs = _cost_rows(record) if record.trains else ()
    figures = [*_score_rows(record), *_measurement_rows(record), *costs]
    return [{**cell, **figure} for figure in figures] or [cell]


def _cell_columns(record: RunRecord) -> _FrameRow:
    """Return what every row of a cell says of it."""
    return {
        columns.KEY.header: record.key,
        columns.ROW.header: record.label,
        columns.METHOD.header: record.method,
        columns.CONTROL.header: record.is_control,
        columns.SEED.header: record.seed,
        columns.STATUS.header: record.status,
        columns.REASON.header: record.reason,
        columns.TEACHER.header: ", ".join(teacher.name for teacher in record.conditions.teachers),
        columns.STUDENT.header: record.conditions.student_recipe,
        columns.SUITE.header: ", ".join(record.conditions.suites),
        columns.BUDGET.header: record.conditions.budget_tokens,
        columns.DEVICE.header: record.environment.device if record.environment else None,
    }


def _score_rows(record: RunRecord) -> list[_FrameRow]:
    return [
        {
            columns.METRIC.header: score.primary,
            columns.TASK.header: score.task,
            columns.VALUE.header: score.value,
            columns.STDERR.header: score.stderr,
            columns.N.header: score.n,
            columns.UNIT.header: "fraction" if score.unit == "share" else "number",
        }
        for score in record.scores
    ]


def _measurement_rows(record: RunRecord) -> list[_FrameRow]:
    return [
        {
            columns.METRIC.header: measurement.name.partition(":")[0],
            columns.TASK.header: measurement.name.partition(":")[2] or None,
            columns.VALUE.header: measurement.value,
            columns.UNIT.header: measurement.unit,
            columns.N.header: len(measurement.values) or None,
        }
        for measurement in record.measurements
    ]


def _cost_rows(record: RunRecord) -> list[_FrameRow]:
    """Return what training cost, in the units that records hold."""
    return [
        {
            columns.METRIC.header: quantity.key,
            columns.VALUE.header: value,
            columns.UNIT.header: quantity.stored,
        }
        for quantity in _COSTS
        if (value := getattr(record.cost, quantity.key)) is not None
    ]
