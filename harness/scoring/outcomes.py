"""From item rows to a task's figures: hits, numbers, documents, or one figure of all items
together, weighed as lm-eval weighs them.
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
from harness.scoring.items import ItemRow, Scored
from harness.scoring.parts import MOST, Kept, kept
from harness.statistics import pooled
from harness.statistics.figures import BITS_PER_BYTE, standard_error, weighted_mean

# metrics that guessing scores by the number of choices
_GUESSED = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info"})


@dataclass(frozen=True)
class Leaf:
    """One of lm-eval's tasks with its rows and lm-eval's own figure."""

    scored: Scored
    rows: list[ItemRow]
    value: float

    @property
    def filter(self) -> str:
        """The filter whose answers are judged."""
        return filter_of(self.scored)

    @property
    def extractor(self) -> str:
        """Under what name its rows carry the figure's outcomes."""
        return self.filter if self.scored.task.kind == "generate" else self.scored.metric

    @cached_property
    def numbers(self) -> list[float]:
        """Each item's value, where their mean is the figure; else empty."""
        found = [row.value(self.extractor) for row in self.rows]
        given = [value for value in found if value is not None]
        same = len(given) == len(found) and math.isclose(
            fmean(given), self.value, rel_tol=1e-9, abs_tol=1e-12
        )
        return given if same else []

    @cached_property
    def kept(self) -> Kept:
        """What its items add to a figure that is not their values' mean, or why nothing can be
        compared.
        """
        metric = self.scored.metric
        found = [row.parts.get(self.extractor, row.value(self.extractor)) for row in self.rows]
        missing = sum(part is None for part in found)
        if 0 < missing < len(found):
            return Kept(
                None, f"{missing} of {len(found)} items of {self.scored.name} have no {metric}"
            )
        return kept(found, self.scored.built.aggregation().get(metric), metric, self.value)

    @property
    def why(self) -> str:
        """Say why its items carry nothing that the figure could be made from again; "" where they
        do.
        """
        return "" if self.numbers else self.kept.why


def filter_of(scored: Scored) -> str:
    """Return the filter that a task's figure is made by: the primary one where this member of a
    group has it, else its first.
    """
    names = [str(sample["filter"]) for sample in scored.samples[:1]] + [
        str(sample["filter"]) for sample in scored.samples
    ]
    return (
        scored.task.primary
        if scored.task.kind == "generate" and scored.task.primary in names
        else names[0]
    )


