"""A task's figures from its item rows, weighed as lm-eval weighs them.

A figure is the mean of hits or of numbers, follows from documents' likelihoods, or belongs to all
items together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from harness.contract import Task
from harness.errors import CellFailed
from harness.files.digests import digest_of
from harness.records.record import TaskScore
from harness.scoring.items import ItemRow, ScoredTask
from harness.scoring.parts import MAX_CHARACTERS, RecordedStatistics, recorded_statistics
from harness.statistics import pooled
from harness.statistics.figures import BITS_PER_BYTE, standard_error, weighted_mean

# guessing scores on these, by the number of choices
_METRICS_WITH_CHANCE = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info"})


@dataclass(frozen=True)
class SubtaskResult:
    """One of lm-eval's tasks with its rows and lm-eval's own figure; a group has several."""

    scored: ScoredTask
    rows: list[ItemRow]
    value: float

    @property
    def filter(self) -> str:
        """The filter whose answers are judged."""
        return filter_of(self.scored)

    @property
    def extractor(self) -> str:
        """The name under which its rows hold the figure's outcomes."""
        return self.filter if self.scored.task.kind == "generate" else self.scored.metric

    @cached_property
    def numbers(self) -> list[float]:
        """Each item's value, where their mean is the figure; else empty."""
        values = [row.value(self.extractor) for row in self.rows]
        present = [value for value in values if value is not None]
        makes_figure = len(present) == len(values) and math.isclose(
            fmean(present), self.value, rel_tol=1e-9, abs_tol=1e-12
        )
        return present if makes_figure else []

    @cached_property
    def statistics(self) -> RecordedStatistics:
        """What its items add to a figure that is not the mean of their values, or why nothing."""
        metric = self.scored.metric
        parts = [row.parts.get(self.extractor, row.value(self.extractor)) for row in self.rows]
        missing = sum(part is None for part in parts)
        if 0 < missing < len(parts):
            reason = f"{missing} of {len(parts)} items of {self.scored.name} have no {metric}"
            return RecordedStatistics(None, reason)
        aggregation = self.scored.built.aggregation().get(metric)
        return recorded_statistics(parts, aggregation, metric, self.value)

    @property
    def unpaired_reason(self) -> str:
        """Why the figure cannot be computed again from its items; "" where it can."""
        return "" if self.numbers else self.statistics.reason


def filter_of(scored: ScoredTask) -> str:
    """Return the filter of a task's figure: the primary one where samples have it, else the first.

    Only written answers have a primary filter.
    """
    names = [str(sample["filter"]) for sample in scored.samples]
    is_primary = scored.task.kind == "generate" and scored.task.primary in names
    return scored.task.primary if is_primary else names[0]


