"""Read what lm-eval's own command logged of every item: `samples_TASK_DATE.jsonl`. No torch.

A line is one item under one filter (lm-eval 0.4.5 and later). `results_DATE.json` beside the logs
says which metrics are better when lower, and whether a sample of the items was asked.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.lines import read_json_lines
from harness.files.untrusted import Unreadable, read_object
from harness.records.logged_items import (
    PERPLEXITIES,
    FigureName,
    ItemIdentity,
    LoggedModel,
    LoggedTask,
    score_of_documents,
    score_of_numbers,
    score_without_items,
)
from harness.records.record import TaskScore
from harness.statistics.figures import BITS_PER_BYTE, as_number

_DATE = r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?"
_SAMPLES = re.compile(rf"samples_(?P<task>.+?)(?:_(?P<date>{_DATE}))?\.jsonl(?:\.gz)?")
_RESULTS = re.compile(rf"results_(?P<date>{_DATE})\.json")
# better when lower, of lm-eval's own metrics; others say so in results_DATE.json
_LOWER_IS_BETTER = frozenset({*PERPLEXITIES, "perplexity", "brier_score", "ter"})
_FIELDS = {"doc_id": int, "doc_hash": str, "target_hash": str, "prompt_hash": str, "filter": str}


def lm_eval_files(place: Path) -> list[Path]:
    """Return the sample logs of a place: a log, a `results_DATE.json`, or a folder of one run.

    lm-eval puts its files into a folder by the model's name: the folder above will do where it
    holds one model. Empty where no such logs are there. Raises `HarnessError` for a folder with the
    logs of several runs or models.
    """
    if place.is_file():
        if results := _RESULTS.fullmatch(place.name):
            return _files_of_run(place.parent, results["date"])
        return [place] if _SAMPLES.fullmatch(place.name) else []
    if not place.is_dir():
        return []
    files = _sample_files(place)
    if not files:
        models = [folder for folder in sorted(place.iterdir()) if _sample_files(folder)]
        if len(models) > 1:
            raise HarnessError(
                f"{place}: logs of {len(models)} models; name the folder of one, such as "
                f"{models[0]}"
            )
        files = _sample_files(models[0]) if models else []
    _refuse_two_runs(files)
    return files


def _sample_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if _SAMPLES.fullmatch(path.name)]


def _files_of_run(folder: Path, date: str) -> list[Path]:
    """Return the logs of one run of lm-eval. Raises `HarnessError` where it logged no samples."""
    files = [path for path in _sample_files(folder) if f"_{date}.jsonl" in path.name]
    if not files:
        raise HarnessError(
            f"{folder}: no samples_*_{date}.jsonl stands beside the results; type lm-eval's "
            "command with --log_samples"
        )
    return files


def _refuse_two_runs(files: Sequence[Path]) -> None:
    """Refuse logs of which two are of one task: nobody can know which of them is meant."""
    by_task: dict[str, Path] = {}
    for path in files:
        task = task_of_file(path)
        if task in by_task:
            raise HarnessError(
                f"{path.parent}: two logs of {task} ({by_task[task].name}, {path.name}); name one "
                "run's results_DATE.json, or one log"
            )
        by_task[task] = path


def task_of_file(path: Path) -> str:
    """Return the task of a log by its file's name; the name itself where it has another form."""
    match = _SAMPLES.fullmatch(path.name)
    return match["task"] if match else path.stem


def read_lm_eval_model(files: Sequence[Path]) -> LoggedModel:
    """Read the logs of one run. Raises `HarnessError` for a log that is torn or says a thing twice.

    The model's name is that of the folder that lm-eval made for it.
    """
    tasks = {task_of_file(path): read_lm_eval_log(path) for path in files}
    return LoggedModel(files[0].parent.name, {None: tasks})


class _Line(NamedTuple):
    """One line of a log: an item under one filter."""

    identity: ItemIdentity
    filter: str
    metrics: tuple[str, ...]
    sample: Mapping[str, Any]


def read_lm_eval_log(path: Path) -> LoggedTask:
    """Read one log; `path` ends in .jsonl or .jsonl.gz.

    Raises `HarnessError` for a torn line, for one without what lm-eval writes, and for an item that
    stands twice under one filter.
    """
    task, notes = task_of_file(path), _notes_of_run(path)
    by_filter: dict[str, dict[int, _Line]] = {}
    for number, value in enumerate(_lines(path), 1):
        line = _parse_line(value, f"{path}, line {number}")
        lines = by_filter.setdefault(line.filter, {})
        if line.identity.number in lines:
            raise HarnessError(
                f"{path}: item {line.identity.number} stands there twice (filter {line.filter}); "
                "give the log of one run"
            )
        lines[line.identity.number] = line
    if not by_filter:
        raise HarnessError(f"{path}: no item; give a log that lm-eval wrote with --log_samples")
    items = _items_of(by_filter, path)
    scores = {
        name: score
        for filter_name, lines in by_filter.items()
        for name, score in _scores_of(
            task, filter_name, [lines[item.number] for item in items], notes
        ).items()
    }
    return LoggedTask(task, str(path), items, scores, notes.limited)


def _lines(path: Path) -> list[Any]:
    try:
        return list(read_json_lines(path))
    except Unreadable as problem:
        raise HarnessError(
            f"{problem}; the log is torn or edited: score the model again with --log_samples"
        ) from problem


