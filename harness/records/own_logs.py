"""Read our own rows as logged models: records, and the items that stand beside them. No torch.

A record alone says which items were hit; the items beside it (`samples.jsonl`) say which they are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.lines import read_signed_lines
from harness.records.logged_items import (
    FigureName,
    ItemIdentity,
    LoggedModel,
    LoggedTask,
    score_of_numbers,
    score_without_items,
)
from harness.records.record import RunRecord, TaskScore
from harness.statistics.figures import weighted_mean

_ItemLine = dict[str, Any]
_FIELDS = {
    "task": str,
    "item": int,
    "doc_hash": str,
    "target_hash": str,
    "prompt_hash": str,
    "correct": dict,
}


def model_of_records(
    records: Sequence[RunRecord], samples: Mapping[str, Path | None]
) -> LoggedModel:
    """Return a row as a logged model, a run for each of its records.

    `samples` holds the items' file of each record by its key, where one was kept. Raises
    `HarnessError` for such a file that is torn, edited or says an item twice.
    """
    runs = {}
    for record in records:
        path = samples.get(record.key)
        lines = item_lines(path) if path is not None else {}
        runs[record.seed] = {
            score.task.removeprefix("lm-eval:"): _logged_task(record, score, lines, path)
            for score in record.scores
        }
    return LoggedModel(records[0].label, runs)


def _logged_task(
    record: RunRecord, score: TaskScore, lines: Mapping[str, Sequence[_ItemLine]], path: Path | None
) -> LoggedTask:
    task = score.task.removeprefix("lm-eval:")
    items = tuple(map(_identity, lines.get(score.task, ())))
    if items and len(items) != score.n:
        raise HarnessError(
            f"{path}: {len(items):,} items of {score.task}, and its record has {score.n:,}; type "
            "the command of the run again"
        )
    where = str(path) if path else f"the record of {record.label}"
    return LoggedTask(task, where, items, _figures(score), record.conditions.limited)


def _figures(score: TaskScore) -> dict[str, TaskScore]:
    """Return a record's score by each of its extractors, the task's own first."""
    primary = score.primary or score.metric
    names = dict.fromkeys([primary, *score.outcomes, *score.values])
    figures = {}
    for name in names:
        if name == primary:
            figures[name] = score
            continue
        numbers = score.values.get(name) or [float(mark == "1") for mark in score.outcomes[name]]
        value = weighted_mean(numbers, score.parts)
        # a figure beside the task's own is a mean of its items, whatever that one is
        changes = {"primary": name, "value": value, "unpaired": "", "form": "", "statistics": ()}
        if score.kind == "choose":
            changes["metric"] = name
        figures[name] = score.model_copy(update=changes)
    return figures


def item_lines(path: Path) -> dict[str, list[_ItemLine]]:
    """Read the items of a `samples.jsonl` of ours, by task in item order.

    Raises `HarnessError` for a line that is torn or edited, and for an item that stands there
    twice.
    """
    values, defects = read_signed_lines(path, complete=True)
    if not defects and not values:
        defects = ["no item"]
    for number, value in enumerate(values, 1):
        wrong = [name for name, kind in _FIELDS.items() if type(value.get(name)) is not kind]
        defects += [f"item {number}: no {wrong[0]}"] if wrong else []
    if defects:
        raise HarnessError(
            f"{path}: {defects[0]}: torn, edited, or no samples.jsonl of ours; type the command of "
            "the run again"
        )
    by_task: dict[str, dict[int, _ItemLine]] = {}
    for value in values:
        lines = by_task.setdefault(value["task"], {})
        if value["item"] in lines:
            raise HarnessError(
                f"{path}: item {value['item']} of {value['task']} stands there twice; type the "
                "command of the run again"
            )
        lines[value["item"]] = value
    return {task: [lines[item] for item in sorted(lines)] for task, lines in by_task.items()}


def model_of_items(path: Path) -> LoggedModel:
    """Return a `samples.jsonl` without its record as a logged model, named after its folder."""
    tasks = {}
    for name, lines in item_lines(path).items():
        task = name.removeprefix("lm-eval:")
        scores = _scores_of_lines(task, lines)
        tasks[task] = LoggedTask(task, str(path), tuple(map(_identity, lines)), scores)
    return LoggedModel(path.resolve().parent.name, {None: tasks})


def _identity(line: _ItemLine) -> ItemIdentity:
    return ItemIdentity(line["item"], line["doc_hash"], line["target_hash"], line["prompt_hash"])


def _scores_of_lines(task: str, lines: Sequence[_ItemLine]) -> dict[str, TaskScore]:
    """Return the score of every extractor that gives each item a number."""
    graded = [{**line["correct"], **line.get("values", {})} for line in lines]
    names = list(dict.fromkeys(name for grades in graded for name in grades))
    answers = [(line.get("text"), line.get("position")) for line in lines]
    scores = {}
    for name in names:
        numbers = [float(grades[name]) for grades in graded if name in grades]
        if len(numbers) == len(lines):
            scores[name] = score_of_numbers(
                task, FigureName(name, ""), numbers, digest=digest_of(answers, numbers)
            )
    if scores:
        return scores
    reason = "items alone do not say what figure they make; keep record.json beside them"
    return {"": score_without_items(task, FigureName("", ""), len(lines), reason)}