def metric_of(task: Task, name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric that judges one of lm-eval's tasks.

    It is the task's own metric where items have it, else the first metric that items have.
    """
    metrics = dict.fromkeys(metric for sample in samples for metric in sample["metrics"])
    preferred = str(
        getattr(task, "metric", "exact_match" if task.kind == "generate" else task.primary)
    )
    if not metrics:
        raise CellFailed(f"{name} gives its items no metric; state one in its metric_list")
    return preferred if preferred in metrics else next(iter(metrics))


def subtask_result(
    scored: ScoredTask, rows: list[ItemRow], results: Mapping[str, Any]
) -> SubtaskResult:
    """Join rows with lm-eval's own figure; raises `CellFailed` where that is no number."""
    figure = results[scored.name].get(f"{scored.metric},{filter_of(scored)}")
    try:
        return SubtaskResult(scored, rows, float(figure))
    except (TypeError, ValueError) as problem:
        raise CellFailed(
            f"{scored.name}: lm-eval's {scored.metric} is {figure!r:.60}, no number; pick another "
            "metric for it"
        ) from problem


def summarise(task: Task, subtasks: Sequence[SubtaskResult], *, model: Any) -> TaskScore:
    """Return a task's figures from the rows of its subtasks.

    `model` is the `HarnessLM` that answered; it has counts, notes and conversations. Two models
    have the same items where the conversations are the same, whatever their chat templates are.
    """
    rows = [row for subtask in subtasks for row in subtask.rows]
    rows.sort(key=lambda row: row.item)
    lower = _lower_is_better(task, subtasks)
    common = {
        "task": task.name,
        "version": task.version,
        "kind": "perplexity" if _is_perplexity(task, subtasks) else task.kind,
        "n": len(rows),
        "metric": subtasks[0].scored.metric,
        "higher_is_better": not lower,
        "primary": _primary_of(task, subtasks),
        "items_digest": _items_digest(rows, model.conversations),
        "answers_digest": digest_of([row.answer for row in rows]),
        "likelihoods_digest": likelihoods_digest(rows),
        "cut_prompts": model.cut_prompts,
        "seconds": model.seconds,
        "from_journal": model.answer_cache.hits,
        "notes": (*model.notes, *getattr(task, "notes", ()), *_metric_notes(task, subtasks)),
    }
    if _is_perplexity(task, subtasks):
        return TaskScore(**{**common, **_document_figures(task, subtasks, rows)})
    numbers = (
        [value for subtask in subtasks for value in subtask.numbers]
        if all(subtask.numbers for subtask in subtasks)
        else []
    )
    figures = (
        _mean_figures(task, subtasks, rows, numbers, lower=lower)
        if numbers
        else _pooled_figures(task, subtasks)
    )
    return TaskScore(**{**common, **_answer_figures(task, subtasks, rows), **figures})


def _is_perplexity(task: Task, subtasks: Sequence[SubtaskResult]) -> bool:
    """Tell whether the figure is a perplexity: of documents, or of the ends of texts, by item."""
    of_ends = task.kind == "continue" and subtasks[0].scored.metric == "perplexity"
    return of_ends or task.kind == "perplexity"


def _primary_of(task: Task, subtasks: Sequence[SubtaskResult]) -> str:
    """Return the extractor whose outcomes are the figure's."""
    return task.primary if task.kind == "generate" else subtasks[0].scored.metric


def _items_digest(rows: Sequence[ItemRow], conversations: Mapping[str, str]) -> str:
    """Return a digest of the items: documents, targets, and conversations in place of prompts."""
    prompts = [conversations.get(row.prompt_hash, row.prompt_hash) for row in rows]
    return digest_of(
        [
            (row.item, row.doc_hash, prompt, row.target_hash)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
    )


def _answer_figures(
    task: Task, subtasks: Sequence[SubtaskResult], rows: Sequence[ItemRow]
) -> dict[str, Any]:
    """Return figures of the answers themselves: truncated, invalid, length, chosen positions."""
    is_written = task.kind == "generate"
    is_invalid = [
        row.extracted.get(subtask.extractor, "") is None
        for subtask in subtasks
        for row in subtask.rows
    ]
    return {
        "truncated_share": _share([row.stop == "length" for row in rows]) if is_written else None,
        "tokens_per_answer": sum(row.tokens for row in rows) / len(rows) if is_written else None,
        "invalid_share": _share(is_invalid),
        "chosen": _position_shares(rows) if task.kind == "choose" else {},
    }


def likelihoods_digest(rows: Sequence[ItemRow]) -> str:
    """Return a digest of the log-probabilities of choices or documents, to the last bit.

    "" for answers that are written, which have none.
    """
    likelihoods = [(row.position, row.log_probabilities) for row in rows]
    return digest_of(likelihoods) if all(numbers for _, numbers in likelihoods) else ""


def _lower_is_better(task: Task, subtasks: Sequence[SubtaskResult]) -> bool:
    """Tell whether lower is better; raises `CellFailed` for a group of different directions."""
    if task.kind == "perplexity":
        return True
    lower_of = {
        subtask.scored.metric: subtask.scored.lower_is_better(subtask.scored.metric)
        for subtask in subtasks
    }
    if len(set(lower_of.values())) > 1:
        directions = ", ".join(
            f"{metric} {'lower' if lower else 'higher'}" for metric, lower in lower_of.items()
        )
        raise CellFailed(
            f"{task.name}: its tasks are better in different directions ({directions}); name them "
            "one by one, each as lm-eval:NAME"
        )
    return any(lower_of.values())


def _metric_notes(task: Task, subtasks: Sequence[SubtaskResult]) -> list[str]:
    """Return a note where subtasks have different metrics, or another one than was configured."""
    names_of: dict[str, list[str]] = {}
    for subtask in subtasks:
        names_of.setdefault(subtask.scored.metric, []).append(subtask.scored.name)
    if len(names_of) > 1:
        listed = "; ".join(
            f"{metric}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for metric, names in names_of.items()
        )
        return [f"its tasks are judged by different metrics ({listed})"]
    configured, [metric] = getattr(task, "metric", None), names_of
    if configured and configured != metric:
        return [f"its items have no {configured}; they are judged by {metric}"]
    return []


def _weighs_by_size(task: Task) -> bool:
    return bool(getattr(task, "by_size", True))


def _subtask_weights(task: Task, subtasks: Sequence[SubtaskResult]) -> list[int]:
    """Return how much each subtask counts in its group: by its number of items, or all alike."""
    return [len(subtask.rows) if _weighs_by_size(task) else 1 for subtask in subtasks]


def _mean_of_subtasks(task: Task, subtasks: Sequence[SubtaskResult]) -> float:
    """Return lm-eval's figure of a group: the weighted mean over its tasks."""
    weights = _subtask_weights(task, subtasks)
    products = (subtask.value * weight for subtask, weight in zip(subtasks, weights, strict=True))
    return math.fsum(products) / sum(weights)


def _pooled_figures(task: Task, subtasks: Sequence[SubtaskResult]) -> dict[str, Any]:
    """Return the fields of a figure of all items together, where no item has a value of its own.

    It comes with what each item adds to it, or with the reason why it cannot be compared.
    """
    several = len(subtasks) > 1
    common = {
        "value": _mean_of_subtasks(task, subtasks),
        "stderr": None,
        "outcomes": {},
        "chance": 0.0,
        "unit": "number",
        "groups": {subtask.scored.name: subtask.value for subtask in subtasks} if several else {},
    }
    reasons = [subtask.unpaired_reason for subtask in subtasks if subtask.unpaired_reason]
    if reasons:
        return {**common, "unpaired": "; ".join(dict.fromkeys(reasons))}
    corpora = [
        subtask.statistics.corpus
        for subtask in subtasks
        if not subtask.numbers and subtask.statistics.corpus is not None
    ]
    lines = tuple(line for corpus in corpora for line in corpus.statistics)
    if len(corpora) < len(subtasks) or len({corpus.form for corpus in corpora}) > 1:
        reason = "its tasks' figures are of different kinds, so resampled items cannot compare them"
        return {**common, "unpaired": reason}
    if several and sum(map(len, lines)) > MAX_CHARACTERS:
        reason = (
            f"what its items add takes more than the {MAX_CHARACTERS:,} characters that a record "
            "holds; try --limit"
        )
        return {**common, "unpaired": reason}
    corpus = pooled.Corpus(corpora[0].form, lines)
    parts = _pooled_parts(task, subtasks) if several else ()
    return {
        **common,
        "form": corpus.form,
        "statistics": lines,
        "parts": parts,
        "stderr": pooled.standard_error(corpus, parts),
        "signed": corpus.form in pooled.SIGNED_FORMS,
        "unit": "share" if corpus.form in pooled.SHARE_FORMS else "number",
    }


def _pooled_parts(task: Task, subtasks: Sequence[SubtaskResult]) -> tuple[tuple[int, float], ...]:
    """Return (number of items, weight of each item) of every subtask."""
    weights = _subtask_weights(task, subtasks)
    return tuple(
        (len(subtask.rows), weight / sum(weights) / len(subtask.rows))
        for subtask, weight in zip(subtasks, weights, strict=True)
    )


def _mean_figures(
    task: Task,
    subtasks: Sequence[SubtaskResult],
    rows: Sequence[ItemRow],
    numbers: Sequence[float],
    *,
    lower: bool,
) -> dict[str, Any]:
    """Return the fields of a figure that is the mean of items' values.

    `numbers` holds these values in item order; `lower` tells whether lower is better.
    """
    parts = tuple(
        (len(subtask.rows), 1 / (len(subtasks) * len(subtask.rows))) for subtask in subtasks
    )
    parts = parts if len(subtasks) > 1 and not _weighs_by_size(task) else ()
    primary = _primary_of(task, subtasks)
    values_of = {primary: list(numbers), **_other_values(rows, primary)}
    is_binary = {
        name: set(values) <= {0.0, 1.0} and not (lower and name == primary)
        for name, values in values_of.items()
    }
    value = weighted_mean(numbers, parts)
    by_group = _group_means(rows, numbers)
    return {
        "value": value,
        "stderr": math.sqrt(value * (1 - value) / len(rows))
        if is_binary[primary] and not parts
        else standard_error(numbers, parts),
        "outcomes": {
            name: "".join("1" if value else "0" for value in values)
            for name, values in values_of.items()
            if is_binary[name]
        },
        "values": {
            name: tuple(values) for name, values in values_of.items() if not is_binary[name]
        },
        "parts": parts,
        "chance": _chance(task, subtasks, rows, parts),
        "unit": _unit(numbers, lower=lower),
        "groups": by_group,
        "macro": sum(by_group.values()) / len(by_group) if by_group else None,
    }


def _other_values(rows: Sequence[ItemRow], primary: str) -> dict[str, list[float]]:
    """Return the items' values by the extractors beside the primary one that give all a value."""
    values_of: dict[str, list[float]] = {}
    for name in rows[0].correct:
        values = [value for row in rows if (value := row.value(name)) is not None]
        if name != primary and len(values) == len(rows):
            values_of[name] = values
    return values_of


def _chance(
    task: Task,
    subtasks: Sequence[SubtaskResult],
    rows: Sequence[ItemRow],
    parts: tuple[tuple[int, float], ...],
) -> float:
    """Return what guessing scores; 0 where the metric does not tell."""
    metrics = {subtask.scored.metric for subtask in subtasks}
    if task.kind == "choose" and metrics <= _METRICS_WITH_CHANCE:
        return weighted_mean([row.chance for row in rows], parts)
    return task.chance if task.kind == "generate" else 0.0


def _group_means(rows: Sequence[ItemRow], numbers: Sequence[float]) -> dict[str, float]:
    """Return the mean of each group of items; empty where all are of one group."""
    groups = sorted({row.group for row in rows})
    if len(groups) < 2:
        return {}
    return {
        group: fmean(
            [number for row, number in zip(rows, numbers, strict=True) if row.group == group]
        )
        for group in groups
    }


def _unit(numbers: Sequence[float], *, lower: bool) -> Literal["share", "number"]:
    return "share" if not lower and min(numbers) >= 0 and max(numbers) <= 1 else "number"


def _document_figures(
    task: Task, subtasks: Sequence[SubtaskResult], rows: Sequence[ItemRow]
) -> dict[str, Any]:
    """Return the fields of a perplexity, or of bits per byte.

    It is per word or byte of all documents. Of a group it is the mean of its tasks where lm-eval
    makes that mean, or where their figures are of different kinds: then it cannot be compared item
    by item.
    """
    common: dict[str, Any] = {"stderr": None, "outcomes": {}, "invalid_share": 0.0, "chance": 0.0}
    forms = {_document_form(subtask) for subtask in subtasks}
    metrics = sorted({subtask.scored.metric for subtask in subtasks})  # per word, or per byte
    is_averaged = len(subtasks) > 1 and getattr(task, "aggregated", False)
    is_mixed = len(forms) > 1 or len(metrics) > 1
    if is_averaged or is_mixed or "" in forms:
        if is_averaged:
            reason = f"{metrics[0]} of {len(subtasks)} tasks is the mean of theirs"
        elif is_mixed:
            reason = f"its tasks have figures of different kinds ({', '.join(metrics)})"
        else:
            reason = subtasks[0].unpaired_reason
        return {**common, "value": _mean_of_subtasks(task, subtasks), "unpaired": reason}
    totals = tuple((row.log_probabilities[0], row.words) for row in rows)
    [form] = forms
    metric = BITS_PER_BYTE if form == BITS_PER_BYTE else subtasks[0].scored.metric
    return {
        **common,
        "value": _document_figure(form, totals),
        "totals": totals,
        "metric": metric,
    }


def _document_figure(form: str, totals: Sequence[tuple[float, float]]) -> float:
    """Return perplexity or bits per byte of documents, (log-likelihood, number of units) each."""
    nats = -sum(total for total, _ in totals) / sum(size for _, size in totals)
    return (
        nats / math.log(2) if form == BITS_PER_BYTE else math.exp(nats) if nats < 700 else math.inf
    )


def _document_form(subtask: SubtaskResult) -> str:
    """Return the form of lm-eval's figure of documents: perplexity, or bits per byte.

    "" where it does not follow from the documents' likelihoods and sizes.
    """
    totals = [(row.log_probabilities[0], row.words) for row in subtask.rows]
    if not all(size > 0 for _, size in totals):
        return ""
    for form in ("perplexity", BITS_PER_BYTE):
        if math.isclose(subtask.value, _document_figure(form, totals), rel_tol=1e-9):
            return form
    return ""


def _position_shares(rows: Sequence[ItemRow]) -> dict[str, float]:
    """Return how often each position was chosen, by letter; by number from the 27th on."""
    most = max(len(row.log_probabilities) for row in rows)
    names = [
        chr(ord("A") + position) if position < 26 else str(position + 1) for position in range(most)
    ]
    return {
        name: _share([row.position == position for row in rows])
        for position, name in enumerate(names)
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def outcome_changes(
    before: Sequence[ItemRow], after: Sequence[ItemRow], extractor: str
) -> list[bool]:
    """Tell of every item that is in both scorings whether its outcome changed.

    Where items have no outcome, answers are compared.
    """
    before_of = {row.item: row for row in before}
    pairs = [(before_of[row.item], row) for row in after if row.item in before_of]
    return [
        old.answer != new.answer
        if new.value(extractor) is None
        else old.value(extractor) != new.value(extractor)
        for old, new in pairs
    ]
