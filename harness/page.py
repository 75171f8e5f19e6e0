"""The page: one self-contained HTML file with tables, pictures, training curves and answers side by side. No torch, no network.

What the page shows is data in it; `harness/data/page.html` draws. Answers are compressed: one seed's in the page, the other seeds' in
files beside it that are loaded when they are asked for.
"""

import base64
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.evidence import Evidence
from harness.glossary import GLOSSARY
from harness.groups import TEACHER, Group, Row, ordered
from harness.plots import AXES, Point, colours, points_of
from harness.record import RunRecord
from harness.report import Made, mixed
from harness.table import Best

TEMPLATE = Path(__file__).parent / "data" / "page.html"
LARGEST = 5_500_000  # bytes of compressed answers that stand in the page itself
_STEPS = 160  # points of a training curve
_LONGEST = 600  # letters of a question that are shown


def write_page(made: Sequence[Made], folder: Path, *, evidence: Mapping[str, Evidence] | None = None) -> list[Path]:
    """Write `page.html`, and the answers of further seeds beside it; return what was written."""
    known = evidence or {}
    groups = [one.found for one in made]
    seeds = sorted({record.seed for found in groups for row in found.rows for record in row.done if record.seed is not None})
    packed = {seed: _packed([_answers(found, known, seed) for found in groups]) for seed in seeds or [0]}
    first = next(iter(packed))
    inside = packed[first] if len(packed[first]) <= LARGEST else ""
    beside = {seed: text for seed, text in packed.items() if seed != first or not inside}
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "page.html"]
    for old in folder.glob("page-answers-*.js"):
        old.unlink()
    for seed, text in beside.items():
        written.append(folder / f"page-answers-{seed}.js")
        written[-1].write_text(f'harnessAnswers("{seed}", "{text}");\n', encoding="utf-8", newline="\n")
    data = {
        "groups": [_group(one, known) for one in made], "mixed": mixed(groups), "glossary": GLOSSARY,
        "seeds": [str(seed) for seed in packed], "inside": str(first) if inside else "",
        "answers": any(one.samples for one in known.values()),
    }  # fmt: skip
    title = " / ".join(one.heading for one in made[:2]) + (" ..." if len(made) > 2 else "")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(title)).replace("{{data}}", _embedded(data)).replace("{{answers}}", inside)
    written[0].write_text(page, encoding="utf-8", newline="\n")
    return written


def _embedded(data: object) -> str:
    """Return JSON that may stand inside a script element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, default=str, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _group(made: Made, evidence: Mapping[str, Evidence]) -> dict[str, Any]:
    found = made.found
    return {
        "heading": made.heading,
        "notes": made.notes,
        "tasks": list(found.tasks),
        "colours": colours(found),
        "tables": [
            {
                "name": table.name, "title": table.title, "columns": table.columns, "rows": table.rows, "blocks": table.blocks,
                "best": [[isinstance(cell, Best) for cell in row] for row in table.rows],
            }
            for table in made.tables
        ],
        "points": {
            task: {axis: [_point(one) for one in points_of(found, task, axis)] for axis in AXES} for task in found.tasks
        },
        "axes": AXES,
        "flips": {task: _flips(found, task) for task in found.tasks},
        "parts": {task: _parts(found, task) for task in found.tasks},
        "curves": _curves(found, evidence),
    }  # fmt: skip


def _point(one: Point) -> list[Any]:
    def ends(value: float | None, low: float | None, high: float | None) -> list[float | None]:
        return [None if end is None else round(end, 5) for end in (value, low, high)]

    kept, gain = one.kept, one.gain
    return [one.label, one.block, ends(kept.value, kept.low, kept.high), ends(gain.value, gain.low, gain.high), one.frontier]


def _flips(found: Group, task: str) -> list[list[Any]]:
    """Return (row, items lost, items won), means over seeds."""
    from harness.stats import pairs

    reference = next(iter(found.teacher.outcomes(task)), "") if found.teacher else ""
    lines = []
    for row in ordered(found):
        counts = [pairs(reference, run) for run in row.outcomes(task) if len(run) == len(reference)]
        if counts and row.label != TEACHER:
            lost, won = sum(one.teacher_only for one in counts), sum(one.student_only for one in counts)
            lines.append([row.label, round(lost / len(counts), 1), round(won / len(counts), 1)])
    return lines


def _parts(found: Group, task: str) -> dict[str, dict[str, float]]:
    """Return accuracies by subject (or number of steps), row by row, means over seeds."""
    told: dict[str, dict[str, float]] = {}
    for row in ordered(found):
        scores = [score for score in row.scores(task) if score.groups]
        if scores:
            told[row.label] = {
                name: round(sum(score.groups.get(name, 0.0) for score in scores) / len(scores), 4) for name in scores[0].groups
            }
    return told


def _curves(found: Group, evidence: Mapping[str, Evidence]) -> dict[str, dict[str, Any]]:
    """Return what was logged of each trained record: seen tokens, and every loss term at some of its steps."""
    told: dict[str, dict[str, Any]] = {}
    for row in ordered(found):
        for record in row.done:
            steps = list(evidence[record.key].steps()) if record.key in evidence else []
            steps = [one for one in steps if isinstance(one.get("seen"), (int, float))]
            if not steps:
                continue
            kept = steps[:: max(1, len(steps) // _STEPS)]
            names = [name for name in dict.fromkeys(name for one in kept for name in one) if name not in ("step", "epoch", "seen")]
            name = row.label if record.seed is None else f"{row.label}, seed {record.seed}"
            told[name] = {
                "seen": [one["seen"] for one in kept], "series": {name: [_short(one.get(name)) for one in kept] for name in names}
            }  # fmt: skip
    return told


def _short(value: object) -> float | None:
    if not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return float(f"{value:.4g}")


def _answers(found: Group, evidence: Mapping[str, Evidence], seed: int) -> dict[str, Any]:
    """Return the answers of one seed of every row (and of rows without one), task by task in item order."""
    told: dict[str, Any] = {}
    for row in ordered(found):
        record = _of_seed(row, seed)
        if record is None or record.key not in evidence:
            continue
        for one in evidence[record.key].answers():
            task = told.setdefault(str(one["task"]), {"item": [], "group": [], "gold": [], "asked": [], "rows": {}})
            own = task["rows"].setdefault(row.label, {"text": [], "right": "", "tokens": []})
            if len(task["item"]) == len(own["text"]):  # the first row that has this item says what it is
                task["item"].append(one["item"])
                task["group"].append(one.get("group", ""))
                task["gold"].append(one.get("gold", ""))
                task["asked"].append(_question(str(one.get("prompt", ""))))
            own["text"].append(one.get("text", ""))
            own["right"] += "1" if next(iter(one.get("correct", {}).values()), False) else "0"
            own["tokens"].append(one.get("tokens", 0))
    return told


def _of_seed(row: Row, seed: int) -> RunRecord | None:
    return next((one for one in row.done if one.seed in (seed, None)), None)


def _question(prompt: str) -> str:
    """Return the part of a prompt that asks: what stands behind the last shot."""
    last = prompt.strip().rpartition("\n\n")[2]
    return last if len(last) <= _LONGEST else f"... {last[-_LONGEST:]}"


def _packed(answers: Iterable[dict[str, Any]]) -> str:
    """Return answers as base64 of gzip of JSON; the same answers give the same bytes."""
    text = json.dumps(list(answers), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
