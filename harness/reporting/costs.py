"""Tables of costs: time and bytes of using a student, and what making it took. No torch."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean

from harness.analysis.comparison import (
    Group,
    ResultRow,
    compare,
    ordered_rows,
    teacher_at_chance,
)
from harness.analysis.front import FrontPlace, front_places
from harness.analysis.measured_rows import mean_measurement
from harness.analysis.measured_rows import speed_ratio as speed_ratio
from harness.escape import clean
from harness.records import columns
from harness.records.columns import DASH, Quantity
from harness.records.record import TEACHER, Cost, Measurement, RunRecord
from harness.reporting.table import (
    RowBuilder,
    RowCells,
    Table,
    build_table,
    without_empty_columns,
)
from harness.statistics.intervals import Interval

KEPT_SHARE = 0.95  # of the teacher's score, for the verdict "yes"
_USUAL_LENGTH_RATIOS = (0.9, 1.1)  # answers outside of it are marked

# --- speed


def speed_table(group: Group) -> Table:
    """Return speeds beside the verdict on quality: ratios to the teacher, rates, time a problem."""
    scenario = table_scenario(group)
    front = front_places(group)
    lines = [_speed_cells(group, row, scenario, front) for row in ordered_rows(group)]
    lines = without_empty_columns(lines, (*_LAUNCHED, columns.FRONT))
    if not _any_row_timed(group):
        lines = without_empty_columns(lines)
    return build_table("speed", f"Speed ({scenario})", lines)


def _speed_cells(
    group: Group, row: ResultRow, scenario: str, front: Mapping[str, FrontPlace]
) -> RowCells:
    # a column holds one scenario only: a note names the rows that were timed under another one
    if row.succeeded and row_scenario(row) not in ("", scenario):
        row = replace(row, records=tuple(map(_without_timings, row.records)))
    line, verdict = RowBuilder(row), quality_verdict(group, row)
    line.add_words(columns.KEEPS, verdict)
    place = front.get(row.label)
    line.add_words(columns.FRONT, clean(place.text) if place else DASH)
    for quantity in (columns.DECODE_X, columns.PREFILL_X):
        line.add_ratio(quantity, speed_ratio(row, quantity.key), verdict)
    line.add_ratio(columns.EAGER_DECODE_X, speed_ratio(row, columns.EAGER_DECODE_X.key), verdict)
    for quantity in (columns.DECODE_RATE, columns.PREFILL_RATE, columns.TTFT, columns.TPOT):
        line.add_measured(quantity)
    line.add_measured(columns.EAGER_TPOT)
    line.add_words(columns.STEPS, decode_steps(row))
    shortest, longest = _USUAL_LENGTH_RATIOS
    for task in group.tasks:
        task_name = "" if len(group.tasks) == 1 else task
        for quantity in (columns.PER_PROBLEM, columns.PER_CORRECT):
            line.add(quantity, mean_measurement(row, f"{quantity.key}:{task}"), task=task_name)
        ratio = _length_ratio(row, group.teacher, task)
        if ratio is not None:
            mark = "" if shortest <= ratio <= longest else " !"
            line.add(columns.LENGTH_X, ratio, task=task_name, mark=mark)
    return line.cells


# Columns that only a row from a GPU fills.
_LAUNCHED = (columns.EAGER_DECODE_X, columns.EAGER_TPOT, columns.STEPS)


def decode_steps(row: ResultRow) -> str:
    """Tell how a row's decoding steps were launched on a GPU; a dash where it was not timed there.

    It is said of the scenario of the row's speeds, and of each kind where seeds differ.
    """
    return "; ".join(sorted(set(map(_steps_of, row.succeeded)) - {DASH})) or DASH


def _steps_of(record: RunRecord) -> str:
    if record.measurement(columns.EAGER_TPOT.key) is not None:
        return "captured"
    if record.measurement(columns.NOT_CAPTURED) is None:
        return DASH
    busy = record.measurement(columns.DECODE_BUSY.key)
    is_bound = busy is not None and busy.value < columns.BUSY_SHARE
    return "eager, bound by launches" if is_bound else "eager"


def _any_row_timed(group: Group) -> bool:
    return any(
        record.measurement(quantity.key)
        for row in group.rows
        for record in row.succeeded
        for quantity in (columns.DECODE_X, columns.DECODE_RATE)
    )


def quality_verdict(group: Group, row: ResultRow) -> str:
    """Tell whether a row keeps 95 % of the teacher's score on every task.

    Of a choice task it must keep 95 % of what the teacher has above chance. Returns "yes", "no" or
    "cannot tell"; "not judged" where the teacher is at chance on every task; a dash where no task
    has a retention.
    """
    if row.label == TEACHER:
        return _teacher_verdict(group, row)
    verdicts, some_at_chance = [], False
    for task in group.tasks:
        scores = row.scores(task)
        if not scores or not scores[0].retains or group.teacher is None:
            continue
        if teacher_at_chance(group, task):
            some_at_chance = True
            continue
        retention = compare(row, group.teacher, task, ratio=True, chance=scores[0].chance)
        if retention.low is not None and retention.high is not None:
            is_kept, is_lost = retention.low >= KEPT_SHARE, retention.high < KEPT_SHARE
            verdicts.append("yes" if is_kept else "no" if is_lost else "cannot tell")
        elif retention.value is not None or retention.reason:
            verdicts.append("cannot tell")  # too near chance for a ratio, or one item
    worst_first = ("no", "cannot tell", "yes")
    without_verdict = "not judged" if some_at_chance else DASH
    return next((verdict for verdict in worst_first if verdict in verdicts), without_verdict)


def _teacher_verdict(group: Group, row: ResultRow) -> str:
    """Return the teacher's own verdict: "yes", unless it is at chance on every task."""
    if not row.succeeded:
        return DASH
    tasks = [task for task in group.tasks if any(score.retains for score in row.scores(task))]
    at_chance = bool(tasks) and all(teacher_at_chance(group, task) for task in tasks)
    return "not judged" if at_chance else "yes"


