"""Every table of a set of records, in Markdown, CSV, LaTeX and JSON: the same records give the same bytes anywhere. No torch.

Records are grouped before anything is compared: rows of one table share teacher, student shape, budget, device,
dtype, scoring path, machine and task versions. What was not measured is a dash, and a note says why.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint import write_whole
from harness.claims import chains, claimed
from harness.costs import memory, scenarios, speed, timed_under, timing_of, training
from harness.escape import clean_all, markdown_text, tex, tex_comment
from harness.groups import TEACHER, Group, by_chance, compare, group, leaders
from harness.quality import against, controls, diagnostics, quality
from harness.record import Measurement, RunRecord
from harness.stats import Interval
from harness.table import DASH, MIB, Best, Table, cell_of, finite, mebibytes


def notes(found: Group) -> list[str]:
    """What a reader must know to trust the table: conditions, resolution, reasons for dashes."""
    shared = found.shared
    student, budget = _student(found) or "none", shared.get("budget")
    fewer = "(`answer-only` by default sees each item as often as `sft` does, in fewer tokens)"
    trained = f", student {student}; {budget} for each trained row {fewer}" if budget else "; nothing was trained"
    gpu = f"{shared['gpu']}; " if shared.get("gpu") else ""
    lines = [
        f"Teacher {shared['teacher']}{trained}.",
        f"Device {shared['device']} ({gpu}{shared.get('machine', '-')}, {shared.get('threads', '-')} threads), {shared['dtype']}; "
        f"scoring path {shared.get('path', '-')}; {shared['tasks']}.",
    ]
    for task in found.tasks:
        teacher = found.teacher
        if teacher is None:
            lines.append("The teacher's row did not succeed: no retention can be given.")
            break
        lines += _kind_of_figure(found, task)
        lines += _warnings(found, task)
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
    lines += _packed(found)
    lines += _trained_once(found)
    lines += _unequal_to_itself(found)
    lines += _no_better(found)
    lines += _untaught(found, "tasks_without_trace", "WARNING: not trained, no trace survived: ")
    lines += _untaught(found, "tasks_without_split", "not trained on: ")
    lines += _remarks(found)
    others = [row.label for row in found.rows if timing_of(row) not in ("", timed_under(found))]
    if others:
        said = f" ({', '.join(dict.fromkeys(timing_of(row) for row in found.rows if row.label in others))})"
        lines.append(f"{', '.join(others)}: timed under another scenario than the table's{said}: dashes.")
    for row in found.rows:
        for task in found.tasks:
            against = compare(row, found.teacher, task, ratio=True) if found.teacher else Interval(None)
            asked = any(score.retains for score in row.scores(task))
            if row.done and asked and against.reason:
                lines.append(f"{row.label}, {task}: no retention, {against.reason}.")
    if any(leaders(found, task) for task in found.tasks):
        lines.append("Bold: the best row that is no control, and all that are not significantly worse on the same items (alpha .05, Holm).")
    if any(row.first.controls for row in found.rows):
        lines.append("Verdicts against controls hold for the whole table (Holm, alpha .05); each interval is of its line alone.")
    lines.append("A dash: not measured for this row (no training, no teacher, a choice task writes no tokens), or undefined there.")
    return lines


def _kind_of_figure(found: Group, task: str) -> list[str]:
    """Say of a task what is not as it is with right and wrong answers: why nothing is paired, which way is better, what counts how much."""
    scores = [score for row in found.rows for score in row.scores(task)]
    lines = [f"{task}: no retention and no flips: {why}." for why in dict.fromkeys(score.unpaired for score in scores) if why]
    first = scores[0] if scores else None
    if first is not None and first.kind != "perplexity" and first.lower_is_better:
        lines.append(f"{task}: {first.metric or first.primary} is better when lower: it stands under error, and a ratio below 1 is better.")
    if any(score.values for score in scores) and not any(score.unpaired for score in scores):
        lines.append(f"{task}: items carry numbers, so intervals are those of paired means and there are no flips.")
    if first is not None and first.form:
        lines.append(
            f"{task}: all items make its {first.metric} together; its intervals are of items drawn again, the same for both models."
        )
    if first is not None and first.signed:
        lines.append(f"{task}: no retention: {first.metric} may be below zero, and a ratio of two says nothing; see the difference.")
    if any(score.parts and (not score.form or len({weight for _, weight in score.parts}) > 1) for score in scores):
        lines.append(f"{task}: its {len(next(score.parts for score in scores if score.parts))} tasks count alike, whatever their size.")
    return lines


def _packed(found: Group) -> list[str]:
    """Say of every row whose weights were packed how many bits they take, and what table and head became."""
    lines = []
    for row in found.rows:
        for told in row.done[0].cost.notes.values() if row.done else ():
            if not isinstance(told, dict) or "bits_per_weight" not in told:
                continue
            each = f" ({told['bits_of_a_packed_weight']:g} in the blocks)" if "bits_of_a_packed_weight" in told else ""
            head = {"int8": "; table and head in int8", "skip": "; table and head as they were"}.get(str(told.get("table_and_head")), "")
            skipped = told.get("skipped")
            left = f"; left as they were: {', '.join(map(str, skipped))}" if isinstance(skipped, list) and skipped else ""
            lines.append(f"{row.label}: {told['bits_per_weight']:g} bits on disk for each weight of the model{each}{head}{left}.")
    return lines


def _no_better(found: Group) -> list[str]:
    """Name the trained rows that no epoch made better, on held-out rows, than they were before the first step."""
    lines = []
    for row in found.rows:
        for record in row.done:
            start, best = (record.cost.notes.get(name) for name in ("start_ce", "best_ce"))
            if isinstance(start, float) and isinstance(best, float) and best >= start:
                seed = f" (seed {record.seed})" if record.seed is not None else ""
                lines.append(
                    f"{row.label}{seed}: no epoch's held-out loss was below that of the untouched start ({best:.4g} against {start:.4g})"
                    f"{'' if record.tuned else '; try --tune'}."
                )
    return lines


def _trained_once(found: Group) -> list[str]:
    """Name the rows of which one draw was made: their checkpoints are judged, their methods are not."""
    once = [row.label for row in found.rows if row.trained_once]
    if not once:
        return []
    return [
        f"{', '.join(once)}: one training (or draw) each. Retention is of this checkpoint; whether the method is better than another one "
        "is not judged, and nothing stands in bold beside it: --seeds 3 asks for more."
    ]


def _unequal_to_itself(found: Group) -> list[str]:
    """Say where the teacher, timed by turns with itself, was not as fast as itself: one interval in twenty misses 1 by chance."""
    lines = []
    for record in found.teacher.done if found.teacher else ():
        for one in record.measurements:
            if one.name.endswith("_speedup") and one.low is not None and one.high is not None and not one.low <= 1 <= one.high:
                lines.append(
                    f"The teacher beside itself: {one.name.removesuffix('_speedup')} x{one.value:.4f} [{one.low:.4f}, {one.high:.4f}] "
                    f"misses 1 ({one.condition}); one in twenty such intervals does by chance, more say that the machine was not quiet."
                )
    return lines


def _untaught(found: Group, note: str, said: str) -> list[str]:
    """Name the rows that were trained without one of the table's tasks: no trace survived there, or it has no train split."""
    told = [(row.label, record.cost.notes.get(note)) for row in found.rows for record in row.done]
    return list(
        dict.fromkeys(
            f"{task}, {label}: {said}{why}."
            for label, tasks in told if isinstance(tasks, dict) for task, why in tasks.items()
        )
    )  # fmt: skip


