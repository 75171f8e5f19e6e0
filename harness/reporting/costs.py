"""Tables of what students cost: seconds and bytes of using them, seconds, tokens and energy of
making them. No torch.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean

from harness.analysis.comparison import Group, ResultRow, compare, ordered_rows, teacher_at_chance
from harness.records import columns
from harness.records.columns import DASH, Quantity
from harness.records.record import TEACHER, Cost, Measurement, RunRecord
from harness.reporting.table import (
    RowBuilder,
    RowCells,
    Table,
    build_table,
    mean_measurement,
    without_empty_columns,
)
from harness.statistics import stats
from harness.statistics.intervals import Interval

KEPT_SHARE = 0.95
_USUAL_LENGTH_RATIOS = (0.9, 1.1)


def speed_table(group: Group) -> Table:
    """Speed beside the verdict on quality: ratios to the teacher by turns, and what a problem
    takes.
    """
    title = table_scenario(group)
    rows = [_speed_cells(group, row, title) for row in ordered_rows(group)]
    return build_table(
        "speed", f"Speed ({title})", rows if _any_row_timed(group) else without_empty_columns(rows)
    )


def _speed_cells(group: Group, row: ResultRow, title: str) -> RowCells:
    # a column never mixes scenarios: a note says so
    if row.succeeded and row_scenario(row) not in ("", title):
        row = replace(
            row,
            records=tuple(
                record.model_copy(update={"measurements": _without_timings(record)})
                for record in row.records
            ),
        )
    line, verdict = RowBuilder(row), quality_verdict(group, row)
    line.add_words(columns.KEEPS, verdict)
    for quantity in (columns.DECODE_X, columns.PREFILL_X):
        line.add_ratio(quantity, speed_ratio(row, quantity.key), verdict)
    for quantity in (columns.DECODE_RATE, columns.PREFILL_RATE, columns.TTFT, columns.TPOT):
        line.add_measured(quantity)
    for task in group.tasks:
        beside = "" if len(group.tasks) == 1 else task
        for quantity in (columns.PER_PROBLEM, columns.PER_CORRECT):
            line.add(quantity, mean_measurement(row, f"{quantity.key}:{task}"), task=beside)
        length = _length_ratio(row, group.teacher, task)
        if length is not None:
            line.add(
                columns.LENGTH_X,
                length,
                task=beside,
                mark="" if _USUAL_LENGTH_RATIOS[0] <= length <= _USUAL_LENGTH_RATIOS[1] else " !",
            )
    return line.cells


def _any_row_timed(group: Group) -> bool:
    records = [record for row in group.rows for record in row.succeeded]
    return any(
        record.measured(one.key)
        for record in records
        for one in (columns.DECODE_X, columns.DECODE_RATE)
    )


def quality_verdict(group: Group, row: ResultRow) -> str:
    """Tell whether a row keeps 95 % of the teacher's score on every task, of a choice task 95 % of
    what the teacher has above chance.

    yes, no, cannot tell; *not judged* where the teacher is at chance on every task; a dash without
    a retention.
    """
    if row.label == TEACHER:
        judged = [task for task in group.tasks if any(score.retains for score in row.scores(task))]
        at_chance = bool(judged) and all(teacher_at_chance(group, task) for task in judged)
        return DASH if not row.succeeded else "not judged" if at_chance else "yes"
    verdicts, at_chance = [], False
    for task in group.tasks:
        scores = row.scores(task)
        if not scores or not scores[0].retains or group.teacher is None:
            continue
        if teacher_at_chance(group, task):
            at_chance = True
            continue
        interval = compare(row, group.teacher, task, ratio=True, chance=scores[0].chance)
        if interval.low is not None and interval.high is not None:
            verdicts.append(
                "yes"
                if interval.low >= KEPT_SHARE
                else "no"
                if interval.high < KEPT_SHARE
                else "cannot tell"
            )
        elif interval.value is not None or interval.reason:
            verdicts.append("cannot tell")  # too near chance for a ratio, or one item
    return next(
        (one for one in ("no", "cannot tell", "yes") if one in verdicts),
        "not judged" if at_chance else DASH,
    )


def _length_ratio(row: ResultRow, teacher: ResultRow | None, task: str) -> float | None:
    """Return the tokens of an answer over the teacher's, both as they end by themselves."""
    ours = [score.tokens_per_answer for score in row.scores(task) if score.tokens_per_answer]
    theirs = [
        score.tokens_per_answer
        for score in (teacher.scores(task) if teacher else ())
        if score.tokens_per_answer
    ]
    return fmean(ours) / fmean(theirs) if ours and theirs else None


