"""Tables from records alone: Markdown and CSV, byte for byte the same wherever they are made again. No torch.

Records are grouped before anything is compared: rows of one table share teacher, student shape, budget, device,
dtype, scoring path, machine and task versions. What was not measured is a dash, and a note says why.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness import stats
from harness.claims import CHAINS, CLAIMS, at_chance, cost_order, published, rows_of, spans, verdicts
from harness.groups import TEACHER, Group, Row, compare, group, ordered
from harness.record import Cost, Measurement, RunRecord, TaskScore
from harness.stats import Interval

if TYPE_CHECKING:
    import pandas

DASH = "-"
COMPRESSED = ("quantization", "pruning", "low-rank")

GLOSSARY = {
    "row": "the method that made the student; settings that differ from the defaults in brackets",
    "seeds": "independent training runs, pooled; 1 for rows without a random draw",
    "score": "accuracy by the task's primary extractor, mean over seeds",
    "retention": "student's score / teacher's score on the same items, with its 95 % interval (one seed: paired log ratio; several: "
    "bootstrap over seeds and items)",
    "above chance": "the same ratio after the chance level is taken from both: what is left of the part above guessing",
    "lost/won": "items the teacher has right and the student wrong / the reverse, mean over seeds",
    "KL": "divergence of the student's distributions from the teacher's, nats a question's choices or a token of the teacher's answers, "
    "with 1.96 standard errors clustered by item",
    "same top": "share of those in which both put the same choice or token first",
    "perplexity": "by word, as lm-eval counts words; lower is better",
    "against teacher": "student's perplexity / teacher's, with its 95 % interval over documents",
    "correct by": "accuracy by each extractor or metric; the first is the score's own",
    "macro": "mean accuracy over subjects, or over problems' numbers of steps",
    "picked": "how often each position was chosen, in percent",
    "unended": "answers that ran into the longest length",
    "cut prompts": "requests longer than the context, which lost tokens on the left as in lm-eval",
    "tokens": "tokens written per answer, the ending one included",
    "invalid": "share of answers in which the primary extractor finds nothing",
    "keeps 95 %": "whether the whole retention interval lies above 95 % (yes) or below (no) on every task; speed counts only beside it",
    "decode x": "teacher's seconds per written token / the student's, by turns in processes of their own: lower quartiles of a round, "
    "geometric mean and 95 % bootstrap interval over rounds (several seeds: over seeds); in brackets where quality is lost",
    "prefill x": "the same for reading the prompt and choosing the first token",
    "decode tok/s": "batch x (new tokens - 1) / (end to end - first token), median; EOS off",
    "prefill tok/s": "batch x prompt tokens / time to first token, median",
    "TTFT ms": "time to first token: prefill and the choice of one token, tokenising not in it",
    "TPOT ms": "time per output token after the first",
    "s/problem": "seconds per problem of the scored run, batched, natural answer lengths",
    "s/correct": "the same divided by the share that is right",
    "length x": "tokens of a student's answer / the teacher's; ! outside 90 to 110 %, the band in which MLPerf takes speeds for comparable",
    "disk": "bytes of the weight files; (x) the teacher's / the student's",
    "weights": "bytes of parameters and buffers in memory, each storage once, in the dtype of the table",
    "KV": "bytes of keys and values at the end of a run, counted, checked against 2 L B T H d",
    "activations": "the rest of the peak: peak - weights - KV",
    "peak": "how far a run lifts a fresh process's memory above what it held before the model was opened (CPU: resident; GPU: allocated)",
    "reserved": "the same of the GPU's caching allocator",
    "load s": "opening the model in a fresh process, imports not counted, files perhaps in the page cache",
    "first call s": "the first full run, which pays for what later runs find ready",
    "seen": "tokens that passed through the student in training, prompts included, padding not",
    "trained": "tokens that had a loss",
    "train s": "seconds in the training loop; of methods without training, of making the student; of a chain, all its stages",
    "device s": "the same times the devices",
    "FLOPs": "training: 3 x forward (2 per weight outside the embedding, head and attention included) x seen tokens",
    "energy J": "of the CPU packages (RAPL) or the GPU (NVML) while it trained; a dash where no counter can be read",
    "teacher s": "seconds of the teacher's forward passes for this row alone, within train s",
    "teacher FLOPs": "its forward passes for this row alone",
    "rate": "learning rate; chosen on a held-out slice of the training rows, once for all seeds",
    "shared s": "seconds that shared work took when it was made: the teacher's traces and distributions, the search for a learning rate",
    "its share s": "the same divided by the rows of this table that use it",
    "claimed": "what comparisons of compression methods keep repeating; *holds here* names a row that reaches the low end (retention: by "
    "the lower end of its interval on every task)",
    "published": "range over the records in harness/data/published.json: other models, other harnesses, mostly far larger",
    "stage": "a chain up to here: what that student scored in its own row, what it weighs, what this stage alone took",
    "of the parts": "product of what the chain before its last stage keeps (or gains) and what the last stage alone does: the measured "
    "whole beside it says whether gains multiply",
    "stage s": "seconds that this stage took",
    "money": "price x (device s + its share s)",
}


@dataclass(frozen=True)
class Table:
    """One table: header cells, rows of text, and the same numbers unrounded for the CSV."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    frame: "pandas.DataFrame"