def _remarks(found: Group) -> list[str]:
    """Say which measurements are doubtful and why, each reason once with the rows that it concerns."""
    rows: dict[str, list[str]] = {}
    for row in found.rows:
        for record in row.done:
            for one in record.measurements:
                if one.remark and not one.name.startswith("noise_flips") and row.label not in rows.setdefault(one.remark, []):
                    rows[one.remark].append(row.label)
    dirty = [(reason, names) for reason, names in sorted(rows.items())]
    return [f"Measured, {', '.join(names)}: {reason}." for reason, names in dirty]


def _nothing_to_teach(found: Group, task: str) -> list[str]:
    """Warn of distilled rows whose teachers were, on this task, no better than the student before any training."""
    before = next((score for row in found.rows if row.first.is_starting_point for score in row.scores(task)), None)
    teachers = {
        record.teachers[0].name if row is found.teacher and record.teachers else row.label.removeprefix("teacher "): score
        for row in found.rows
        if row.first.method == TEACHER and row.done
        for record, score in zip(row.done[:1], row.scores(task)[:1], strict=False)
    }
    if before is None or not before.primary or before.lower_is_better:
        return []
    poor: dict[str, list[str]] = {}
    for row in found.rows:
        told = row.done[0].cost.notes.get("taught_by") if row.done else []
        if not isinstance(told, list):  # a record of before this was noted
            told = [row.first.settings.get("teacher") or next(iter(teachers), "")] if row.first.family == "distillation" else []
        known = [teachers[name] for name in told if isinstance(name, str) and name in teachers and row.first.family != "chain"]
        best = max(known, key=lambda score: score.value, default=None)
        if best is not None and best.value <= before.value:
            name = next(name for name, score in teachers.items() if score is best)
            poor.setdefault(f"{name} ({best.shown(best.value)})", []).append(row.label)
    return [
        f"{task}, {', '.join(rows)}: WARNING: the teacher {teacher} is not better than the student was before any training "
        f"({before.shown(before.value)}), so it has little to teach here."
        for teacher, rows in poor.items()
    ]


