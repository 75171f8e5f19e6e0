"""Records as a pandas frame: one line a cell and figure. No torch."""

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
    """Return scores, measurements and costs of records; a record without any has one line."""
    import pandas

    lines = [line for record in records for line in _record_rows(record)]
    return pandas.DataFrame(lines, columns=[one.header for one in columns.FRAME])


def _record_rows(record: RunRecord) -> list[_FrameRow]:
    cell = _cell_columns(record)
    figures = [
        *_score_rows(record),
        *_measurement_rows(record),
        *(_cost_rows(record) if record.trains else ()),
    ]
    return [{**cell, **figure} for figure in figures] or [cell]


def _cell_columns(record: RunRecord) -> _FrameRow:
    """Return what is said of a cell in each of its lines."""
    return {
        columns.KEY.header: record.key,
        columns.ROW.header: record.label,
        columns.METHOD.header: record.method,
        columns.CONTROL.header: record.is_control,
        columns.SEED.header: record.seed,
        columns.STATUS.header: record.status,
        columns.REASON.header: record.reason,
        columns.TEACHER.header: ", ".join(one.name for one in record.conditions.teachers),
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
            columns.METRIC.header: one.name.partition(":")[0],
            columns.TASK.header: one.name.partition(":")[2] or None,
            columns.VALUE.header: one.value,
            columns.UNIT.header: one.unit,
            columns.N.header: len(one.values) or None,
        }
        for one in record.measurements
    ]


def _cost_rows(record: RunRecord) -> list[_FrameRow]:
    """Return what training cost, in the units that records hold."""
    known = {one: getattr(record.cost, one.key) for one in _COSTS}
    return [
        {
            columns.METRIC.header: one.key,
            columns.VALUE.header: value,
            columns.UNIT.header: one.stored,
        }
        for one, value in known.items()
        if value is not None
    ]
