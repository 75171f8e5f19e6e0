"""The page: one self-contained HTML file with tables, pictures, training curves and answers.

The page holds its data, and `assets/page.html` draws them. Answers are compressed: those of one
seed stand in the page, those of other seeds in files beside it that are loaded on demand. Needs no
torch and no network.
"""

import base64
import gzip
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.analysis.comparison import (
    Group,
    ResultRow,
    compare,
    ordered_rows,
    row_block,
    teacher_at_chance,
)
from harness.analysis.decision import Decision, Question, decide_each
from harness.records import columns
from harness.records.record import TEACHER, RunRecord
from harness.records.samples import Evidence
from harness.reporting.formats import ReportSection, table_data
from harness.reporting.glossary import GLOSSARY
from harness.reporting.notes import mixed_conditions
from harness.reporting.plots import AXES, Point, colours, points_of
from harness.reporting.recommendation import (
    CANDIDATE_HEADERS,
    KEPT_HEADER,
    answer_text,
    asked_text,
    candidate_cells,
    family_text,
    shared_reasons,
)
from harness.reporting.table import failure_of, less_is_better, row_name
from harness.statistics.intervals import Interval

TEMPLATE = Path(__file__).parent / "assets" / "page.html"
LARGEST_INLINE_ANSWERS = 5_500_000  # bytes of compressed answers in the page itself
_CURVE_POINTS = 160  # points of a training curve
_LONGEST_QUESTION = 600  # characters of a question that are shown


def write_page(
    sections: Sequence[ReportSection],
    folder: Path,
    *,
    evidence: Mapping[str, Evidence] | None = None,
) -> list[Path]:
    """Write `page.html` and the answers of further seeds beside it; return the paths.

    `evidence` holds answers and training logs by the keys of records.
    """
    evidence_by_key = evidence or {}
    groups = [section.group for section in sections]
    answers = {
        seed: _compressed([_answers_of_seed(group, evidence_by_key, seed) for group in groups])
        for seed in _seeds_of(groups) or [0]
    }
    first_seed = next(iter(answers))
    inline = answers[first_seed] if len(answers[first_seed]) <= LARGEST_INLINE_ANSWERS else ""
    data = {
        "groups": [
            _group_data(section, title, evidence_by_key)
            for section, title in zip(sections, _titles(sections), strict=True)
        ],
        "mixed": mixed_conditions(groups),
        "glossary": GLOSSARY,
        "seeds": [str(seed) for seed in answers],
        "inside": str(first_seed) if inline else "",
        "answers": any(files.samples for files in evidence_by_key.values()),
    }
    headings = " / ".join(dict.fromkeys(section.heading for section in sections[:2]))
    page = _with_columns(TEMPLATE.read_text(encoding="utf-8"))
    page = (
        page.replace("{{title}}", html.escape(headings + (" ..." if len(sections) > 2 else "")))
        .replace("{{data}}", _script_json(data))
        .replace("{{answers}}", inline)
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "page.html"]
    for old_file in folder.glob("page-answers-*.js"):
        old_file.unlink()
    for seed, text in answers.items():
        if seed != first_seed or not inline:
            written.append(folder / f"page-answers-{seed}.js")
            script = f'harnessAnswers("{seed}", "{text}");\n'
            written[-1].write_text(script, encoding="utf-8", newline="\n")
    written[0].write_text(page, encoding="utf-8", newline="\n")
    return written


def _seeds_of(groups: Sequence[Group]) -> list[int]:
    seeds = {record.seed for group in groups for row in group.rows for record in row.succeeded}
    return sorted(seed for seed in seeds if seed is not None)


_WORDS = (
    columns.ROW,
    columns.STAGE,
    columns.METHOD,
    columns.QUANTITY,
    columns.CLAIMED,
    columns.PUBLISHED,
    columns.MEASURED,
    columns.AGAINST,
    columns.TASK,
    columns.VERDICT,
    columns.CORRECT_BY,
    columns.PICKED,
    columns.ITEMS_NEEDED,
    columns.KEEPS,
    columns.STEPS,
    columns.SCENARIO,
    columns.FAMILY,
    columns.SUBJECT,
    columns.FRONT,
    columns.WHY,
)
_FLIPS = (columns.ROW, columns.LOSSES, columns.WINS, columns.NET, columns.CHANGED)
_PARTS = (columns.SUBJECT, columns.TEACHER, columns.STUDENT, columns.GAP)