def _percent(found: Interval, *, digits: int = 1) -> str:
    if found.value is None:
        return DASH
    text = f"{100 * found.value:.{digits}f} %"
    return text if found.low is None or found.high is None else f"{text} [{100 * found.low:.{digits}f}, {100 * found.high:.{digits}f}]"


def _points(found: Interval) -> str:
    if found.value is None:
        return DASH
    text = f"{100 * found.value:+.1f}"
    return text if found.low is None or found.high is None else f"{text} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _status(row: Row) -> str:
    broken = [record for record in row.records if record.status != "success"]
    return "" if not broken else f"{broken[0].status}: {broken[0].reason}"


def _name(row: Row) -> str:
    return f"{row.label} (control)" if row.first.is_control else row.label


def _table(name: str, title: str, rows: Sequence[tuple[dict[str, str], dict[str, object]]]) -> Table:
    """Build a table from (shown, exact) pairs of rows."""
    import pandas

    columns = tuple(dict.fromkeys(column for shown, _ in rows for column in shown))
    frame = pandas.DataFrame([exact for _, exact in rows])
    return Table(name, title, columns, tuple(tuple(shown.get(column, DASH) for column in columns) for shown, _ in rows), frame)


def quality(found: Group) -> Table:
    """Scores, retention and flips against the teacher, task by task."""
    rows = []
    teacher = found.teacher
    for row in ordered(found):
        shown: dict[str, str] = {"row": _name(row), "seeds": str(len(row.done))}
        exact: dict[str, object] = {
            "row": row.label,
            "control": row.first.is_control,
            "seeds": len(row.done),
            "status": _status(row) or "success",
        }
        for task in found.tasks:
            for column, (text, values) in _task_cells(row, teacher, task).items():
                name = column if len(found.tasks) == 1 else f"{task} {column}"
                shown[name] = text
                exact |= {f"{task} {key}": value for key, value in values.items()}
        rows.append((shown, exact))
    tasks = ", ".join(f"{task} (n = {_items(found, task)})" for task in found.tasks)
    return _table("quality", f"Quality on {tasks}", rows)


def _items(found: Group, task: str) -> int:
    return next((score.n for row in found.rows for score in row.scores(task)), 0)


