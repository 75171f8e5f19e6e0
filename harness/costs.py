"""Tables of what students cost: seconds and bytes of using them, seconds, tokens and energy of making them. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from harness import stats
from harness.groups import TEACHER, Group, Row, by_chance, compare, ordered
from harness.intervals import Interval
from harness.record import Cost, Measurement, RunRecord
from harness.table import DASH, MIB, Line, Table, mean_of, mebibytes, table_of, without_dashes

KEEP = 0.95


_BAND = (0.9, 1.1)


def speed(found: Group) -> Table:
    """Speed beside the verdict on quality: ratios to the teacher by turns, and what a problem takes."""
    rows = []
    title = timed_under(found)
    for row in ordered(found):
        line = Line(row)
        if row.done and timing_of(row) not in ("", title):  # a column never mixes scenarios: a note says so
            row = replace(row, records=tuple(record.model_copy(update={"measurements": _untimed(record)}) for record in row.records))
        verdict = kept(found, row)
        line.shown["keeps 95 %"] = line.exact["keeps 95 %"] = verdict
        for name in ("decode", "prefill"):
            line.add_ratio(f"{name} x", speed_ratio(row, f"{name}_speedup"), verdict)
        for name in ("decode", "prefill"):
            line.add(f"{name} tok/s", mean_of(row, f"{name}_tokens_per_second"), lambda v: f"{v:,.0f}")
        for column, name in (("TTFT ms", "ttft_seconds"), ("TPOT ms", "tpot_seconds")):
            value = mean_of(row, name)
            line.add(column, None if value is None else 1000 * value, lambda v: f"{v:.3g}")
        for task in found.tasks:
            mark = "" if len(found.tasks) == 1 else f" {task}"
            line.add(f"s/problem{mark}", mean_of(row, f"seconds_per_problem:{task}"), lambda v: f"{v:.3g}")
            line.add(f"s/correct{mark}", mean_of(row, f"seconds_per_correct:{task}"), lambda v: f"{v:.3g}")
            length = _length_ratio(row, found.teacher, task)
            if length is not None:
                line.add(f"length x{mark}", length, lambda v: f"{v:.2f}{'' if _BAND[0] <= v <= _BAND[1] else ' !'}")
        rows.append((line.shown, line.exact))
    return table_of("speed", f"Speed ({timed_under(found)})", rows if _timed(found) else without_dashes(rows))


def _timed(found: Group) -> bool:
    records = [record for row in found.rows for record in row.done]
    return any(record.measured(name) for record in records for name in ("decode_speedup", "decode_tokens_per_second"))


def kept(found: Group, row: Row) -> str:
    """Tell whether a row keeps 95 % of the teacher's score on every task, of a choice task 95 % of what the teacher has above chance.

    yes, no, cannot tell; *not judged* where the teacher is at chance on every task; a dash without a retention.
    """
    if row.label == TEACHER:
        judged = [task for task in found.tasks if any(score.retains for score in row.scores(task))]
        at_chance = bool(judged) and all(by_chance(found, task) for task in judged)
        return DASH if not row.done else "not judged" if at_chance else "yes"
    verdicts, at_chance = [], False
    for task in found.tasks:
        scores = row.scores(task)
        if not scores or not scores[0].retains or found.teacher is None:
            continue
        if by_chance(found, task):
            at_chance = True
            continue
        interval = compare(row, found.teacher, task, ratio=True, chance=scores[0].chance)
        if interval.low is not None and interval.high is not None:
            verdicts.append("yes" if interval.low >= KEEP else "no" if interval.high < KEEP else "cannot tell")
        elif interval.value is not None or interval.reason:
            verdicts.append("cannot tell")  # too near chance for a ratio, or one item
    return next((one for one in ("no", "cannot tell", "yes") if one in verdicts), "not judged" if at_chance else DASH)


def _length_ratio(row: Row, teacher: Row | None, task: str) -> float | None:
    """Return the tokens of an answer over the teacher's, both as they end by themselves."""
    ours = [score.tokens_per_answer for score in row.scores(task) if score.tokens_per_answer]
    theirs = [score.tokens_per_answer for score in (teacher.scores(task) if teacher else ()) if score.tokens_per_answer]
    return fmean(ours) / fmean(theirs) if ours and theirs else None