def speed_ratio(row: ResultRow, name: str) -> Interval:
    """Return a speed ratio with its interval: a record's own, or over the seeds where there are
    three and more.
    """
    measured = [one for record in row.succeeded if (one := record.measured(name)) is not None]
    if not measured:
        return Interval(None, reason="not measured")
    if len(measured) == 1:
        return Interval(measured[0].value, measured[0].low, measured[0].high)
    return stats.ratio_of_rounds([one.value for one in measured])


def table_scenario(group: Group) -> str:
    """Name the scenario that the speed columns stand for: the teacher's first one, else any
    row's.
    """
    rows = [*([group.teacher] if group.teacher else []), *group.rows]
    return next((condition for row in rows if (condition := row_scenario(row))), "not timed")


def row_scenario(row: ResultRow) -> str:
    """Name the scenario that a row's speeds stand for, "" where it was not timed."""
    return next(
        (
            one.condition
            for record in row.succeeded
            if (one := record.measured(columns.DECODE_RATE.key))
        ),
        "",
    )


def _without_timings(record: RunRecord) -> tuple[Measurement, ...]:
    """Return a record's measurements without those of a scenario."""
    names = ("decode_", "prefill_", "ttft_", "tpot_")
    return tuple(one for one in record.measurements if not one.name.startswith(names))


def scenarios_table(group: Group) -> Table | None:
    """Every point of the timing grid, where there is more than one."""
    rows = [
        _scenario_cells(group, row, condition)
        for row in ordered_rows(group)
        for condition in _scenarios_of(row)
    ]
    distinct = {shown[columns.SCENARIO.name] for shown, _ in rows}
    return build_table("scenarios", "Speed by scenario", rows) if len(distinct) > 1 else None


def _scenarios_of(row: ResultRow) -> list[str]:
    """Return the scenarios that a row was timed in."""
    every = [one for record in row.succeeded for one in record.measurements]
    return list(
        dict.fromkeys(one.condition for one in every if one.name == columns.DECODE_RATE.key)
    )


def _scenario_cells(group: Group, row: ResultRow, condition: str) -> RowCells:
    line, every = RowBuilder(row), [one for record in row.succeeded for one in record.measurements]
    line.add_words(columns.SCENARIO, condition)

    def value(quantity: Quantity) -> float | None:
        values = [
            one.value for one in every if (one.name, one.condition) == (quantity.key, condition)
        ]
        return fmean(values) if values else None

    for quantity in (columns.TTFT, columns.TPOT, columns.PREFILL_RATE, columns.DECODE_RATE):
        line.add(quantity, value(quantity))
    for quantity in (columns.DECODE_X, columns.PREFILL_X, columns.END_TO_END_X):
        line.add_ratio(quantity, Interval(value(quantity)), quality_verdict(group, row))
    line.add(columns.KV, value(columns.KV))
    return line.cells


def memory_table(group: Group) -> Table | None:
    """Bytes: on disk, of weights in memory, of keys and values, of the rest, and at the peak."""
    peaks = {
        kind: quantity
        for kind, quantity in _PEAKS.items()
        if any(_peak_bytes(row, kind) is not None for row in group.rows)
    }
    rows = [_memory_cells(row, group.teacher, peaks) for row in ordered_rows(group)]
    weighed = any(
        text != DASH
        for shown, _ in rows
        for column, text in shown.items()
        if column.quantity is not columns.ROW
    )
    return build_table("memory", f"Memory ({table_scenario(group)})", rows) if weighed else None


_PEAKS = {"resident": columns.PEAK, "allocated": columns.PEAK, "reserved": columns.RESERVED}


