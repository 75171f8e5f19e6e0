"""Everything about one row in words: how it was made, what it scored, where its files are.

No torch.
"""

import shlex
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.analysis.comparison import ResultRow, compare, figure_ratio
from harness.analysis.single import score_interval
from harness.deploying.row import StoredRow
from harness.deploying.written import STUDENT_FORMS
from harness.escape import clean
from harness.files.untrusted import Unreadable, read_object
from harness.planning.spelled import typed_command
from harness.records import columns
from harness.records.conditions import ModelReference
from harness.records.record import TEACHER, RunRecord, TaskScore
from harness.records.store import read_records

_WIDTH = 10  # of the words on the left
_FILES = ("log.txt", "record.json", "job.json", "samples.jsonl", "timings.json")


def row_details(row: StoredRow) -> str:
    """Return a row's details as text, a word on the left for each part."""
    parts = (
        ("row", [_title(row)]),
        ("status", [_status(row.record)]),
        ("models", list(_models(row.record))),
        ("settings", _settings(row.record.settings)),
        ("stages", list(_stages(row.record))),
        ("scores", list(_scores(row))),
        ("measured", list(_measured(row.record))),
        ("cost", _cost(row.record)),
        ("student", list(_student_files(row))),
        ("command", _command(row)),
        ("files", list(_cell_files(row))),
        ("next", _next_steps(row)),
    )
    lines = []
    for word, texts in parts:
        for number, text in enumerate(texts):
            lines.append(f"{'' if number else word:{_WIDTH}}{clean(text)}".rstrip())
    return "\n".join(lines)


def _title(row: StoredRow) -> str:
    record = row.record
    seed = f", seed {record.seed}" if record.seed is not None else ""
    further = sorted({other.seed for other in row.others if other.seed not in (None, record.seed)})
    seeds = f"; also seed {', '.join(map(str, further))} (--seed)" if further else ""
    known = record.method in (record.label, record.family)
    kind = record.family if known else f"{record.method}, {record.family}"
    return f"{record.label} ({kind}{', a control' if record.is_control else ''}{seed}{seeds})"


def _status(record: RunRecord) -> str:
    text = record.status if record.status == "success" else f"{record.status}: {record.reason}"
    environment, conditions = record.environment, record.conditions
    place = f"{conditions.device} {conditions.dtype}"
    if environment is not None:
        machine = str(environment.gpu) if environment.gpu else environment.machine
        place += f", {environment.threads} threads of {machine}"
    items = f"; a trial on {conditions.limit} items" if conditions.limited else ""
    subset = f"; items of the subset {conditions.subset}" if conditions.subset else ""
    return (
        f"{text}, {record.created or 'no date'}, {record.seconds:,.1f} s on {place}{items}{subset}"
    )


def _models(record: RunRecord) -> Iterator[str]:
    """Yield the models that the row was made from, each with its digest."""
    conditions = record.conditions
    for teacher in conditions.teachers:
        yield f"teacher {_model(teacher)}"
    if record.method != TEACHER and record.starts_from != TEACHER:
        yield f"started as {conditions.student_recipe} of {_model(conditions.student_base)}"


def _model(model: ModelReference) -> str:
    note = f", {model.note}" if model.note else ""
    return f"{model.name} ({model.digest[:12]}{note})"


def _settings(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line for each setting; those of a chain are named by their method."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _settings(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {value}")
    return lines


def _stages(record: RunRecord) -> Iterator[str]:
    for stage in record.stages:
        scores = ", ".join(f"{task} {value:.3f}" for task, value in stage.scores.items())
        size = f"{stage.weight_bytes:,} bytes"
        note = " (floats that stand for packed weights)" if stage.simulated else ""
        yield f"{stage.label}: {size}{note}, {stage.cost.seconds:,.1f} s; {scores or 'not scored'}"


def _scores(row: StoredRow) -> Iterator[str]:
    """Yield each score with its interval, and what was kept of the teacher's on the same items."""
    teacher = _teacher_row(row)
    own = ResultRow(row.record.label, (row.record,))
    for score in row.record.scores:
        text = f"{score.task}@{score.version}  {_with_interval(score)}  n = {score.n:,}"
        if teacher is None or row.record.method == TEACHER:
            yield text
        elif score.kind == "perplexity":
            ratio = figure_ratio(own, teacher, score.task)
            against = columns.AGAINST_TEACHER.with_interval(ratio) if ratio.value else ratio.reason
            yield f"{text}  {against} times the teacher's"
        else:
            kept = compare(own, teacher, score.task, ratio=score.retains)
            quantity = columns.RETENTION if score.retains else columns.DIFFERENCE
            known = kept.value is not None
            against = quantity.with_interval(kept) if known else kept.reason
            yield f"{text}  {against} of the teacher's"