def speed_ratio(row: Row, name: str) -> Interval:
    """Return a speed ratio with its interval: a record's own, or over the seeds where there are three and more."""
    measured = [one for record in row.done if (one := record.measured(name)) is not None]
    if not measured:
        return Interval(None, reason="not measured")
    if len(measured) == 1:
        return Interval(measured[0].value, measured[0].low, measured[0].high)
    return stats.ratio_of_rounds([one.value for one in measured])


def timed_under(found: Group) -> str:
    """Name the scenario that the speed columns stand for: the teacher's first one, else any row's."""
    rows = [*([found.teacher] if found.teacher else []), *found.rows]
    return next((condition for row in rows if (condition := timing_of(row))), "not timed")


def timing_of(row: Row) -> str:
    """Name the scenario that a row's speeds stand for, "" where it was not timed."""
    return next((one.condition for record in row.done if (one := record.measured("decode_tokens_per_second"))), "")


def _untimed(record: RunRecord) -> tuple[Measurement, ...]:
    """Return a record's measurements without those of a scenario."""
    names = ("decode_", "prefill_", "ttft_", "tpot_")
    return tuple(one for one in record.measurements if not one.name.startswith(names))


def scenarios(found: Group) -> Table | None:
    """Every point of the timing grid, where there is more than one."""
    rows = []
    for row in ordered(found):
        conditions = dict.fromkeys(
            one.condition for record in row.done for one in record.measurements if one.name == "decode_tokens_per_second"
        )  # fmt: skip
        for condition in conditions:
            line = Line(row)
            line.shown["scenario"] = line.exact["scenario"] = condition

            def value(name: str, row: Row = row, condition: str = condition) -> float | None:
                values = [one.value for record in row.done for one in record.measurements if (one.name, one.condition) == (name, condition)]
                return fmean(values) if values else None

            ttft, tpot = value("ttft_seconds"), value("tpot_seconds")
            line.add("TTFT ms", None if ttft is None else 1000 * ttft, lambda v: f"{v:.3g}")
            line.add("TPOT ms", None if tpot is None else 1000 * tpot, lambda v: f"{v:.3g}")
            line.add("prefill tok/s", value("prefill_tokens_per_second"), lambda v: f"{v:,.0f}")
            line.add("decode tok/s", value("decode_tokens_per_second"), lambda v: f"{v:,.0f}")
            for name in ("decode", "prefill", "end_to_end"):
                line.add_ratio(f"{name.replace('_', ' ')} x", Interval(value(f"{name}_speedup")), kept(found, row))
            kv = value("kv_bytes")
            line.add("KV MiB", None if kv is None else kv / MIB, mebibytes)
            rows.append((line.shown, line.exact))
    distinct = {shown["scenario"] for shown, _ in rows}
    return table_of("scenarios", "Speed by scenario", rows) if len(distinct) > 1 else None