def _task_cells(row: Row, teacher: Row | None, task: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Return column -> (text, exact values) of one row on one task."""
    scores = row.scores(task)
    if not scores:
        return {"score": (DASH, {"score": None}), "retention": (DASH, {"retention": None})}
    if scores[0].kind == "perplexity":
        return _perplexity_cells(scores, teacher.scores(task) if teacher else [])
    value = fmean(score.value for score in scores)
    chance = scores[0].chance
    against = compare(row, teacher, task, ratio=True) if teacher else Interval(None, reason="no teacher row")
    cells: dict[str, tuple[str, dict[str, object]]] = {
        "score": (f"{100 * value:.1f} %", {"score": value}),
        "retention": (_percent(against), {"retention": against.value, "retention low": against.low, "retention high": against.high}),
    }
    if chance:
        above = compare(row, teacher, task, ratio=True, chance=chance) if teacher else Interval(None)
        cells["above chance"] = (
            _percent(above),
            {"above chance": above.value, "above chance low": above.low, "above chance high": above.high},
        )
    if teacher and teacher.outcomes(task):
        reference = teacher.outcomes(task)[0]
        counts = [stats.pairs(reference, outcome) for outcome in row.outcomes(task) if len(outcome) == len(reference)]
        if counts:
            lost, won = fmean(one.teacher_only for one in counts), fmean(one.student_only for one in counts)
            cells["lost/won"] = (f"{lost:.0f}/{won:.0f}", {"lost": lost, "won": won})
    near = [one for record in row.done for one in record.fidelity if one.task == task]
    if near:
        kl, agreement = fmean(one.kl for one in near), fmean(one.agreement for one in near)
        error = fmean(one.kl_stderr for one in near)
        cells["KL"] = (f"{kl:.3f} ± {1.96 * error:.3f}", {"KL": kl, "KL stderr": error})
        cells["same top"] = (f"{100 * agreement:.1f} %", {"same top": agreement})
    tokens = [score.tokens_per_answer for score in scores if score.tokens_per_answer is not None]
    if tokens:
        cells["tokens"] = (f"{fmean(tokens):.1f}", {"tokens": fmean(tokens)})
        invalid = fmean(score.invalid_share for score in scores)
        cells["invalid"] = (f"{100 * invalid:.1f} %", {"invalid": invalid})
    return cells


def _perplexity_cells(scores: list[TaskScore], reference: list[TaskScore]) -> dict[str, tuple[str, dict[str, object]]]:
    """Return a perplexity, and its ratio to the teacher's with an interval over the documents."""
    value = fmean(score.value for score in scores)
    cells: dict[str, tuple[str, dict[str, object]]] = {"perplexity": (f"{value:.2f}", {"perplexity": value})}
    if len(scores) == len(reference) == 1 and scores[0].items_digest == reference[0].items_digest:
        ratio = stats.perplexity_ratio(scores[0].totals, reference[0].totals)
        text = DASH if ratio.value is None else f"x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        cells["against teacher"] = (text, {"ratio": ratio.value, "ratio low": ratio.low, "ratio high": ratio.high})
    elif reference:
        cells["against teacher"] = (f"x{value / reference[0].value:.3f}", {"ratio": value / reference[0].value})
    return cells


def diagnostics(found: Group) -> Table | None:
    """What stands behind the scores: every extractor, both averages, the choices picked, what was cut."""
    rows = []
    for row in ordered(found):
        for task in found.tasks:
            scores = [score for score in row.scores(task) if score.outcomes]
            if not scores:
                continue
            first = scores[0]
            by_extractor = {name: fmean(s.outcomes[name].count("1") / s.n for s in scores) for name in first.outcomes}
            shown = {"row": _name(row), "task": task, "correct by": ", ".join(f"{name} {100 * v:.1f}" for name, v in by_extractor.items())}
            exact: dict[str, object] = {"row": row.label, "task": task, **by_extractor}
            macros = [score.macro for score in scores if score.macro is not None]
            if macros:
                shown["macro"] = f"{100 * fmean(macros):.1f} %"
            picked = {letter: fmean(score.chosen.get(letter, 0.0) for score in scores) for letter in first.chosen}
            if picked:
                shown["picked"] = " ".join(f"{letter} {100 * share:.0f}" for letter, share in picked.items())
            cut = [score.truncated_share for score in scores if score.truncated_share is not None]
            if cut:
                shown["unended"] = f"{100 * fmean(cut):.1f} %"
            if any(score.cut_prompts for score in scores):
                shown["cut prompts"] = f"{fmean(score.cut_prompts for score in scores):.0f}"
            exact |= {"macro": fmean(macros) if macros else None, **{f"picked {letter}": share for letter, share in picked.items()}}
            exact |= {"unended": fmean(cut) if cut else None, "cut prompts": fmean(score.cut_prompts for score in scores)}
            rows.append((shown, exact))
    return _table("diagnostics", "Behind the scores", rows) if rows else None


_MIB = 2**20


class _Line:
    """One row of a table in the making: what is shown, and the exact values beside it."""

    def __init__(self, row: Row) -> None:
        self.shown: dict[str, str] = {"row": _name(row)}
        self.exact: dict[str, object] = {"row": row.label}

    def add(self, column: str, value: float | None, form: Callable[[float], str]) -> None:
        """Add a number; a dash where it was not measured."""
        self.shown[column] = DASH if value is None else form(value)
        self.exact[column] = value

    def add_ratio(self, column: str, found: Interval, verdict: str) -> None:
        """Add a speed ratio, which counts only beside a verdict on quality: none without one, in brackets where quality is lost."""
        shown = DASH
        if found.value is not None and verdict != DASH:
            shown = f"{found.value:.2f}"
            if found.low is not None and found.high is not None:
                shown += f" [{found.low:.2f}, {found.high:.2f}]"
            shown = f"({shown})" if verdict == "no" else shown
        self.shown[column] = shown
        self.exact |= {column: found.value, f"{column} low": found.low, f"{column} high": found.high}


def speed(found: Group) -> Table:
    """Speed beside the verdict on quality: ratios to the teacher by turns, and what a problem takes."""
    rows = []
    for row in ordered(found):
        line = _Line(row)
        verdict = kept(found, row)
        line.shown["keeps 95 %"] = line.exact["keeps 95 %"] = verdict
        for name in ("decode", "prefill"):
            line.add_ratio(f"{name} x", _ratio(row, f"{name}_speedup"), verdict)
        for name in ("decode", "prefill"):
            line.add(f"{name} tok/s", _mean(row, f"{name}_tokens_per_second"), lambda v: f"{v:,.0f}")
        for column, name in (("TTFT ms", "ttft_seconds"), ("TPOT ms", "tpot_seconds")):
            value = _mean(row, name)
            line.add(column, None if value is None else 1000 * value, lambda v: f"{v:.3g}")
        for task in found.tasks:
            mark = "" if len(found.tasks) == 1 else f" {task}"
            line.add(f"s/problem{mark}", _mean(row, f"seconds_per_problem:{task}"), lambda v: f"{v:.3g}")
            line.add(f"s/correct{mark}", _mean(row, f"seconds_per_correct:{task}"), lambda v: f"{v:.3g}")
            length = _length_ratio(row, found.teacher, task)
            if length is not None:
                line.add(f"length x{mark}", length, lambda v: f"{v:.2f}{'' if _BAND[0] <= v <= _BAND[1] else ' !'}")
        rows.append((line.shown, line.exact))
    return _table("speed", f"Speed ({_timed_under(found)})", rows if _timed(found) else _without_dashes(rows))


def _timed(found: Group) -> bool:
    records = [record for row in found.rows for record in row.done]
    return any(record.measured(name) for record in records for name in ("decode_speedup", "decode_tokens_per_second"))


def _without_dashes(rows: list[tuple[dict[str, str], dict[str, object]]]) -> list[tuple[dict[str, str], dict[str, object]]]:
    """Leave out the columns that no row has a value for."""
    filled = {column for shown, _ in rows for column, text in shown.items() if text != DASH}
    empty = {column for shown, _ in rows for column in shown} - filled

    def kept(line: Mapping[str, Any]) -> dict[str, Any]:
        return {column: value for column, value in line.items() if column not in empty}

    return [(kept(shown), kept(exact)) for shown, exact in rows]


_KEEP = 0.95
_BAND = (0.9, 1.1)


def kept(found: Group, row: Row) -> str:
    """Tell whether a row keeps 95 % of the teacher's score on every task: yes, no, cannot tell; a dash without a retention."""
    if row.label == TEACHER:
        return "yes" if row.done else DASH
    verdicts = []
    for task in found.tasks:
        scores = row.scores(task)
        if not scores or scores[0].kind == "perplexity" or found.teacher is None:
            continue
        interval = compare(row, found.teacher, task, ratio=True)
        if interval.low is not None and interval.high is not None:
            verdicts.append("yes" if interval.low >= _KEEP else "no" if interval.high < _KEEP else "cannot tell")
    return next((one for one in ("no", "cannot tell", "yes") if one in verdicts), DASH)


def _length_ratio(row: Row, teacher: Row | None, task: str) -> float | None:
    """Return the tokens of an answer over the teacher's, both as they end by themselves."""
    ours = [score.tokens_per_answer for score in row.scores(task) if score.tokens_per_answer]
    theirs = [score.tokens_per_answer for score in (teacher.scores(task) if teacher else ()) if score.tokens_per_answer]
    return fmean(ours) / fmean(theirs) if ours and theirs else None


def _ratio(row: Row, name: str) -> Interval:
    """Return a speed ratio with its interval: a record's own, or over the seeds where there are three and more."""
    measured = [one for record in row.done if (one := record.measured(name)) is not None]
    if not measured:
        return Interval(None, reason="not measured")
    if len(measured) == 1:
        return Interval(measured[0].value, measured[0].low, measured[0].high)
    return stats.ratio_of_rounds([one.value for one in measured])


def _timed_under(found: Group) -> str:
    conditions = [one.condition for row in found.rows for record in row.done if (one := record.measured("decode_tokens_per_second"))]
    return conditions[0] if conditions else "not timed"


def scenarios(found: Group) -> Table | None:
    """Every point of the timing grid, where there is more than one."""
    rows = []
    for row in ordered(found):
        conditions = dict.fromkeys(
            one.condition for record in row.done for one in record.measurements if one.name == "decode_tokens_per_second"
        )  # fmt: skip
        for condition in conditions:
            line = _Line(row)
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
            line.add("KV MiB", None if kv is None else kv / _MIB, lambda v: f"{v:.2f}")
            rows.append((line.shown, line.exact))
    distinct = {shown["scenario"] for shown, _ in rows}
    return _table("scenarios", "Speed by scenario", rows) if len(distinct) > 1 else None


def memory(found: Group) -> Table | None:
    """Bytes: on disk, of weights in memory, of keys and values, of the rest, and at the peak."""
    rows = []
    base = {name: _mean(found.teacher, name) for name in ("weight_bytes_disk", "weight_bytes_resident")}
    for row in ordered(found):
        line = _Line(row)

        def add(column: str, name: str, line: _Line = line, row: Row = row) -> None:
            value = _mean(row, name)
            line.add(column, None if value is None else value / _MIB, lambda v: f"{v:,.2f}")

        for column, name in (("disk", "weight_bytes_disk"), ("weights", "weight_bytes_resident")):
            add(f"{column} MiB", name)
            own, theirs = _mean(row, name), base[name]
            line.add(f"{column} x", theirs / own if theirs and own else None, lambda v: f"{v:.2f}")
        add("KV MiB", "kv_bytes")
        add("activations MiB", "activation_bytes")
        for kind, column in (("resident", "peak MiB"), ("allocated", "peak MiB"), ("reserved", "reserved MiB")):
            if any(_mean(one, f"decode_peak_bytes:{kind}") is not None for one in found.rows):
                values = [v for phase in ("prefill", "decode") if (v := _mean(row, f"{phase}_peak_bytes:{kind}")) is not None]
                line.add(column, max(values) / _MIB if values else None, lambda v: f"{v:,.2f}")
        load = _mean(row, "load_seconds")
        line.add("load s", load, lambda v: f"{v:.3g}")
        line.add("first call s", _mean(row, "first_call_seconds"), lambda v: f"{v:.3g}")
        rows.append((line.shown, line.exact))
    weighed = any(text != DASH for shown, _ in rows for column, text in shown.items() if column != "row")
    return _table("memory", f"Memory ({_timed_under(found)})", rows) if weighed else None


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
        line = _Line(row)

        def mean(of: Callable[[Cost], float | None], costs: Sequence[Cost] = costs) -> float | None:
            values = [value for one in costs if (value := of(one)) is not None]
            return fmean(values) if values else None

        line.add("seen", mean(lambda one: one.seen_tokens or None), lambda v: f"{v:,.0f}")
        line.add("trained", mean(lambda one: one.trained_tokens or None), lambda v: f"{v:,.0f}")
        if any(record.tuned for each in found.rows for record in each.records):
            line.add("rate", _rate(row), lambda v: f"{v:g}")
        line.add("train s", mean(lambda one: one.seconds), lambda v: f"{v:.1f}")
        line.add("device s", mean(lambda one: one.device_seconds or None), lambda v: f"{v:.1f}")
        line.add("FLOPs", mean(lambda one: one.flops or None), lambda v: f"{v:.2e}")
        line.add("peak MiB", mean(lambda one: None if one.peak_bytes is None else one.peak_bytes / _MIB), lambda v: f"{v:,.0f}")
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
    return _table("training", title, rows) if rows else None


def chains(found: Group) -> Table | None:
    """Every chain stage by stage, and the product of its parts beside the measured whole."""
    rows = []
    for row in ordered(found):
        record = next((one for one in row.done if one.stages), None)
        if record is None:
            continue
        for stage in record.stages:
            line = _Line(row)
            line.shown["stage"] = line.exact["stage"] = stage.label
            own = next((other for other in found.rows if other.label == stage.label), None)
            for task in found.tasks:
                column = "retention" if len(found.tasks) == 1 else f"{task} retention"
                kept_here = compare(own, found.teacher, task, ratio=True) if own is not None and found.teacher else Interval(None)
                line.shown[column], line.exact[column] = _percent(kept_here), kept_here.value
                last = stage is record.stages[-1]
                line.add(f"{column} of the parts", _product(found, record, task) if last else None, lambda v: f"{100 * v:.1f} %")
            line.add("MiB", None if stage.simulated else stage.weight_bytes / _MIB, lambda v: f"{v:,.2f}")
            speed_of = None if own is None else _ratio(own, "decode_speedup").value
            line.add("decode x", speed_of, lambda v: f"{v:.2f}")
            line.add("stage s", stage.cost.seconds or None, lambda v: f"{v:.1f}")
            rows.append((line.shown, line.exact))
    return _table("chains", "Chains, stage by stage", _without_dashes(rows)) if rows else None


def _span(values: Sequence[float], form: str, unit: str) -> str:
    if not values:
        return DASH
    low, high = format(min(values), form), format(max(values), form)
    return f"{low} {unit}".rstrip() if low == high else f"{low} to {high} {unit}".rstrip()


def claimed(found: Group) -> Table | None:
    """The table that comparisons of methods begin with, measured: per family and for chains, beside what is claimed and published."""
    if not any(row.first.family in (*COMPRESSED, *CHAINS) for row in found.rows):
        return None
    rows = []
    order, chance = cost_order(found), at_chance(found)
    for claim in CLAIMS:
        measured = rows_of(found, claim.families)
        told = verdicts(claim, measured, chance=chance) if measured else {}
        told["cost"] = order.get(claim.name, "not testable here")
        values = dict(spans(measured))
        if chance:
            values["retention"] = []
        for column, field, form, unit, ends in (
            ("retention", "retention_pct", ".1f", "%", claim.retention), ("speed", "speedup", ".2f", "x", claim.speed),
            ("memory", "memory_ratio", ".2f", "x", claim.memory), ("cost", "", ".1f", "s", None),
        ):  # fmt: skip
            others = published(claim.published, field) if field else None
            shown = {
                "method": claim.name, "quantity": _QUANTITIES[column], "measured": _span(values[column], form, unit),
                "claimed": claim.cost if ends is None else f"{ends[0]:g} to {ends[1]:g} {unit}",
                "published": DASH if others is None else _span(others, form, unit), "verdict": told.get(column, "not testable here"),
            }  # fmt: skip
            rows.append((shown, _span_exact(shown, values[column])))
        shown = {"method": claim.name, "quantity": "all at once", "measured": DASH, "claimed": "the low ends together", "published": DASH,
                 "verdict": told.get("all at once", "not testable here")}  # fmt: skip
        rows.append((shown, _span_exact(shown, [])))
    chained = dict(spans(rows_of(found, CHAINS)))
    if chance:
        chained["retention"] = []
    for column, field, form, unit in (
        ("retention", "retention_pct", ".1f", "%"), ("speed", "speedup", ".2f", "x"), ("memory", "memory_ratio", ".2f", "x"),
        ("cost", "", ".1f", "s"),
    ):  # fmt: skip
        others = published(("combo", "prune+distil"), field) if field else None
        shown = {"method": "Chains", "quantity": _QUANTITIES[column], "measured": _span(chained[column], form, unit), "claimed": DASH,
                 "published": DASH if others is None else _span(others, form, unit), "verdict": DASH}  # fmt: skip
        rows.append((shown, _span_exact(shown, chained[column])))
    return _table("claims", "What is claimed, published, and measured here", rows)


_QUANTITIES = {"retention": "accuracy retention", "speed": "decode speedup", "memory": "memory reduction (disk)", "cost": "training cost"}


def _span_exact(shown: Mapping[str, str], values: Sequence[float]) -> dict[str, object]:
    ends: dict[str, object] = {"low": min(values) if values else None, "high": max(values) if values else None}
    return {**shown, **ends}


def _product(found: Group, record: RunRecord, task: str) -> float | None:
    """Return retention of the chain without its last stage times that of the last stage alone, where both have rows.

    None where the last stage trains: alone it would start from another student.
    """
    if record.stages[-1].cost.seen_tokens:
        return None
    parts = (record.stages[-2].label, record.stages[-1].label.removeprefix(record.stages[-2].label + "+"))
    rows = [next((row for row in found.rows if row.label == part), None) for part in parts]
    kept_of = [compare(row, found.teacher, task, ratio=True).value if row and found.teacher else None for row in rows]
    first, last = kept_of
    return None if first is None or last is None else first * last


def _rate(row: Row) -> float | None:
    """Return the learning rate of a row: the chosen one, else the set one."""
    record = row.done[0]
    found = record.cost.notes.get("learning_rate", record.settings.get("learning_rate"))
    return float(found) if isinstance(found, (int, float)) else None


def _mean(row: Row | None, name: str) -> float | None:
    found = [one.value for record in (row.done if row else ()) if (one := record.measured(name)) is not None]
    return fmean(found) if found else None


def controls(found: Group) -> Table | None:
    """Each method against the controls that it needs: difference in points on the same items."""
    rows = []
    for row in ordered(found):
        for name in row.first.controls:
            for control in _controls_of(row, [other for other in found.rows if other.first.method == name]):
                rows += [_gap(row, control, task) for task in found.tasks]
    return _table("controls", "Against the controls, on the same items", rows) if rows else None


def _gap(row: Row, reference: Row, task: str) -> tuple[dict[str, str], dict[str, object]]:
    """Return a line of two rows' difference on a task: as shown, and exact."""
    gap = compare(row, reference, task, ratio=False)
    if gap.value is None or gap.low is None or gap.high is None:
        verdict = DASH if not gap.reason else f"- ({gap.reason})"
    else:
        verdict = "better" if gap.low > 0 else "worse" if gap.high < 0 else "cannot tell"
    pair = {"row": row.label, "against": reference.label, "task": task}
    exact: dict[str, object] = {**pair, "difference": gap.value, "low": gap.low, "high": gap.high, "verdict": verdict}
    return {**pair, "difference (points)": _points(gap), "verdict": verdict}, exact


def against(found: Group, label: str) -> Table | None:
    """Every row against one named row: difference in points on the same items."""
    named = next((row for row in found.rows if row.label == label), None)
    others = [row for row in ordered(found) if named is not None and row.label != label and row.done]
    rows = [_gap(row, named, task) for row in others for task in found.tasks] if named is not None else []
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return _table(f"against-{name}", f"Against {label}, on the same items", rows) if rows else None


def _controls_of(row: Row, candidates: list[Row]) -> list[Row]:
    """Of several rows of one control keep those nearest to this row: the most settings alike, what it handed on first of all."""
    own = {**row.first.settings, **row.first.handed_on}

    def alike(control: Row) -> int:
        return sum(own[name] == value for name, value in control.first.settings.items() if name in own)

    most = max(map(alike, candidates), default=0)
    return [one for one in candidates if alike(one) == most]


def notes(found: Group) -> list[str]:
    """What a reader must know to trust the table: conditions, resolution, reasons for dashes."""
    shared = found.shared
    student, budget = shared.get("student", "none"), shared.get("budget", "nothing was trained")
    lines = [
        f"Teacher {shared['teacher']}, student {student}; {budget} for each trained row "
        "(`answer-only` by default sees each item as often as `sft` does, in fewer tokens).",
        f"Device {shared['device']} ({shared.get('machine', '-')}, {shared.get('threads', '-')} threads), {shared['dtype']}; "
        f"scoring path {shared.get('path', '-')}; {shared['tasks']}.",
    ]
    for task in found.tasks:
        teacher = found.teacher
        if teacher is None:
            lines.append("The teacher's row did not succeed: no retention can be given.")
            break
        reference = next(iter(teacher.outcomes(task)), "")
        lines += _warnings(found, task)
        flips = [
            (counts.teacher_only + counts.student_only) / counts.n
            for row in found.rows
            if row.first.method != TEACHER
            for counts in [stats.pairs(reference, outcome) for outcome in row.outcomes(task) if len(outcome) == len(reference)]
        ]
        if flips:
            share = sorted(flips)[len(flips) // 2]
            drop = stats.smallest_drop(len(reference), share)
            lines.append(
                f"{task}: with {len(reference)} items and the median share of flips here ({100 * share:.0f} %) one seed shows drops from "
                f"{100 * (drop or 0):.1f} points on."
            )
    if shared["prompts"]:
        lines.append(f"Prompts are shown in the {shared['prompts']}.")
    if shared["limited"]:
        lines.append("A TRIAL: scored on a sample of the items (--limit); not for quoting, and no baseline.")
    unpacked = dict.fromkeys(
        f"{one.name}: {one.note}." for row in found.rows for record in row.records for one in record.teachers if one.note
    )
    lines += [*unpacked]
    for row in found.rows:
        for record in row.records:
            if record.status != "success":
                seed = f" (seed {record.seed})" if record.seed is not None else ""
                lines.append(f"{row.label}{seed} {record.status}: {record.reason}")
    if found.superseded:
        lines.append(f"{found.superseded} older records of the same rows are not shown.")
    lines += _remarks(found)
    for row in found.rows:
        for task in found.tasks:
            against = compare(row, found.teacher, task, ratio=True) if found.teacher else Interval(None)
            if row.done and against.reason:
                lines.append(f"{row.label}, {task}: no retention, {against.reason}.")
    lines.append("A dash: not measured for this row (no training, no teacher, a choice task writes no tokens), or undefined there.")
    return lines


def _remarks(found: Group) -> list[str]:
    """Say which measurements are doubtful and why, each reason once with the rows that it concerns."""
    rows: dict[str, list[str]] = {}
    for row in found.rows:
        for record in row.done:
            for one in record.measurements:
                if one.remark and row.label not in rows.setdefault(one.remark, []):
                    rows[one.remark].append(row.label)
    dirty = [(reason, names) for reason, names in sorted(rows.items())]
    return [f"Measured, {', '.join(names)}: {reason}." for reason, names in dirty]


def _warnings(found: Group, task: str) -> list[str]:
    """Say what else bears on a task's figures: a teacher with nothing to teach, the noise floor, cut prompts, what the scorer told."""
    lines = []
    before = next((score for row in found.rows if row.first.method == "untouched" for score in row.scores(task)), None)
    best = next((score for score in (found.teacher.scores(task) if found.teacher else ())), None)
    if before is not None and best is not None and best.primary and best.value <= before.value and before.kind != "perplexity":
        taught = [row.label for row in found.rows if row.first.family == "distillation" and row.done]
        lines.append(
            f"{task}, {', '.join(taught)}: WARNING: the teacher ({100 * best.value:.1f} %) is not better than the student was before any "
            f"training ({100 * before.value:.1f} %), so it has little to teach here."
        )
    floor = next((one for record in (found.teacher.done if found.teacher else ()) if (one := record.measured(f"noise_flips:{task}"))), None)
    if floor is not None:
        items = int(floor.values[0])
        lines.append(
            f"{task}: noise floor: the teacher against itself ({floor.condition}) flips {floor.value * items:.0f} of {items} items."
        )
    for row in found.rows:
        for score in row.scores(task)[:1]:
            if score.cut_prompts:
                lines.append(f"{task}, {row.label}: {score.cut_prompts} requests were longer than the context and lost tokens on the left.")
            lines += [f"{task}, {row.label}: {note}." for note in score.notes]
    return lines


def tables(found: Group, price: float | None = None, references: Sequence[str] = ()) -> list[Table]:
    """All tables of a group of records; `price` is money per device-hour, `references` are rows to stand every row against."""
    every = (
        quality(found), controls(found), chains(found), speed(found), scenarios(found), memory(found), training(found, price),
        claimed(found), diagnostics(found), *(against(found, label) for label in references),
    )  # fmt: skip
    return [table for table in every if table is not None]


_WORDS = {
    "row", "stage", "method", "quantity", "claimed", "published", "measured", "against", "task", "verdict", "correct by", "picked",
    "keeps 95 %", "scenario",
}  # fmt: skip


def markdown(records: Sequence[RunRecord], *, price: float | None = None, references: Sequence[str] = ()) -> str:
    """Return every table of these records as one Markdown page."""
    from tabulate import tabulate

    parts: list[str] = []
    for found in group(records):
        names = ", ".join(task.partition("@")[0] for task in found.shared["tasks"].split(", "))
        parts.append(f"## {names}: {found.shared['teacher']} to {found.shared.get('student', 'itself')}\n")
        for table in tables(found, price, references):
            alignment = ["left" if column in _WORDS else "right" for column in table.columns]
            text = tabulate(table.rows, headers=table.columns, tablefmt="pipe", colalign=alignment, disable_numparse=True)
            parts.append(f"**{table.title}**\n\n{text}\n")
        parts.append("\n".join(f"- {line}" for line in notes(found)) + "\n")
    return "\n".join(parts)


def weighed_tables(models: Sequence[tuple[str, Sequence[Measurement], Sequence[str]]]) -> str:
    """Return what `harness measure` prints: (name, measurements, skipped scenarios) of each model, the first one the base."""
    from tabulate import tabulate

    timed, weighed, lines = [], [], []
    for number, (name, found, skipped) in enumerate(models):
        by = {(one.name, one.condition): one for one in found}
        first = {one.name: one for one in reversed(found)}

        def show(one: Measurement | None, form: str = ".3g", scale: float = 1.0) -> str:
            return DASH if one is None else format(one.value * scale, form)

        for condition in dict.fromkeys(one.condition for one in found if one.name == "decode_tokens_per_second"):
            row: dict[str, str] = {"model": name, "scenario": condition}
            for column, key, form, scale in (
                ("TTFT ms", "ttft_seconds", ".3g", 1000.0), ("TPOT ms", "tpot_seconds", ".3g", 1000.0),
                ("p90 gap ms", "itl_p90_seconds", ".3g", 1000.0),
                ("prefill tok/s", "prefill_tokens_per_second", ",.0f", 1.0), ("decode tok/s", "decode_tokens_per_second", ",.0f", 1.0),
                ("end to end s", "end_to_end_seconds", ".3g", 1.0), ("KV MiB", "kv_bytes", ",.2f", 1 / _MIB),
                ("peak MiB", "decode_peak_bytes:resident", ",.1f", 1 / _MIB),
            ):  # fmt: skip
                one = by.get((key, condition)) or (by.get(("decode_peak_bytes:allocated", condition)) if "peak" in key else None)
                row[column] = show(one, form, scale)
            for part in ("prefill", "decode"):
                ratio = by.get((f"{part}_speedup", condition))
                ends = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio and ratio.low is not None and ratio.high is not None else ""
                row[f"{part} x"] = "base" if number == 0 else f"{show(ratio, '.2f')}{ends}"
            timed.append(row)
        columns = (("disk MiB", "weight_bytes_disk", ",.2f", 1 / _MIB), ("weights MiB", "weight_bytes_resident", ",.2f", 1 / _MIB),
                   ("activations MiB", "activation_bytes", ",.2f", 1 / _MIB), ("load s", "load_seconds", ".3g", 1.0),
                   ("first call s", "first_call_seconds", ".3g", 1.0))  # fmt: skip
        weighed.append({"model": name, **{column: show(first.get(key), form, scale) for column, key, form, scale in columns}})
        remarks = dict.fromkeys(one.remark for one in found if one.remark)
        lines += [f"- {name}: doubtful: {remark}" for remark in remarks] + [f"- {name}: skipped: {reason}" for reason in skipped]
    parts = [tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True) for rows in (timed, weighed) if rows]
    if timed and len(models) > 1:
        lines.append("- A decode x above 1 is faster than the base; an interval that holds 1 shows no difference.")
    return "\n\n".join([*parts, "\n".join(lines)]) if lines else "\n\n".join(parts)


def write_tables(records: Sequence[RunRecord], folder: Path, *, price: float | None = None, references: Sequence[str] = ()) -> list[Path]:
    """Write `table.md` and one CSV per table; return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "table.md"]
    written[0].write_text(markdown(records, price=price, references=references), encoding="utf-8", newline="\n")
    groups = group(records)
    for number, found in enumerate(groups, 1):
        for table in tables(found, price, references):
            path = folder / (f"{table.name}.csv" if len(groups) == 1 else f"{table.name}-{number}.csv")
            table.frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
            written.append(path)
    return written


def glossary() -> str:
    """Return the meaning of every column."""
    width = max(map(len, GLOSSARY))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in GLOSSARY.items())