def _warnings(found: Group, task: str) -> list[str]:
    """Say what else bears on a task's figures: a teacher with nothing to teach, the noise floor, cut prompts, what the scorer told."""
    lines = _nothing_to_teach(found, task)
    if found.teacher and by_chance(found, task):
        score = found.teacher.scores(task)[0]
        lines.append(
            f"{task}: teacher at chance ({score.shown(score.value)} of {score.n}, guessing gives {100 * score.chance:.1f} %): no retention "
            "means anything, and none is shown; read KL, same top, perplexity, speed and bytes."
        )
    floor = next((one for record in (found.teacher.done if found.teacher else ()) if (one := record.measured(f"noise_flips:{task}"))), None)
    if floor is not None and not floor.values:
        lines.append(f"{task}: no noise floor: {floor.remark}.")
    elif floor is not None:
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
    "keeps 95 %", "scenario", "family",
}  # fmt: skip


def mixed(groups: Sequence[Group]) -> list[str]:
    """Say why records of the same tasks stand in several tables: every field that differs, with its values."""
    lines = []
    for names in dict.fromkeys(map(_task_names, groups)):
        alike = [found for found in groups if _task_names(found) == names]
        fields = dict.fromkeys(field for found in alike for field in found.shared)
        differing = {field: sorted({found.shared.get(field, "") for found in alike}) for field in fields}
        told = [f"{name} ({' | '.join(one[:60] or 'none' for one in values)})" for name, values in differing.items() if len(values) > 1]
        if told:
            lines.append(f"The records of {names} stand in {len(alike)} tables, since a column never mixes: {'; '.join(told)}.")
    return lines


def _task_names(found: Group) -> str:
    return ", ".join(task.partition("@")[0] for task in found.shared["tasks"].split(", "))


def heading(found: Group) -> str:
    """Name a group of tables: its tasks, its teacher and, where a row started from one, the student."""
    return f"{_task_names(found)}: {found.shared['teacher']}{f' to {student}' if (student := _student(found)) else ''}"


def _student(found: Group) -> str:
    """Name the student that rows of these tables were trained from or are; "" where every row was made from the teacher itself."""
    started = any(row.first.trains or row.first.is_starting_point for row in found.rows)
    return found.shared.get("student", "") if started else ""