def _with_columns(template: str) -> str:
    """Fill in the headers of the tables that the page builds itself.

    Also tells which of their columns hold words, and which are better when lower. Columns of words
    keep the order that pages always had, so that equal records give equal bytes.
    """
    lists = {"words": _WORDS, "flips": _FLIPS, "parts": _PARTS}
    values: dict[str, Any] = {
        f"columns:{name}": [quantity.header for quantity in quantities]
        for name, quantities in lists.items()
    }
    values["columns:words"].append(KEPT_HEADER)  # of the decision: a text for each task
    values["less:flips"] = [quantity.better == "lower" for quantity in _FLIPS]
    values |= {"column:row": columns.ROW.header, "column:lowest": columns.LOWEST.header}
    for name, value in values.items():
        template = template.replace("{{" + name + "}}", json.dumps(value))
    return template


def _script_json(data: object) -> str:
    """Return JSON that may stand inside a script element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, default=str, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    # half of a surrogate pair, which JSON lets in, is no text
    return text.encode("utf-8", "replace").decode()


def _group_data(
    section: ReportSection, title: str, evidence: Mapping[str, Evidence]
) -> dict[str, Any]:
    """Return everything that the page shows of one group of records."""
    group = section.group
    tasks = [task for task in group.tasks if not _has_no_retention(group, task)]
    return {
        "heading": title,
        "notes": section.notes,
        "tasks": tasks,
        "items": {
            task: next((score.n for row in group.rows for score in row.scores(task)), 0)
            for task in tasks
        },
        "colours": colours(group),
        "failed": {row.label: reason for row in group.rows if (reason := failure_of(row))},
        "tables": [
            {**table_data(table), "less": [less_is_better(column) for column in table.columns]}
            for table in section.tables
        ],
        "points": {
            task: {axis: list(map(_point_data, points_of(group, task, axis))) for axis in AXES}
            for task in tasks
        },
        "axes": {axis: quantity.axis for axis, quantity in AXES.items()},
        "why": {
            task: {axis: _reason_for_no_picture(group, task, axis) for axis in AXES}
            for task in tasks
        },
        "kept": _retention_lines(group, tasks),
        "decisions": _decisions(group),
        "flips": {task: _flip_lines(group, task) for task in tasks},
        "parts": {task: _accuracies_by_subject(group, task) for task in tasks},
        "curves": _training_curves(group, evidence),
    }


def _has_no_retention(group: Group, task: str) -> bool:
    """Tell whether a task has no retention: a perplexity, an error rate, a figure of all items."""
    return any(not score.retains for row in group.rows for score in row.scores(task))


def _reason_for_no_picture(group: Group, task: str, axis: str) -> str:
    """Say why there is no picture of a task, "" where there is one."""
    if group.teacher is None:
        return "the teacher has no row under these conditions"
    if len(points_of(group, task, axis)) > 1:
        return ""
    if teacher_at_chance(group, task):
        return "the teacher is at chance here, so no retention means anything"
    students = [row for row in group.rows if row.succeeded and row is not group.teacher]
    if not students:
        return "the teacher's row is the only one"
    reason = compare(students[0], group.teacher, task, ratio=True).reason
    missing = {
        "speed": "nothing was timed beside the teacher",
        "memory": "no bytes on disk were measured",
        "weights": "no bytes in memory were measured",
    }
    return f"no retention: {reason}" if reason else missing[axis]


def _retention_lines(group: Group, tasks: Sequence[str]) -> list[list[Any]]:
    """Return a line for each row: name, block, retention by task as text, and as numbers."""
    teacher = group.teacher
    if teacher is None:
        return []
    lines = []
    for row in ordered_rows(group):
        retentions = [
            Interval(None)
            if teacher_at_chance(group, task)
            else compare(row, teacher, task, ratio=True)
            for task in tasks
        ]
        texts = [columns.RETENTION.with_interval(retention) for retention in retentions]
        values = [retention.value for retention in retentions]
        numbers = [None if value is None else round(value, 4) for value in values]
        lines.append([row_name(row), row_block(row), texts, numbers])
    return lines


# what the page answers at once; anything else: harness recommend
_OFFERED_KEEPS = (0.90, 0.95, 0.98, 0.99)
_OFFERED_SPEEDS = (None, 1.5, 2.0)
_OFFERED_WISHES: tuple[Literal["smallest", "fastest"], ...] = ("smallest", "fastest")


def _decisions(group: Group) -> dict[str, Any]:
    """Return which row to take for each question that the page offers, as `recommend` says it.

    Empty where nothing can be asked: without a teacher, or without a row beside it.
    """
    questions = [
        Question(keep=keep, faster=faster, take=take)
        for keep in _OFFERED_KEEPS
        for faster in _OFFERED_SPEEDS
        for take in _OFFERED_WISHES
    ]
    if group.teacher is None:
        return {}
    decisions = decide_each([group], questions)
    if not decisions[0].candidates:
        return {}
    return {
        "columns": CANDIDATE_HEADERS,
        "keep": [f"{100 * keep:g} %" for keep in _OFFERED_KEEPS],
        "faster": [f"{faster:g} x" if faster else "any" for faster in _OFFERED_SPEEDS],
        "take": list(_OFFERED_WISHES),
        # one for each combination, in the order of three nested loops over the lists above
        "answers": [_decision_data(decision) for decision in decisions],
    }


def _decision_data(decision: Decision) -> dict[str, Any]:
    """Return an answer, how it was found, the command that gives it, and its candidates."""
    question, shared = decision.question, shared_reasons(decision)
    command = f"harness recommend RUN --keep {question.keep:g}"
    if question.faster:
        command += f" --faster {question.faster:g}"
    if question.take != "smallest":
        command += f" --take {question.take}"
    return {
        "answer": decision.answer.value,
        "said": answer_text(decision),
        "notes": [
            *(f"every row: {reason}" for reason in shared),
            f"asked: {asked_text(question)}",
            family_text(decision),
        ],
        "command": command,
        "rows": [candidate_cells(candidate, shared) for candidate in decision.candidates],
    }


def _titles(sections: Sequence[ReportSection]) -> list[str]:
    """Return the headings; where several sections share one, it also tells what differs."""
    titles = []
    for section in sections:
        heading, shared = section.heading, section.group.shared
        same_heading = [other.group for other in sections if other.heading == heading]
        if len(same_heading) == 1:
            titles.append(heading)
            continue
        names = dict.fromkeys(name for group in same_heading for name in group.shared)
        differing = [
            f"{name} {shared.get(name, '')[:40] or 'none'}"
            for name in names
            if name != "items" and len({group.shared.get(name) for group in same_heading}) > 1
        ]
        titles.append(f"{heading} ({', '.join(differing) or 'other items'})")
    return titles


def _point_data(point: Point) -> list[Any]:
    """Return a point as label, block, two lists of value and ends, and whether on the frontier."""

    def rounded_ends(interval: Interval) -> list[float | None]:
        ends = (interval.value, interval.low, interval.high)
        return [None if end is None else round(end, 5) for end in ends]

    intervals = map(rounded_ends, (point.retention, point.gain))
    return [point.label, point.block, *intervals, point.on_frontier]


def _flip_lines(group: Group, task: str) -> list[list[Any]]:
    """Return a line for each row: its label, items lost, items won; means over seeds."""
    from harness.statistics.stats import count_pairs

    reference = next(iter(group.teacher.outcomes(task)), "") if group.teacher else ""
    lines = []
    for row in ordered_rows(group):
        counts = [
            count_pairs(run, reference) for run in row.outcomes(task) if len(run) == len(reference)
        ]
        if counts and row.label != TEACHER:
            losses = sum(seed_counts.teacher_only for seed_counts in counts)
            wins = sum(seed_counts.student_only for seed_counts in counts)
            means = [round(losses / len(counts), 1), round(wins / len(counts), 1)]
            lines.append([row.label, *means])
    return lines


def _accuracies_by_subject(group: Group, task: str) -> dict[str, dict[str, float]]:
    """Return accuracies by row and by subject (or number of steps), means over seeds."""
    accuracies: dict[str, dict[str, float]] = {}
    for row in ordered_rows(group):
        scores = [score for score in row.scores(task) if score.groups]
        if scores:
            accuracies[row.label] = {
                name: round(sum(score.groups.get(name, 0.0) for score in scores) / len(scores), 4)
                for name in scores[0].groups
            }
    return accuracies


def _training_curves(
    group: Group, evidence: Mapping[str, Evidence]
) -> dict[str, list[dict[str, Any]]]:
    """Return the logged curves of each trained row, one run a seed.

    Each loss term is a pair of lists, tokens seen and values, and is thinned by itself.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in ordered_rows(group):
        for record in row.succeeded:
            logged = list(evidence[record.key].steps()) if record.key in evidence else []
            steps = [step for step in logged if isinstance(step.get("seen"), (int, float))]
            names = dict.fromkeys(
                name for step in steps for name in step if name not in ("step", "epoch", "seen")
            )
            series = {
                name: _thinned(
                    [(step["seen"], _rounded(step[name])) for step in steps if name in step]
                )
                for name in names
            }
            if series:
                run = {"run": f"seed {record.seed}", "series": series}
                curves.setdefault(row.label, []).append(run)
    return curves


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[list[float | None]]:
    """Keep some points of a curve, among them the last one and every one that is no number."""
    step = max(1, math.ceil(len(points) / _CURVE_POINTS))
    last = len(points) - 1
    remaining = [
        (tokens, value)
        for number, (tokens, value) in enumerate(points)
        if number % step == 0 or number == last or value is None
    ]
    return [[tokens for tokens, _ in remaining], [value for _, value in remaining]]