def memory(found: Group) -> Table | None:
    """Bytes: on disk, of weights in memory, of keys and values, of the rest, and at the peak."""
    rows = []
    base = {name: mean_of(found.teacher, name) for name in ("weight_bytes_disk", "weight_bytes_resident")}
    kinds = (("resident", "peak MiB"), ("allocated", "peak MiB"), ("reserved", "reserved MiB"))
    peaks = [one for one in kinds if any(mean_of(row, f"decode_peak_bytes:{one[0]}") is not None for row in found.rows)]
    for row in ordered(found):
        line = Line(row)

        def add(column: str, name: str, line: Line = line, row: Row = row) -> None:
            value = mean_of(row, name)
            line.add(column, None if value is None else value / MIB, mebibytes)

        for column, name in (("disk", "weight_bytes_disk"), ("weights", "weight_bytes_resident")):
            add(f"{column} MiB", name)
            own, theirs = mean_of(row, name), base[name]
            line.add(f"{column} x", theirs / own if theirs and own else None, lambda v: f"{v:.2f}")
        add("KV MiB", "kv_bytes")
        add("activations MiB", "activation_bytes")
        for kind, column in peaks:
            values = [v for phase in ("prefill", "decode") if (v := mean_of(row, f"{phase}_peak_bytes:{kind}")) is not None]
            line.add(column, max(values) / MIB if values else None, lambda v: f"{v:,.2f}")
        load = mean_of(row, "load_seconds")
        line.add("load s", load, lambda v: f"{v:.3g}")
        line.add("first call s", mean_of(row, "first_call_seconds"), lambda v: f"{v:.3g}")
        rows.append((line.shown, line.exact))
    weighed = any(text != DASH for shown, _ in rows for column, text in shown.items() if column != "row")
    return table_of("memory", f"Memory ({timed_under(found)})", rows) if weighed else None


def training(found: Group, price: float | None = None) -> Table | None:
    """What making each student took; the teacher's part apart, its cached work divided by the rows that used it."""
    users: dict[str, int] = {}
    for row in found.rows:
        for record in row.done:
            for one in record.cost.shared:
                users[one.key] = users.get(one.key, 0) + 1
    rows = []
    for row in ordered(found):
        costs = [record.cost for record in row.done if record.cost.seconds]
        if not costs:
            continue
        line = Line(row)

        def mean(of: Callable[[Cost], float | None], costs: Sequence[Cost] = costs) -> float | None:
            values = [value for one in costs if (value := of(one)) is not None]
            return fmean(values) if values else None

        line.add("seen", mean(lambda one: one.seen_tokens or None), lambda v: f"{v:,.0f}")
        line.add("trained", mean(lambda one: one.trained_tokens or None), lambda v: f"{v:,.0f}")
        if any("learning_rate" in record.cost.notes for each in found.rows for record in each.records):
            line.add("rate", _rate(row), lambda v: f"{v:g}")
        line.add("train s", mean(lambda one: one.seconds), lambda v: f"{v:.1f}")
        line.add("device s", mean(lambda one: one.device_seconds or None), lambda v: f"{v:.1f}")
        line.add("FLOPs", mean(lambda one: one.flops or None), lambda v: f"{v:.2e}")
        line.add("peak MiB", mean(lambda one: None if one.peak_bytes is None else one.peak_bytes / MIB), lambda v: f"{v:,.0f}")
        line.add("energy J", mean(lambda one: one.energy_joules), lambda v: f"{v:,.0f}")
        line.add("teacher s", mean(lambda one: one.teacher_seconds or None), lambda v: f"{v:.1f}")
        line.add("teacher FLOPs", mean(lambda one: one.teacher_flops or None), lambda v: f"{v:.2e}")
        whole = mean(lambda one: sum(part.seconds for part in one.shared) or None)
        line.add("shared s", whole, lambda v: f"{v:.1f}")
        part = mean(lambda one: sum(each.seconds / users[each.key] for each in one.shared) or None)
        line.add("its share s", part, lambda v: f"{v:.1f}")
        if price is not None:
            seconds = mean(lambda one: one.device_seconds or one.seconds)
            line.add("money", None if seconds is None else price * (seconds + (part or 0.0)) / 3600, lambda v: f"{v:.4f}")
        rows.append((line.shown, line.exact))
    title = "Training cost" if price is None else f"Training cost (at {price:g} a device-hour)"
    return table_of("training", title, rows) if rows else None


def _rate(row: Row) -> float | None:
    """Return the learning rate of a row: the chosen one, else the set one."""
    record = row.done[0]
    found = record.cost.notes.get("learning_rate", record.settings.get("learning_rate"))
    return float(found) if isinstance(found, (int, float)) else None