def metric_of(task: Task, name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric that one of lm-eval's tasks is judged by: the task's own where items have
    it, else the first that they have.
    """
    given = dict.fromkeys(metric for sample in samples for metric in sample["metrics"])
    wanted = str(
        getattr(task, "metric", "exact_match" if task.kind == "generate" else task.primary)
    )
    if not given:
        raise CellFailed(f"{name} gives its items no metric; state one in its metric_list")
    return wanted if wanted in given else next(iter(given))


def leaf_of(scored: Scored, rows: list[ItemRow], results: Mapping[str, Any]) -> Leaf:
    """Join rows with lm-eval's own figure; raises `CellFailed` where that is no number."""
    told = results[scored.name].get(f"{scored.metric},{filter_of(scored)}")
    try:
        return Leaf(scored, rows, float(told))
    except (TypeError, ValueError) as problem:
        raise CellFailed(
            f"{scored.name}: lm-eval's {scored.metric} is {told!r:.60}, no number; pick another "
            "metric for it"
        ) from problem


def summarise(task: Task, leaves: Sequence[Leaf], *, model: Any) -> TaskScore:
    """Derive a task's figures from its rows; `model` is the one that answered, for its counts and
    for what its prompts say.

    Items are the same where the conversations are, whatever template each model is shown them in.
    """
    rows = [row for leaf in leaves for row in leaf.rows]
    rows.sort(key=lambda row: row.item)
    asked = [model.conversations.get(row.prompt_hash, row.prompt_hash) for row in rows]
    lower = _direction(task, leaves)
    shared = {
        "task": task.name,
        "version": task.version,
        "kind": task.kind,
        "n": len(rows),
        "metric": leaves[0].scored.metric,
        "higher_is_better": not lower,
        "primary": task.primary if task.kind == "generate" else leaves[0].scored.metric,
        "items_digest": digest_of(
            [
                (row.item, row.doc_hash, text, row.target_hash)
                for row, text in zip(rows, asked, strict=True)
            ]
        ),
        "answers_digest": digest_of([row.answer for row in rows]),
        "likelihoods_digest": likelihoods_digest(rows),
        "cut_prompts": model.cut_prompts,
        "seconds": model.seconds,
        "from_journal": model.journal.read,
        "notes": (*model.notes, *getattr(task, "notes", ()), *_unlike(task, leaves)),
    }
    if task.kind == "perplexity":
        return TaskScore(**{**shared, **_of_documents(task, leaves, rows)})
    numbers = (
        [value for leaf in leaves for value in leaf.numbers]
        if all(leaf.numbers for leaf in leaves)
        else []
    )
    written = {
        "truncated_share": _share([row.stop == "length" for row in rows])
        if task.kind == "generate"
        else None,
        "tokens_per_answer": sum(row.tokens for row in rows) / len(rows)
        if task.kind == "generate"
        else None,
        "invalid_share": _share(
            [row.extracted.get(leaf.extractor, "") is None for leaf in leaves for row in leaf.rows]
        ),
        "chosen": _positions(rows) if task.kind == "choose" else {},
    }
    figures = (
        _of_items(task, leaves, rows, numbers, lower=lower)
        if numbers
        else _of_all_together(task, leaves)
    )
    return TaskScore(**{**shared, **written, **figures})


def likelihoods_digest(rows: Sequence[ItemRow]) -> str:
    """Return a digest of what was computed for choices or documents, to the last bit; "" where
    nothing was (answers are written).
    """
    likelihoods = [(row.position, row.log_probabilities) for row in rows]
    return digest_of(likelihoods) if all(numbers for _, numbers in likelihoods) else ""


def _direction(task: Task, leaves: Sequence[Leaf]) -> bool:
    """Return whether lower is better; raises `CellFailed` for a group whose members point both
    ways.
    """
    if task.kind == "perplexity":
        return True
    found = {leaf.scored.metric: leaf.scored.lower_is_better(leaf.scored.metric) for leaf in leaves}
    if len(set(found.values())) > 1:
        told = ", ".join(
            f"{metric} {'lower' if lower else 'higher'}" for metric, lower in found.items()
        )
        raise CellFailed(
            f"{task.name}: its tasks are better in different directions ({told}); name them one by "
            "one, each as lm-eval:NAME"
        )
    return any(found.values())


def _unlike(task: Task, leaves: Sequence[Leaf]) -> list[str]:
    """Say where tasks of a group are judged by different metrics, or by another one than
    was asked.
    """
    by_metric: dict[str, list[str]] = {}
    for leaf in leaves:
        by_metric.setdefault(leaf.scored.metric, []).append(leaf.scored.name)
    wanted = getattr(task, "metric", None)
    told = "; ".join(
        f"{metric}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for metric, names in by_metric.items()
    )
    if len(by_metric) > 1:
        return [f"its tasks are judged by different metrics ({told})"]
    return (
        [f"its items have no {wanted}; they are judged by {told.partition(':')[0]}"]
        if wanted and wanted not in by_metric
        else []
    )


def _by_size(task: Task) -> bool:
    return bool(getattr(task, "by_size", True))


def _mean_of_leaves(task: Task, leaves: Sequence[Leaf]) -> float:
    """Return lm-eval's figure of a group: the mean over its tasks, by their items or each alike."""
    sizes = [len(leaf.rows) if _by_size(task) else 1 for leaf in leaves]
    return math.fsum(leaf.value * size for leaf, size in zip(leaves, sizes, strict=True)) / sum(
        sizes
    )


def _of_all_together(task: Task, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Return a figure that no item has a value of: with what each item adds to it, or with the
    reason why it cannot be compared.
    """
    shared = {
        "value": _mean_of_leaves(task, leaves),
        "stderr": None,
        "outcomes": {},
        "chance": 0.0,
        "unit": "number",
        "groups": {leaf.scored.name: leaf.value for leaf in leaves} if len(leaves) > 1 else {},
    }
    if why := "; ".join(dict.fromkeys(leaf.why for leaf in leaves if leaf.why)):
        return {**shared, "unpaired": why}
    runs = [leaf.kept.run for leaf in leaves if not leaf.numbers and leaf.kept.run is not None]
    lines = tuple(line for run in runs for line in run.statistics)
    if len(runs) < len(leaves) or len({run.form for run in runs}) > 1:
        return {
            **shared,
            "unpaired": "its tasks' figures are of different kinds, which no draw of items "
            "compares",
        }
    if len(leaves) > 1 and sum(map(len, lines)) > MOST:
        return {
            **shared,
            "unpaired": f"what its items add takes more than the {MOST:,} characters that a record "
            "holds; try --limit",
        }
    sizes = [len(leaf.rows) if _by_size(task) else 1 for leaf in leaves]
    parts = tuple(
        (len(leaf.rows), size / sum(sizes) / len(leaf.rows))
        for leaf, size in zip(leaves, sizes, strict=True)
    )
    run, parts = pooled.Corpus(runs[0].form, lines), parts if len(leaves) > 1 else ()
    return {
        **shared,
        "form": run.form,
        "statistics": lines,
        "parts": parts,
        "stderr": pooled.standard_error(run, parts),
        "signed": run.form in pooled.SIGNED_FORMS,
        "unit": "share" if run.form in pooled.SHARE_FORMS else "number",
    }


def _of_items(
    task: Task,
    leaves: Sequence[Leaf],
    rows: Sequence[ItemRow],
    numbers: Sequence[float],
    *,
    lower: bool,
) -> dict[str, Any]:
    """Return a figure that is the mean of its items' values; `numbers` are those, in item order."""
    parts = tuple((len(leaf.rows), 1 / (len(leaves) * len(leaf.rows))) for leaf in leaves)
    parts = parts if len(leaves) > 1 and not _by_size(task) else ()
    primary = task.primary if task.kind == "generate" else leaves[0].scored.metric
    every = {primary: list(numbers)}
    for name in rows[0].correct:
        found = [value for row in rows if (value := row.value(name)) is not None]
        if name != primary and len(found) == len(rows):
            every[name] = found
    hits = {
        name: set(values) <= {0.0, 1.0} and not (lower and name == primary)
        for name, values in every.items()
    }
    value = weighted_mean(numbers, parts)
    plain = hits[primary] and not parts
    chances = [row.chance for row in rows]
    guessed = task.kind == "choose" and all(leaf.scored.metric in _GUESSED for leaf in leaves)
    grouped = sorted({row.group for row in rows})
    by_group = {
        group: fmean(
            [number for row, number in zip(rows, numbers, strict=True) if row.group == group]
        )
        for group in grouped
        if len(grouped) > 1
    }
    return {
        "value": value,
        "stderr": math.sqrt(value * (1 - value) / len(rows))
        if plain
        else standard_error(numbers, parts),
        "outcomes": {
            name: "".join("1" if value else "0" for value in values)
            for name, values in every.items()
            if hits[name]
        },
        "values": {name: tuple(values) for name, values in every.items() if not hits[name]},
        "parts": parts,
        "chance": weighted_mean(chances, parts)
        if guessed
        else task.chance
        if task.kind == "generate"
        else 0.0,
        "unit": _unit(numbers, lower=lower),
        "groups": by_group,
        "macro": sum(by_group.values()) / len(by_group) if by_group else None,
    }


def _unit(numbers: Sequence[float], *, lower: bool) -> Literal["share", "number"]:
    return "share" if not lower and min(numbers) >= 0 and max(numbers) <= 1 else "number"


def _of_documents(task: Task, leaves: Sequence[Leaf], rows: Sequence[ItemRow]) -> dict[str, Any]:
    """Return a perplexity, or bits per byte: by the words or bytes of all documents, or of a group
    as lm-eval averages its tasks.
    """
    figures: dict[str, Any] = {"stderr": None, "outcomes": {}, "invalid_share": 0.0, "chance": 0.0}
    forms = {_form(leaf) for leaf in leaves}
    averaged = len(leaves) > 1 and getattr(task, "aggregated", False)
    if averaged or len(forms) > 1 or "" in forms:
        why = (
            f"{leaves[0].scored.metric} of {len(leaves)} tasks is the mean of theirs"
            if averaged
            else leaves[0].why
        )
        return {**figures, "value": _mean_of_leaves(task, leaves), "unpaired": why}
    totals = tuple((row.log_probabilities[0], row.words) for row in rows)
    [form] = forms
    metric = BITS_PER_BYTE if form == BITS_PER_BYTE else leaves[0].scored.metric
    return {**figures, "value": _figure(form, totals), "totals": totals, "metric": metric}


def _figure(form: str, totals: Sequence[tuple[float, float]]) -> float:
    nats = -sum(total for total, _ in totals) / sum(size for _, size in totals)
    return (
        nats / math.log(2) if form == BITS_PER_BYTE else math.exp(nats) if nats < 700 else math.inf
    )


def _form(leaf: Leaf) -> str:
    """Return how lm-eval's figure follows from the documents' likelihoods and sizes; "" where it
    follows otherwise.
    """
    totals = [(row.log_probabilities[0], row.words) for row in leaf.rows]
    if not all(size > 0 for _, size in totals):
        return ""
    told = {form: _figure(form, totals) for form in ("perplexity", BITS_PER_BYTE)}
    return next(
        (form for form, value in told.items() if math.isclose(leaf.value, value, rel_tol=1e-9)), ""
    )


def _positions(rows: Sequence[ItemRow]) -> dict[str, float]:
    """Return how often each position was chosen, by letter, or number from the 27th on."""
    most = max(len(row.log_probabilities) for row in rows)
    names = [chr(ord("A") + at) if at < 26 else str(at + 1) for at in range(most)]
    return {name: _share([row.position == at for row in rows]) for at, name in enumerate(names)}


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def changed(first: Sequence[ItemRow], again: Sequence[ItemRow], extractor: str) -> list[bool]:
    """Tell of every item that stands in both whether its outcome changed; where items have none,
    whether the answer did.
    """
    before = {row.item: row for row in first}
    both = [(before[row.item], row) for row in again if row.item in before]
    return [
        old.answer != new.answer
        if new.value(extractor) is None
        else old.value(extractor) != new.value(extractor)
        for old, new in both
    ]
