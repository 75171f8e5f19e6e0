"""The page: one self-contained HTML file with tables, pictures, training curves and answers side by
side. No torch, no network.

What the page shows is data in it; `assets/page.html` draws. Answers are compressed: one seed's in
the page, the other seeds' in files beside it that are loaded when they are asked for.
"""

import base64
import gzip
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.analysis.comparison import (
    Group,
    ResultRow,
    compare,
    ordered_rows,
    row_block,
    teacher_at_chance,
)
from harness.records import columns
from harness.records.record import TEACHER, RunRecord
from harness.records.samples import Evidence
from harness.reporting.formats import ReportSection
from harness.reporting.glossary import GLOSSARY
from harness.reporting.notes import mixed_conditions
from harness.reporting.plots import AXES, Point, colours, points_of
from harness.reporting.table import BestCell, failure_of, less_is_better, row_name
from harness.statistics.intervals import Interval

TEMPLATE = Path(__file__).parent / "assets" / "page.html"
LARGEST_INLINE_ANSWERS = 5_500_000  # bytes of compressed answers that stand in the page itself
_CURVE_POINTS = 160  # points of a training curve
_LONGEST_QUESTION = 600  # letters of a question that are shown


def write_page(
    made: Sequence[ReportSection], folder: Path, *, evidence: Mapping[str, Evidence] | None = None
) -> list[Path]:
    """Write `page.html`, and the answers of further seeds beside it; return what was written."""
    known = evidence or {}
    groups = [one.group for one in made]
    seeds = sorted(
        {
            record.seed
            for found in groups
            for row in found.rows
            for record in row.succeeded
            if record.seed is not None
        }
    )
    packed = {
        seed: _compressed([_answers_of_seed(found, known, seed) for found in groups])
        for seed in seeds or [0]
    }
    first = next(iter(packed))
    inside = packed[first] if len(packed[first]) <= LARGEST_INLINE_ANSWERS else ""
    beside = {seed: text for seed, text in packed.items() if seed != first or not inside}
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "page.html"]
    for old in folder.glob("page-answers-*.js"):
        old.unlink()
    for seed, text in beside.items():
        written.append(folder / f"page-answers-{seed}.js")
        written[-1].write_text(
            f'harnessAnswers("{seed}", "{text}");\n', encoding="utf-8", newline="\n"
        )
    data = {
        "groups": [
            _group_data(one, title, known) for one, title in zip(made, _titles(made), strict=True)
        ],
        "mixed": mixed_conditions(groups),
        "glossary": GLOSSARY,
        "seeds": [str(seed) for seed in packed],
        "inside": str(first) if inside else "",
        "answers": any(one.samples for one in known.values()),
    }
    title = " / ".join(dict.fromkeys(one.heading for one in made[:2])) + (
        " ..." if len(made) > 2 else ""
    )
    page = _with_columns(TEMPLATE.read_text(encoding="utf-8"))
    page = (
        page.replace("{{title}}", html.escape(title))
        .replace("{{data}}", _script_json(data))
        .replace("{{answers}}", inside)
    )
    written[0].write_text(page, encoding="utf-8", newline="\n")
    return written


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
    columns.KEEPS,
    columns.SCENARIO,
    columns.FAMILY,
    columns.SUBJECT,
)
_FLIPS = (columns.ROW, columns.LOSSES, columns.WINS, columns.NET, columns.CHANGED)
_PARTS = (columns.SUBJECT, columns.TEACHER, columns.STUDENT, columns.GAP)


def _with_columns(template: str) -> str:
    """Return the page's template with the headers of the tables that it makes by itself, and which
    of them are words or better when less.

    Columns of words are in the order that pages always had, so that the same records give the same
    bytes.
    """
    lists = {"words": _WORDS, "flips": _FLIPS, "parts": _PARTS}
    filled: dict[str, Any] = {
        f"columns:{name}": [one.header for one in quantities] for name, quantities in lists.items()
    }
    filled |= {"less:flips": [one.better == "lower" for one in _FLIPS]}
    filled |= {"column:row": columns.ROW.header, "column:lowest": columns.LOWEST.header}
    for name, value in filled.items():
        template = template.replace("{{" + name + "}}", json.dumps(value))
    return template