def _parse_line(value: Any, where: str) -> _Line:
    """Return a line's item. Raises `HarnessError` where lm-eval did not write it."""
    if not isinstance(value, dict):
        raise HarnessError(f"{where}: no object; give a samples_*.jsonl of lm-eval")
    for name, kind in _FIELDS.items():
        if type(value.get(name)) is not kind:
            raise HarnessError(
                f"{where}: no {name}, which lm-eval 0.4.5 and later write; give a samples_*.jsonl "
                "of lm-eval"
            )
    metrics = value.get("metrics")
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        raise HarnessError(f"{where}: no list of metrics; give a samples_*.jsonl of lm-eval")
    identity = ItemIdentity(
        value["doc_id"], value["doc_hash"], value["target_hash"], value["prompt_hash"]
    )
    return _Line(identity, value["filter"], tuple(metrics), value)


def _items_of(by_filter: Mapping[str, Mapping[int, _Line]], path: Path) -> tuple[ItemIdentity, ...]:
    """Return the items by their number. Raises `HarnessError` where filters have other ones."""
    first_name, *others = by_filter
    items = tuple(
        by_filter[first_name][number].identity for number in sorted(by_filter[first_name])
    )
    for name in others:
        lines = by_filter[name]
        if {line.identity for line in lines.values()} != set(items):
            raise HarnessError(
                f"{path}: filter {first_name} has {len(items):,} items, {name} {len(lines):,} or "
                "other ones: the log is torn; score the model again with --log_samples"
            )
    return items


class _RunNotes(NamedTuple):
    """What `results_DATE.json` says of a task."""

    higher_is_better: Mapping[str, Any]  # by metric
    limited: bool | None  # None: it does not say


def _notes_of_run(path: Path) -> _RunNotes:
    """Read what the results beside a log say of its task; nothing where there are none."""
    match = _SAMPLES.fullmatch(path.name)
    results: dict[str, Any] = {}
    if match and match["date"]:
        with suppress(Unreadable):
            results = read_object(path.parent / f"results_{match['date']}.json")
    task = task_of_file(path)
    directions = _inner(_inner(results, "higher_is_better"), task)
    counts = _inner(_inner(results, "n-samples"), task)
    original, effective = counts.get("original"), counts.get("effective")
    if isinstance(original, int) and isinstance(effective, int):
        return _RunNotes(directions, effective < original)
    return _RunNotes(directions, None)


def _inner(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = value.get(name)
    return inner if isinstance(inner, dict) else {}


def _scores_of(
    task: str, filter_name: str, lines: Sequence[_Line], notes: _RunNotes
) -> dict[str, TaskScore]:
    """Return the score of every metric of a filter, by the figure's name.

    It is called by its metric; by its filter where that says more; by both where there are several.
    """
    metrics = list(dict.fromkeys(metric for line in lines for metric in line.metrics))
    scores = {}
    for metric in metrics:
        name = metric if filter_name == "none" else filter_name
        if filter_name != "none" and len(metrics) > 1:
            name = f"{metric},{filter_name}"
        scores[name] = _score_of(task, FigureName(name, metric), lines, notes)
    return scores


def _score_of(task: str, name: FigureName, lines: Sequence[_Line], notes: _RunNotes) -> TaskScore:
    """Return the score of one metric: of numbers, of documents, or without items that pair."""
    values = [line.sample.get(name.metric) for line in lines]
    if name.metric in PERPLEXITIES and (totals := _totals(values)):
        value = _figure_of_documents(name.metric, totals)
        return score_of_documents(task, name.metric, totals, value, digest=digest_of(totals))
    numbers = [as_number(value) for value in values]
    present = [number for number in numbers if number is not None]
    if len(present) < len(numbers):
        reason = (
            f"{len(numbers) - len(present):,} of {len(numbers):,} items have no {name.metric} of "
            "their own"
        )
        return score_without_items(task, name, len(numbers), reason)
    lower = notes.higher_is_better.get(name.metric, name.metric not in _LOWER_IS_BETTER) is False
    answers = [_answer(line.sample.get("filtered_resps")) for line in lines]
    return score_of_numbers(task, name, present, digest=digest_of(answers, present), lower=lower)


def _totals(values: Sequence[Any]) -> list[tuple[float, float]]:
    """Return documents as (log-likelihood, length); empty where an item is no such pair."""
    totals = []
    for value in values:
        numbers = [as_number(part) for part in value] if isinstance(value, list) else []
        if len(numbers) != 2 or numbers[0] is None or not numbers[1]:
            return []
        totals.append((numbers[0], numbers[1]))
    return totals


def _figure_of_documents(metric: str, totals: Sequence[tuple[float, float]]) -> float:
    """Return lm-eval's figure of documents: a perplexity, or bits a byte."""
    nats = -sum(total for total, _ in totals) / sum(size for _, size in totals)
    return nats / math.log(2) if metric == BITS_PER_BYTE else math.exp(nats)


def _answer(responses: Any) -> Any:
    """Return what was answered: the likeliest choice's position, or what the filter left.

    Two models whose answers are equal need not have equal log-likelihoods.
    """
    likelihoods = _likelihoods(responses)
    if len(likelihoods) > 1:
        return likelihoods.index(max(likelihoods))
    return responses


def _likelihoods(responses: Any) -> list[float]:
    """Return the log-likelihoods of choices, which a log holds as texts; empty of other answers."""
    if not isinstance(responses, list):
        return []
    try:
        return (
            [float(pair[0]) for pair in responses if str(pair[1]) in ("True", "False")]
            if all(isinstance(pair, list) and len(pair) == 2 for pair in responses)
            else []
        )
    except ValueError:
        return []