def _with_interval(score: TaskScore) -> str:
    interval = score_interval(score)
    text = score.format_value(score.value)
    if interval.low is None or interval.high is None:
        return text
    ends = (score.format_value(end).removesuffix(" %") for end in (interval.low, interval.high))
    return f"{text} [{', '.join(ends)}]"


def _teacher_row(row: StoredRow) -> ResultRow | None:
    """Return the first teacher's row beside this one, for the figures against it."""
    own = row.record.conditions
    for record in read_records(row.place).records:
        same = record.conditions.teachers == own.teachers and record.conditions.tasks == own.tasks
        if record.label == TEACHER and record.status == "success" and same:
            return ResultRow(record.label, (record,))
    return None


def _measured(record: RunRecord) -> Iterator[str]:
    """Yield what was timed and weighed, in the units of the tables."""
    by_key = {quantity.key: quantity for quantity in columns.QUANTITIES}
    for part in record.measurements:
        quantity = by_key.get(part.name)
        remark = f" ({part.remark})" if part.remark else ""
        condition = f" at {part.condition}" if part.condition else ""
        if quantity is None or quantity.words:
            yield f"{part.name}{condition}: {part.value:g} {part.unit}{remark}"
        else:
            text = quantity.text(quantity.scaled(part.value))
            unit = quantity.unit if quantity.unit not in ("%", *quantity.header.split()) else ""
            yield f"{quantity.header}{condition}: {text} {unit}".rstrip() + remark


def _cost(record: RunRecord) -> list[str]:
    cost = record.cost
    if not cost.seconds and not cost.seen_tokens:
        return []
    return [
        f"{cost.seconds:,.1f} s, {cost.seen_tokens:,} tokens seen, {cost.trained_tokens:,} "
        f"trained, {cost.steps:,} steps, {cost.flops:.3g} {columns.FLOPS.header}"
    ]


def _student_files(row: StoredRow) -> Iterator[str]:
    """Yield the folder of the row's model and each of its files with its bytes."""
    student, path = row.record.student, row.model
    if student is not None:
        weights = f"{student.weight_bytes:,} bytes of weights" if student.weight_bytes else ""
        count = f"{student.parameters:,} parameters" if student.parameters else ""
        yield ", ".join(filter(None, (count, weights, f"digest {student.digest}")))
    if path is None:
        yield "its files are not here: the record was kept without its store"
    elif path.is_file():
        yield f"{path} ({path.stat().st_size:,} bytes)"
    else:
        yield str(path)
        files = sorted(file for file in path.iterdir() if file.is_file())
        width = max((len(file.name) for file in files), default=0)
        for file in files:
            yield f"  {file.name:{width}}  {file.stat().st_size:>15,} bytes"


def _command(row: StoredRow) -> list[str]:
    """Return the command of the run that computed the row, as its run file keeps it."""
    path = run_file_of(row)
    if path is None:
        return ["not kept: a study holds records alone"]
    config = read_object(path).get("asked")
    return [typed_command(config if isinstance(config, dict) else {}), f"(run file {path})"]


def run_file_of(row: StoredRow) -> Path | None:
    """Return the run file of the run that computed a row; None where none is kept.

    It is the last one that lists the row's cell and was begun before its record was written; later
    ones found the record finished. Run files are named by the time at which they were begun.
    """
    written = row.record.created
    listing = []
    for path in sorted((row.store.root / "runs").glob("*.json")):
        try:
            cells = read_object(path).get("cells")
        except Unreadable:
            continue
        if isinstance(cells, list) and row.record.key in cells:
            listing.append(path)
    before = [path for path in listing if _begun(path) <= written]
    return next(iter([*reversed(before), *listing]), None)


def _begun(path: Path) -> str:
    """Return when a run began, as records write dates; "" for a file that has no such name."""
    try:
        begun = datetime.strptime(path.stem[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return ""
    return begun.strftime("%Y-%m-%dT%H:%M:%SZ")


def _cell_files(row: StoredRow) -> Iterator[str]:
    for name in _FILES:
        if path := row.file(name):
            yield f"{path} ({path.stat().st_size:,} bytes)"


def _next_steps(row: StoredRow) -> list[str]:
    """Return what may be typed next: how the row's student is handed on."""
    if not row.made_here or row.model is None:
        return []
    place = "" if row.place == Path("results/runs") else f" {shlex.quote(str(row.place))}"
    name = f"{shlex.quote(row.record.label)}{place}"
    return [f"harness export student {name} --form {form} --out DIR" for form in STUDENT_FORMS]