def _length_ratio(row: ResultRow, teacher: ResultRow | None, task: str) -> float | None:
    """Return the mean length of a row's answers over that of the teacher's, in tokens."""
    lengths, teacher_lengths = _answer_lengths(row, task), _answer_lengths(teacher, task)
    return fmean(lengths) / fmean(teacher_lengths) if lengths and teacher_lengths else None


def _answer_lengths(row: ResultRow | None, task: str) -> list[float]:
    scores = row.scores(task) if row else ()
    return [score.tokens_per_answer for score in scores if score.tokens_per_answer]


def table_scenario(group: Group) -> str:
    """Return the scenario of the speed columns: the teacher's first one, else any row's."""
    rows = [*([group.teacher] if group.teacher else []), *group.rows]
    return next((scenario for row in rows if (scenario := row_scenario(row))), "not timed")


def row_scenario(row: ResultRow) -> str:
    """Return the scenario of a row's speeds, "" where it was not timed."""
    rates = (record.measurement(columns.DECODE_RATE.key) for record in row.succeeded)
    return next((rate.condition for rate in rates if rate), "")


def _without_timings(record: RunRecord) -> RunRecord:
    """Return a record without the measurements that belong to a scenario."""
    prefixes = ("decode_", "prefill_", "ttft_", "tpot_", "eager_", columns.NOT_CAPTURED)
    untimed = [
        measurement
        for measurement in record.measurements
        if not measurement.name.startswith(prefixes)
    ]
    return record.model_copy(update={"measurements": tuple(untimed)})


