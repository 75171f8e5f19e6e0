"""What `harness score` prints: each model's scores, speed and size, beside the first model's.

No torch.
"""

from collections.abc import Mapping, Sequence

from harness.analysis.comparison import ResultRow, compare, figure_ratio
from harness.analysis.single import score_interval
from harness.escape import markdown_cell, markdown_text
from harness.records import columns
from harness.records.columns import DASH, Quantity
from harness.records.record import Measurement, RunRecord, TaskScore

_WEIGHED = (columns.DECODE_RATE, columns.PREFILL_RATE, columns.DECODE_X, columns.DISK)
_FIRST = "first"  # in place of a comparison of the first model with itself


def scores_table(names: Sequence[str], records: Sequence[RunRecord]) -> str:
    """Return the table of models, the first of which the others are compared with.

    `names` are the models' names as they were typed, in the order of their records.
    """
    from tabulate import tabulate

    rows = [ResultRow(record.label, (record,)) for record in records]
    tasks = list(dict.fromkeys(score.task for record in records for score in record.scores))
    lines = [
        {columns.MODEL.header: markdown_cell(name), **_cells(row, rows[0], tasks)}
        for name, row in zip(names, rows, strict=True)
    ]
    notes = [
        f"- {name}: {remark}"
        for name, record in zip(names, records, strict=True)
        for remark in _remarks(record)
    ]
    table = tabulate(_filled(lines), headers="keys", tablefmt="pipe", disable_numparse=True)
    return "\n\n".join(filter(None, (table, "\n".join(map(markdown_text, notes)))))


def _filled(lines: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Leave out the columns in which no model has anything but a dash."""
    headers = dict.fromkeys(header for line in lines for header in line)
    kept = [header for header in headers if any(line.get(header, DASH) != DASH for line in lines)]
    return [{header: line.get(header, DASH) for header in kept} for line in lines]


def _cells(row: ResultRow, first: ResultRow, tasks: Sequence[str]) -> dict[str, str]:
    """Return a model's cells: of each task score and difference to the first, speed and size."""
    record, cells = row.first, dict[str, str]()
    for task in tasks:
        cells[f"{task}"] = _score_text(record.score(task))
        cells[f"{task} against the first"] = (
            _FIRST if row is first else _difference_text(row, first, task)
        )
    for quantity in _WEIGHED:
        measurement = record.measurement(quantity.key)
        is_ratio = quantity is columns.DECODE_X
        is_base = is_ratio and row is first and bool(record.measurement(columns.DECODE_RATE.key))
        cells[quantity.header] = _FIRST if is_base else _measured_text(quantity, measurement)
    return cells


def _score_text(score: TaskScore | None) -> str:
    """Write a score with its interval, and of how many items it is."""
    if score is None:
        return DASH
    interval = score_interval(score)
    text = score.format_value(score.value)
    if interval.low is not None and interval.high is not None:
        ends = (score.format_value(end).removesuffix(" %") for end in (interval.low, interval.high))
        text += f" [{', '.join(ends)}]"
    return f"{text} n = {score.n:,}"


def _difference_text(row: ResultRow, first: ResultRow, task: str) -> str:
    """Write how a model differs from the first on the same items.

    Shares and numbers have a difference, figures that are better when lower a ratio.
    """
    score = row.first.score(task)
    if score is None:
        return DASH
    if score.kind == "perplexity":
        ratio = figure_ratio(row, first, task)
        return columns.AGAINST_TEACHER.with_interval(ratio) if ratio.value else ratio.reason
    interval = compare(row, first, task, ratio=False)
    if interval.value is None:
        return interval.reason
    is_share = score.unit == "share"
    return (columns.DIFFERENCE if is_share else columns.DIFFERENCE_OF_NUMBERS).with_interval(
        interval
    ) + (" points" if is_share else "")


def _measured_text(quantity: Quantity, measurement: Measurement | None) -> str:
    if measurement is None:
        return DASH
    from harness.statistics.intervals import Interval

    ends = (measurement.value, measurement.low, measurement.high)
    value, low, high = map(quantity.scaled, ends)
    return quantity.with_interval(Interval(value, low, high))


def _remarks(record: RunRecord) -> list[str]:
    """Return what to know of a model: how it was opened, and why it has no scores."""
    if record.status != "success":
        return [f"{record.status}: {record.reason}"]
    note = record.student.note if record.student else ""
    return [note] if note else []