def _peak_bytes(row: ResultRow, kind: str) -> float | None:
    return mean_measurement(row, f"{columns.PEAK.key}:{kind}")


def _memory_cells(
    row: ResultRow, teacher: ResultRow | None, peaks: Mapping[str, Quantity]
) -> RowCells:
    line = RowBuilder(row)
    for quantity, ratio in ((columns.DISK, columns.DISK_X), (columns.WEIGHTS, columns.WEIGHTS_X)):
        line.add_measured(quantity)
        own, theirs = mean_measurement(row, quantity.key), mean_measurement(teacher, quantity.key)
        line.add(ratio, theirs / own if theirs and own else None)
    line.add_measured(columns.KV)
    line.add_measured(columns.ACTIVATIONS)
    for kind, quantity in peaks.items():
        values = [
            value
            for phase in (columns.PREFILL_PEAK, columns.PEAK)
            if (value := mean_measurement(row, f"{phase.key}:{kind}")) is not None
        ]
        line.add(quantity, max(values, default=None))
    line.add_measured(columns.LOAD)
    line.add_measured(columns.FIRST_CALL)
    return line.cells


def training_cost_table(group: Group, price: float | None = None) -> Table | None:
    """What making each student took; the teacher's part apart, its cached work divided by the rows
    that used it.
    """
    every = [record for row in group.rows for record in row.succeeded]
    users = Counter(one.key for record in every for one in record.cost.shared)
    rated = any(
        columns.RATE.key in record.cost.notes for row in group.rows for record in row.records
    )
    rows = [
        _training_cells(row, users, price, rated=rated)
        for row in ordered_rows(group)
        if _costs_of(row)
    ]
    title = "Training cost" if price is None else f"Training cost (at {price:g} a device-hour)"
    return build_table("training", title, rows) if rows else None


def _costs_of(row: ResultRow) -> list[Cost]:
    """Return the costs of a row's seeds that took time."""
    return [record.cost for record in row.succeeded if record.cost.seconds]


def _training_cells(
    row: ResultRow, users: Mapping[str, int], price: float | None, *, rated: bool
) -> RowCells:
    line, costs = RowBuilder(row), _costs_of(row)

    def mean(of: Callable[[Cost], float | None]) -> float | None:
        values = [value for cost in costs if (value := of(cost)) is not None]
        return fmean(values) if values else None

    def cost_of(quantity: Quantity) -> float | None:  # zero: not counted
        return mean(lambda cost: getattr(cost, quantity.key) or None)

    line.add(columns.TOKENS_SEEN, cost_of(columns.TOKENS_SEEN))
    line.add(columns.TOKENS_TRAINED, cost_of(columns.TOKENS_TRAINED))
    if rated:
        line.add(columns.RATE, _learning_rate(row))
    for quantity in (columns.TRAIN_SECONDS, columns.DEVICE_SECONDS, columns.FLOPS):
        line.add(quantity, cost_of(quantity))
    # zero is a value here, None where nothing could be read
    for quantity in (columns.TRAINING_PEAK, columns.ENERGY):
        line.add(quantity, mean(lambda cost, key=quantity.key: getattr(cost, key)))  # type: ignore[misc]
    for quantity in (columns.TEACHER_SECONDS, columns.TEACHER_FLOPS):
        line.add(quantity, cost_of(quantity))
    share = mean(lambda cost: sum(one.seconds / users[one.key] for one in cost.shared) or None)
    line.add(
        columns.SHARED_SECONDS, mean(lambda cost: sum(one.seconds for one in cost.shared) or None)
    )
    line.add(columns.SHARED_SECONDS_PER_ROW, share)
    if price is not None:
        seconds = mean(lambda cost: cost.device_seconds or cost.seconds)
        line.add(
            columns.MONEY, None if seconds is None else price * (seconds + (share or 0.0)) / 3600
        )
    return line.cells


def _learning_rate(row: ResultRow) -> float | None:
    """Return the learning rate of a row: the chosen one, else the set one."""
    record = row.succeeded[0]
    found = record.cost.notes.get(columns.RATE.key, record.settings.get(columns.RATE.key))
    return float(found) if isinstance(found, (int, float)) else None