def scenarios_table(group: Group) -> Table | None:
    """Return every point of the timing grid, where there is more than one."""
    lines = [
        _scenario_cells(group, row, scenario)
        for row in ordered_rows(group)
        for scenario in _scenarios_of(row)
    ]
    scenarios = {shown[columns.SCENARIO.name] for shown, _ in lines}
    if len(scenarios) <= 1:
        return None
    lines = without_empty_columns(lines, (*_LAUNCHED, columns.DECODE_BUSY, columns.PREFILL_BUSY))
    return build_table("scenarios", "Speed by scenario", lines)


def _measurements_of(row: ResultRow) -> list[Measurement]:
    return [measurement for record in row.succeeded for measurement in record.measurements]


def _scenarios_of(row: ResultRow) -> list[str]:
    """Return the scenarios that a row was timed in."""
    rates = [
        measurement
        for measurement in _measurements_of(row)
        if measurement.name == columns.DECODE_RATE.key
    ]
    return list(dict.fromkeys(rate.condition for rate in rates))


def _scenario_cells(group: Group, row: ResultRow, scenario: str) -> RowCells:
    line = RowBuilder(row)
    line.add_words(columns.SCENARIO, scenario)
    of_scenario = [
        measurement for measurement in _measurements_of(row) if measurement.condition == scenario
    ]

    def mean(quantity: Quantity) -> float | None:
        values = [
            measurement.value for measurement in of_scenario if measurement.name == quantity.key
        ]
        return fmean(values) if values else None

    for quantity in (columns.TTFT, columns.TPOT, columns.PREFILL_RATE, columns.DECODE_RATE):
        line.add(quantity, mean(quantity))
    line.add(columns.EAGER_TPOT, mean(columns.EAGER_TPOT))
    for quantity in (
        columns.DECODE_X,
        columns.PREFILL_X,
        columns.END_TO_END_X,
        columns.EAGER_DECODE_X,
    ):
        line.add_ratio(quantity, Interval(mean(quantity)), quality_verdict(group, row))
    for quantity in (columns.DECODE_BUSY, columns.PREFILL_BUSY):
        line.add(quantity, mean(quantity))
    line.add(columns.KV, mean(columns.KV))
    return line.cells


# --- memory


def memory_table(group: Group) -> Table | None:
    """Return bytes: on disk, of weights in memory, of keys and values, of the rest, at the peak."""
    peaks = {
        kind: quantity
        for kind, quantity in _PEAKS.items()
        if any(_peak_bytes(row, kind) is not None for row in group.rows)
    }
    # records of older versions do not hold it
    has_cache = any(mean_measurement(row, columns.KV_PER_TOKEN.key) for row in group.rows)
    lines = [
        _memory_cells(row, group.teacher, peaks, has_cache=has_cache) for row in ordered_rows(group)
    ]
    is_measured = any(
        text != DASH
        for shown, _ in lines
        for column, text in shown.items()
        if column.quantity is not columns.ROW
    )
    if not is_measured:
        return None
    return build_table("memory", f"Memory ({table_scenario(group)})", lines)


_PEAKS = {"resident": columns.PEAK, "allocated": columns.PEAK, "reserved": columns.RESERVED}


def _peak_bytes(row: ResultRow, kind: str) -> float | None:
    return mean_measurement(row, f"{columns.PEAK.key}:{kind}")


def _memory_cells(
    row: ResultRow,
    teacher: ResultRow | None,
    peaks: Mapping[str, Quantity],
    *,
    has_cache: bool,
) -> RowCells:
    line = RowBuilder(row)
    for quantity, ratio in ((columns.DISK, columns.DISK_X), (columns.WEIGHTS, columns.WEIGHTS_X)):
        line.add_measured(quantity)
        row_bytes = mean_measurement(row, quantity.key)
        teacher_bytes = mean_measurement(teacher, quantity.key)
        line.add(ratio, teacher_bytes / row_bytes if teacher_bytes and row_bytes else None)
    line.add_measured(columns.KV)
    if has_cache:
        line.add_measured(columns.KV_PER_TOKEN)
    line.add_measured(columns.ACTIVATIONS)
    for kind, quantity in peaks.items():
        phases = (columns.PREFILL_PEAK, columns.PEAK)
        values = [mean_measurement(row, f"{phase.key}:{kind}") for phase in phases]
        line.add(quantity, max((value for value in values if value is not None), default=None))
    line.add_measured(columns.LOAD)
    line.add_measured(columns.FIRST_CALL)
    return line.cells