@dataclass(frozen=True)
class Asked:
    """What a reader of tables may ask for."""

    price: float | None = None  # money per device-hour
    references: tuple[str, ...] = ()  # rows to stand every row against
    sort: str | None = None  # a column; best first


PLAIN = Asked()


@dataclass(frozen=True)
class Made:
    """Everything that is said of one group of records."""

    found: Group
    heading: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def made_of(records: Sequence[RunRecord], asked: Asked = PLAIN) -> list[Made]:
    """Build every table of these records once, as a reader asked for them; the forms below only write them down."""
    built = []
    for found in group(records):
        every = tables(found, asked.price, asked.references)
        every = [table.ordered_by(asked.sort) for table in every] if asked.sort else every
        built.append(Made(found, heading(found), tuple(every), tuple(notes(found))))
    return built


def columns_of(made: Sequence[Made]) -> list[str]:
    """Return the columns that rows can be ordered by: those of tables with blocks."""
    return list(dict.fromkeys(column for one in made for table in one.tables if any(table.blocks) for column in table.columns))


def markdown(records: Sequence[RunRecord], asked: Asked = PLAIN) -> str:
    """Return every table of these records as one Markdown page."""
    return as_markdown(made_of(records, asked))


def as_markdown(made: Sequence[Made]) -> str:
    """Return tables as one Markdown page."""
    from tabulate import tabulate

    parts = [_listed(lines)] if (lines := mixed([one.found for one in made])) else []
    for one in made:
        parts.append(f"## {markdown_text(one.heading)}\n")
        for table in one.tables:
            alignment = ["left" if column in _WORDS else "right" for column in table.columns]
            rows = [[f"**{cell_of(cell)}**" if isinstance(cell, Best) else cell_of(cell) for cell in row] for row in table.rows]
            headers = [*map(cell_of, table.columns)]
            text = tabulate(rows, headers=headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)
            parts.append(f"**{markdown_text(table.title)}**\n\n{text}\n")
        parts.append(_listed(one.notes))
    return "\n".join(parts)