def _script_json(data: object) -> str:
    """Return JSON that may stand inside a script element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, default=str, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    # half of a surrogate pair, which JSON lets in, is no text
    return text.encode("utf-8", "replace").decode()


def _group_data(
    made: ReportSection, title: str, evidence: Mapping[str, Evidence]
) -> dict[str, Any]:
    found = made.group
    asked = [task for task in found.tasks if not _has_no_retention(found, task)]
    return {
        "heading": title,
        "notes": made.notes,
        "tasks": asked,
        "items": {
            task: next((score.n for row in found.rows for score in row.scores(task)), 0)
            for task in asked
        },
        "colours": colours(found),
        "failed": {row.label: reason for row in found.rows if (reason := failure_of(row))},
        "tables": [
            {
                "name": table.name,
                "title": table.title,
                "columns": table.columns,
                "rows": table.rows,
                "blocks": table.blocks,
                "best": [[isinstance(cell, BestCell) for cell in row] for row in table.rows],
                "less": [less_is_better(column) for column in table.columns],
            }
            for table in made.tables
        ],
        "points": {
            task: {
                axis: [_point_data(one) for one in points_of(found, task, axis)] for axis in AXES
            }
            for task in asked
        },
        "axes": {axis: quantity.axis for axis, quantity in AXES.items()},
        "why": {
            task: {axis: _reason_for_no_picture(found, task, axis) for axis in AXES}
            for task in asked
        },
        "kept": _retention_lines(found, asked),
        "flips": {task: _flip_lines(found, task) for task in asked},
        "parts": {task: _accuracies_by_subject(found, task) for task in asked},
        "curves": _training_curves(found, evidence),
    }


def _has_no_retention(group: Group, task: str) -> bool:
    """Tell whether nothing of a task is kept or lost: a perplexity, an error rate, a figure of all
    items together.
    """
    return any(not score.retains for row in group.rows for score in row.scores(task))


def _reason_for_no_picture(group: Group, task: str, axis: str) -> str:
    """Say why there is no picture of a task, "" where there is one."""
    if group.teacher is None:
        return "the teacher has no row under these conditions"
    if len(points_of(group, task, axis)) > 1:
        return ""
    if teacher_at_chance(group, task):
        return "the teacher is at chance here, so no retention means anything"
    others = [row for row in group.rows if row.succeeded and row is not group.teacher]
    if not others:
        return "there is no row but the teacher's"
    reason = compare(others[0], group.teacher, task, ratio=True).reason
    missing = {
        "speed": "nothing was timed beside the teacher",
        "memory": "no bytes on disk were measured",
        "weights": "no bytes in memory",
    }
    return f"no retention: {reason}" if reason else missing[axis]


def _retention_lines(group: Group, asked: Sequence[str]) -> list[list[Any]]:
    """Return (row, block, retention by task as shown, as numbers)."""
    teacher = group.teacher
    if teacher is None:
        return []
    lines = []
    for row in ordered_rows(group):
        kept = [
            Interval(None)
            if teacher_at_chance(group, task)
            else compare(row, teacher, task, ratio=True)
            for task in asked
        ]
        numbers = [None if one.value is None else round(one.value, 4) for one in kept]
        lines.append(
            [
                row_name(row),
                row_block(row),
                [columns.RETENTION.with_interval(one) for one in kept],
                numbers,
            ]
        )
    return lines


def _titles(made: Sequence[ReportSection]) -> list[str]:
    """Return the headings; those of several groups alike tell what differs."""
    every = [one.heading for one in made]
    titles = []
    for one in made:
        alike = [other for other in made if other.heading == one.heading]
        conditions = dict.fromkeys(name for other in alike for name in other.group.shared)
        differing = [
            name
            for name in conditions
            if len({other.group.shared.get(name) for other in alike}) > 1
        ]
        shown = ", ".join(
            f"{name} {one.group.shared.get(name, '')[:40] or 'none'}"
            for name in differing
            if name != "items"
        )
        titles.append(
            one.heading
            if every.count(one.heading) == 1
            else f"{one.heading} ({shown or 'other items'})"
        )
    return titles


def _point_data(one: Point) -> list[Any]:
    def ends(value: float | None, low: float | None, high: float | None) -> list[float | None]:
        return [None if end is None else round(end, 5) for end in (value, low, high)]

    kept, gain = one.kept, one.gain
    return [
        one.label,
        one.block,
        ends(kept.value, kept.low, kept.high),
        ends(gain.value, gain.low, gain.high),
        one.frontier,
    ]


def _flip_lines(group: Group, task: str) -> list[list[Any]]:
    """Return (row, items lost, items won), means over seeds."""
    from harness.statistics.stats import count_pairs

    reference = next(iter(group.teacher.outcomes(task)), "") if group.teacher else ""
    lines = []
    for row in ordered_rows(group):
        counts = [
            count_pairs(run, reference) for run in row.outcomes(task) if len(run) == len(reference)
        ]
        if counts and row.label != TEACHER:
            lost, won = (
                sum(one.teacher_only for one in counts),
                sum(one.student_only for one in counts),
            )
            lines.append([row.label, round(lost / len(counts), 1), round(won / len(counts), 1)])
    return lines


def _accuracies_by_subject(group: Group, task: str) -> dict[str, dict[str, float]]:
    """Return accuracies by subject (or number of steps), row by row, means over seeds."""
    told: dict[str, dict[str, float]] = {}
    for row in ordered_rows(group):
        scores = [score for score in row.scores(task) if score.groups]
        if scores:
            told[row.label] = {
                name: round(sum(score.groups.get(name, 0.0) for score in scores) / len(scores), 4)
                for name in scores[0].groups
            }
    return told


def _training_curves(
    group: Group, evidence: Mapping[str, Evidence]
) -> dict[str, list[dict[str, Any]]]:
    """Return what was logged of each trained row, a run a seed: every term's seen tokens and
    values, each thinned by itself.
    """
    told: dict[str, list[dict[str, Any]]] = {}
    for row in ordered_rows(group):
        for record in row.succeeded:
            steps = list(evidence[record.key].steps()) if record.key in evidence else []
            steps = [one for one in steps if isinstance(one.get("seen"), (int, float))]
            names = dict.fromkeys(
                name for one in steps for name in one if name not in ("step", "epoch", "seen")
            )
            if not names:
                continue
            series = {
                name: _thinned([(one["seen"], _rounded(one[name])) for one in steps if name in one])
                for name in names
            }
            told.setdefault(row.label, []).append({"run": f"seed {record.seed}", "series": series})
    return told


def _thinned(pairs: Sequence[tuple[float, float | None]]) -> list[list[float | None]]:
    """Keep some points of a curve: its last one, and every one that is no number, among them."""
    apart = max(1, math.ceil(len(pairs) / _CURVE_POINTS))
    kept = [
        pair
        for at, pair in enumerate(pairs)
        if at % apart == 0 or at == len(pairs) - 1 or pair[1] is None
    ]
    return [[seen for seen, _ in kept], [value for _, value in kept]]


def _rounded(value: object) -> float | None:
    if not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return float(f"{value:.4g}")


def _answers_of_seed(group: Group, evidence: Mapping[str, Evidence], seed: int) -> dict[str, Any]:
    """Return the answers of one seed of every row (and of rows without one), task by task in item
    order.
    """
    told: dict[str, Any] = {}
    for row in ordered_rows(group):
        record = _record_of_seed(row, seed)
        if record is None or record.key not in evidence:
            continue
        for one in evidence[record.key].answers():
            task = told.setdefault(
                str(one["task"]), {"item": [], "group": [], "gold": [], "asked": [], "rows": {}}
            )
            own = task["rows"].setdefault(row.label, {"text": [], "right": "", "tokens": []})
            # the first row that has this item says what it is
            if len(task["item"]) == len(own["text"]):
                task["item"].append(one["item"])
                task["group"].append(one.get("group", ""))
                task["gold"].append(one.get("gold", ""))
                task["asked"].append(_last_question(str(one.get("prompt", ""))))
            own["text"].append(one.get("text", ""))
            own["right"] += "1" if next(iter(one.get("correct", {}).values()), False) else "0"
            own["tokens"].append(one.get("tokens", 0))
    return told


def _record_of_seed(row: ResultRow, seed: int) -> RunRecord | None:
    return next((one for one in row.succeeded if one.seed in (seed, None)), None)


def _last_question(prompt: str) -> str:
    """Return the part of a prompt that asks: what stands behind the last shot."""
    last = prompt.strip().rpartition("\n\n")[2]
    return last if len(last) <= _LONGEST_QUESTION else f"... {last[-_LONGEST_QUESTION:]}"


def _compressed(answers: Iterable[dict[str, Any]]) -> str:
    """Return answers as base64 of gzip of JSON; the same answers give the same bytes."""
    text = json.dumps(list(answers), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()