def _rounded(value: object) -> float | None:
    """Return a number with four digits; None for what is no finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def _answers_of_seed(group: Group, evidence: Mapping[str, Evidence], seed: int) -> dict[str, Any]:
    """Return the answers of every row's record of a seed, task by task in item order.

    Rows without a seed, such as the teacher's, stand beside every seed.
    """
    tasks: dict[str, Any] = {}
    for row in ordered_rows(group):
        record = _record_of_seed(row, seed)
        if record is None or record.key not in evidence:
            continue
        for answer in evidence[record.key].answers():
            empty: dict[str, Any] = {"item": [], "group": [], "gold": [], "asked": [], "rows": {}}
            task = tasks.setdefault(str(answer["task"]), empty)
            answers = task["rows"].setdefault(row.label, {"text": [], "right": "", "tokens": []})
            # the first row that has this item says what it is
            if len(task["item"]) == len(answers["text"]):
                task["item"].append(answer["item"])
                task["group"].append(answer.get("group", ""))
                task["gold"].append(answer.get("gold", ""))
                task["asked"].append(_last_question(str(answer.get("prompt", ""))))
            is_correct = next(iter(answer.get("correct", {}).values()), False)
            answers["text"].append(answer.get("text", ""))
            answers["right"] += "1" if is_correct else "0"
            answers["tokens"].append(answer.get("tokens", 0))
    return tasks


def _record_of_seed(row: ResultRow, seed: int) -> RunRecord | None:
    return next((record for record in row.succeeded if record.seed in (seed, None)), None)


def _last_question(prompt: str) -> str:
    """Return the question of a prompt: what stands behind the last shot."""
    question = prompt.strip().rpartition("\n\n")[2]
    is_short = len(question) <= _LONGEST_QUESTION
    return question if is_short else f"... {question[-_LONGEST_QUESTION:]}"


def _compressed(answers: Iterable[dict[str, Any]]) -> str:
    """Return answers as base64 of gzip of JSON; equal answers give equal bytes."""
    text = json.dumps(list(answers), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()