# --- training


def training_cost_table(group: Group, price: float | None = None) -> Table | None:
    """Return what making each student took: tokens, seconds, FLOPs, energy, and the teacher's part.

    The teacher's cached work is shared: each row that used it bears an equal part. `price` is money
    per device-hour.
    """
    records = [record for row in group.rows for record in row.succeeded]
    users = Counter(artefact.key for record in records for artefact in record.cost.shared)
    with_rate = any(
        columns.RATE.key in record.cost.notes for row in group.rows for record in row.records
    )
    lines = [
        _training_cells(row, users, price, with_rate=with_rate)
        for row in ordered_rows(group)
        if _costs_of(row)
    ]
    title = "Training cost" if price is None else f"Training cost (at {price:g} a device-hour)"
    return build_table("training", title, lines) if lines else None


def _costs_of(row: ResultRow) -> list[Cost]:
    """Return the costs of a row's seeds that took time."""
    return [record.cost for record in row.succeeded if record.cost.seconds]


def _training_cells(
    row: ResultRow, users: Mapping[str, int], price: float | None, *, with_rate: bool
) -> RowCells:
    line, costs = RowBuilder(row), _costs_of(row)

    def mean(figure: Callable[[Cost], float | None]) -> float | None:
        values = [value for cost in costs if (value := figure(cost)) is not None]
        return fmean(values) if values else None

    def mean_field(quantity: Quantity) -> float | None:  # zero: not counted
        return mean(lambda cost: getattr(cost, quantity.key) or None)

    line.add(columns.TOKENS_SEEN, mean_field(columns.TOKENS_SEEN))
    line.add(columns.TOKENS_TRAINED, mean_field(columns.TOKENS_TRAINED))
    if with_rate:
        line.add(columns.RATE, _learning_rate(row))
    for quantity in (columns.TRAIN_SECONDS, columns.DEVICE_SECONDS, columns.FLOPS):
        line.add(quantity, mean_field(quantity))
    # of these zero is a value, and None stands where nothing could be read
    for quantity in (columns.TRAINING_PEAK, columns.ENERGY):
        line.add(quantity, mean(lambda cost, key=quantity.key: getattr(cost, key)))  # type: ignore[misc]
    for quantity in (columns.TEACHER_SECONDS, columns.TEACHER_FLOPS):
        line.add(quantity, mean_field(quantity))

    def shared_seconds(cost: Cost) -> float | None:
        return sum(artefact.seconds for artefact in cost.shared) or None

    def seconds_per_user(cost: Cost) -> float | None:
        return sum(artefact.seconds / users[artefact.key] for artefact in cost.shared) or None

    share = mean(seconds_per_user)
    line.add(columns.SHARED_SECONDS, mean(shared_seconds))
    line.add(columns.SHARED_SECONDS_PER_ROW, share)
    if price is not None:
        seconds = mean(lambda cost: cost.device_seconds or cost.seconds)
        money = None if seconds is None else price * (seconds + (share or 0.0)) / 3600
        line.add(columns.MONEY, money)
    return line.cells


def _learning_rate(row: ResultRow) -> float | None:
    """Return the learning rate of a row: the tuned one, else that of its settings."""
    record = row.succeeded[0]
    rate = record.cost.notes.get(columns.RATE.key, record.settings.get(columns.RATE.key))
    return float(rate) if isinstance(rate, (int, float)) else None