def _listed(lines: Sequence[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {markdown_text(line)}" for line in lines) + "\n"


def as_latex(made: Sequence[Made]) -> str:
    """Return tables as LaTeX (booktabs): a rule between families, bold where the others are bold."""
    parts = ["% \\usepackage{booktabs}; made by harness report\n"]
    for one in made:
        for table in one.tables:
            layout = "".join("l" if column in _WORDS else "r" for column in table.columns)
            lines = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", " & ".join(map(tex, table.columns)) + r" \\", r"\midrule"]
            for at, row in enumerate(table.rows):
                if at and table.blocks[at] != table.blocks[at - 1]:
                    lines.append(r"\midrule")
                lines.append(" & ".join(rf"\textbf{{{tex(cell)}}}" if isinstance(cell, Best) else tex(cell) for cell in row) + r" \\")
            lines += [r"\bottomrule", r"\end{tabular}"]
            parts.append(f"% {tex_comment(f'{one.heading}: {table.title}')}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def as_json(made: Sequence[Made]) -> str:
    """Return tables as JSON: what is shown, the exact values behind it, conditions and notes."""
    told = [
        {
            "heading": one.heading,
            "shared": dict(one.found.shared),
            "notes": one.notes,
            "tables": [
                {
                    "name": table.name, "title": table.title, "columns": table.columns, "rows": table.rows, "blocks": table.blocks,
                    "best": [[isinstance(cell, Best) for cell in row] for row in table.rows], "exact": table.exact,
                }
                for table in one.tables
            ],
        }
        for one in made
    ]  # fmt: skip
    whole = finite({"schema": 1, "mixed": mixed([one.found for one in made]), "groups": told})
    return json.dumps(clean_all(whole), indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n"


FORMS = ("md", "csv", "tex", "json")


def write_tables(records: Sequence[RunRecord], folder: Path, asked: Asked = PLAIN, *, forms: Sequence[str] = FORMS) -> list[Path]:
    """Write `table.md`, `tables.tex`, `tables.json` and one CSV per table; return what was written."""
    return write_made(made_of(records, asked), folder, forms=forms)


def write_made(made: Sequence[Made], folder: Path, *, forms: Sequence[str] = FORMS) -> list[Path]:
    """Write tables that were built, in the forms asked for; return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for form, name, make in (("md", "table.md", as_markdown), ("tex", "tables.tex", as_latex), ("json", "tables.json", as_json)):
        if form in forms:
            written.append(folder / name)
            write_whole(written[-1], make(made))
    for number, one in enumerate(made if "csv" in forms else (), 1):
        for table in one.tables:
            path = folder / (f"{table.name}.csv" if len(made) == 1 else f"{table.name}-{number}.csv")
            table.to_csv(path)
            written.append(path)
    return written


def weighed_tables(models: Sequence[tuple[str, Sequence[Measurement], Sequence[str]]]) -> str:
    """Return what `harness measure` prints: (name, measurements, skipped scenarios) of each model, the first one the base."""
    from tabulate import tabulate

    timed, weighed, lines = [], [], []
    for number, (name, found, skipped) in enumerate(models):
        by = {(one.name, one.condition): one for one in found}
        first = {one.name: one for one in reversed(found)}

        def show(one: Measurement | None, form: str = ".3g", scale: float = 1.0) -> str:
            if one is None:
                return DASH
            return mebibytes(one.value * scale) if form == ",.2f" else format(one.value * scale, form)

        for condition in dict.fromkeys(one.condition for one in found if one.name == "decode_tokens_per_second"):
            row: dict[str, str] = {"model": cell_of(name), "scenario": cell_of(condition)}
            for column, key, form, scale in (
                ("TTFT ms", "ttft_seconds", ".3g", 1000.0), ("TPOT ms", "tpot_seconds", ".3g", 1000.0),
                ("p90 gap ms", "itl_p90_seconds", ".3g", 1000.0),
                ("prefill tok/s", "prefill_tokens_per_second", ",.0f", 1.0), ("decode tok/s", "decode_tokens_per_second", ",.0f", 1.0),
                ("end to end s", "end_to_end_seconds", ".3g", 1.0), ("KV MiB", "kv_bytes", ",.2f", 1 / MIB),
                ("peak MiB", "decode_peak_bytes:resident", ",.1f", 1 / MIB),
            ):  # fmt: skip
                one = by.get((key, condition)) or (by.get(("decode_peak_bytes:allocated", condition)) if "peak" in key else None)
                row[column] = show(one, form, scale)
            for part in ("prefill", "decode"):
                ratio = by.get((f"{part}_speedup", condition))
                ends = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio and ratio.low is not None and ratio.high is not None else ""
                row[f"{part} x"] = "base" if number == 0 else f"{show(ratio, '.2f')}{ends}"
            timed.append(row)
        columns = (("disk MiB", "weight_bytes_disk", ",.2f", 1 / MIB), ("weights MiB", "weight_bytes_resident", ",.2f", 1 / MIB),
                   ("activations MiB", "activation_bytes", ",.2f", 1 / MIB), ("load s", "load_seconds", ".3g", 1.0),
                   ("first call s", "first_call_seconds", ".3g", 1.0))  # fmt: skip
        weighed.append({"model": cell_of(name), **{column: show(first.get(key), form, scale) for column, key, form, scale in columns}})
        remarks = dict.fromkeys((one.name.startswith("skipped_"), one.remark) for one in found if one.remark)
        lines += [f"- {name}: {'' if without else 'doubtful: '}{remark}" for without, remark in remarks] + [
            f"- {name}: skipped: {reason}" for reason in skipped
        ]
    parts = [tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True) for rows in (timed, weighed) if rows]
    if timed and len(models) > 1:
        lines.append("- A decode x above 1 is faster than the base; an interval that holds 1 shows no difference.")
    return "\n\n".join([*parts, "\n".join(map(markdown_text, lines))]) if lines else "\n\n".join(parts)
