"""Two models that were scored on the same items, held against each other item by item. No torch.

`harness compare A B`: A stands where a baseline's frozen rows stand in `harness check`, so the
tests, the verdicts and the exit codes are those of its frozen layer: exact McNemar of hits and
misses, paired means of numbers, documents as clusters, pooled over the tasks, and Holm over tasks
and pool together. Nothing but the items and the figure has to agree: the models are any two.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from harness.analysis.comparison import tests_of
from harness.errors import HarnessError, unknown
from harness.escape import clean
from harness.files.digests import digest_of
from harness.gate.check import with_information_marked
from harness.gate.frozen import judge_pairs
from harness.gate.frozen_items import FrozenPair, are_hits, item_values_by_run, outcomes_by_run
from harness.gate.passed import meaning_of_passed
from harness.gate.pooled import validate_rules
from harness.gate.rules import CheckResult, Difference, Finding, Rules, not_comparable
from harness.records import columns
from harness.records.baseline import FrozenRow, freeze_score
from harness.records.conditions import Conditions, ModelReference
from harness.records.logged_items import LoggedModel, LoggedTask
from harness.records.record import RunRecord, TaskScore
from harness.statistics import stats
from harness.statistics.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class FigureChoice:
    """Which figure of a task is compared; None: the first one that both logs have."""

    metric: str | None = None  # lm-eval's name: acc_norm
    filter: str | None = None  # lm-eval's filter, our extractor: flexible-extract

    def fit(self, name: str, score: TaskScore) -> int:
        """Return how many of the two a figure fits."""
        metric, _, filter_name = name.partition(",")
        by_metric = self.metric in (name, metric, score.metric)
        return by_metric + (self.filter in (name, filter_name))

    def unfitting(self, scores: Sequence[tuple[str, TaskScore]]) -> str:
        """Return what was typed and fits none of these figures, "" where all of it fits one."""
        for flag, typed in (("--metric", self.metric), ("--filter", self.filter)):
            alone = FigureChoice(**{flag.removeprefix("--"): typed})
            if typed is not None and not any(alone.fit(name, score) for name, score in scores):
                return f"{flag} {typed}"
        return ""


@dataclass(frozen=True)
class ChangedItems:
    """The items of a task whose outcome is another one in the second model."""

    task: str
    figure: str
    lost: tuple[int, ...]  # numbers of the items that got worse: lm-eval's doc_id
    won: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison(CheckResult):
    """The verdict on the second of two models, and the items that changed."""

    before: str  # the first model's name
    after: str
    changed: tuple[ChangedItems, ...]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON-serialisable values."""
        return {
            **super().as_dict(),
            "before": self.before,
            "after": self.after,
            "changed": [asdict(items) for items in self.changed],
        }


class _TaskPair(NamedTuple):
    """One task of both models: its seeds, the figure that is compared, and what to know of it."""

    seeds: list[FrozenPair]
    figure: str
    numbers: tuple[int, ...]  # of the items, in their order
    difference: Difference | None  # why the two cannot be compared
    note: str = ""


def compare_models(
    before: LoggedModel,
    after: LoggedModel,
    rules: Rules,
    choice: FigureChoice | None = None,
    *,
    tasks: Collection[str] = (),
    other_prompts: bool = False,
) -> Comparison:
    """Compare the second model with the first on every task that both have, and pooled.

    `tasks` names some of them. With `other_prompts` the same documents may stand in other prompts
    (other shots, another chat template). Raises `HarnessError` where no task, no figure of the
    choice, or no training of both is there.
    """
    choice = choice or FigureChoice()
    names = _common_tasks(before, after, tasks)
    validate_rules(rules, names)
    seeds = _paired_seeds(before, after)
    _refuse_missing_figures(before, after, names, choice)
    pairs: dict[tuple[str, str], list[FrozenPair]] = {}
    findings, notes, compared = [], _notes_on_tasks(before, after, names, tasks), {}
    for task in names:
        pair = _pair_task(before, after, task, seeds, choice, other_prompts=other_prompts)
        notes += [pair.note] if pair.note else []
        if pair.difference is not None:
            findings.append(not_comparable("frozen", after.name, task, pair.difference))
        else:
            pairs[after.name, task], compared[task] = pair.seeds, pair
    judged = [_with_interval(finding, compared) for finding in judge_pairs(pairs, rules)]
    marked = with_information_marked([*findings, *judged], rules)
    return Comparison(
        findings=tuple(marked),
        notes=tuple(dict.fromkeys(notes)),
        rules=rules,
        passed_means=meaning_of_passed(marked, rules),
        before=before.name,
        after=after.name,
        changed=tuple(_changed_items(task, pair) for task, pair in compared.items()),
    )


def _common_tasks(before: LoggedModel, after: LoggedModel, tasks: Collection[str]) -> list[str]:
    """Return the tasks to compare. Raises `HarnessError` where there is none."""
    common = [task for task in before.tasks if task in after.tasks]
    for task in tasks:
        if task not in common:
            raise unknown("task of both", task, common, hint="(in --tasks)")
    if not common:
        raise HarnessError(
            f"no task stands in both: {before.name} has {', '.join(before.tasks)}; {after.name} "
            f"has {', '.join(after.tasks)}; give logs of the same tasks"
        )
    return [task for task in common if not tasks or task in tasks]


def _notes_on_tasks(
    before: LoggedModel, after: LoggedModel, names: Sequence[str], tasks: Collection[str]
) -> list[str]:
    """Return notes on what is held against what, and on the tasks of one model alone."""
    notes = [f"{after.name} is held against {before.name}, item by item"]
    for model, other in ((before, after), (after, before)):
        if unpaired := [task for task in model.tasks if task not in other.tasks and not tasks]:
            notes.append(f"only {model.name} has {', '.join(unpaired)}: not compared")
    if len(before.runs) > 1 or len(after.runs) > 1:
        notes.append(
            "trainings with several seeds are compared as the checkpoints that they are: the "
            "verdict is of these, not of the next training"
        )
    return notes


def _paired_seeds(before: LoggedModel, after: LoggedModel) -> list[tuple[int | None, int | None]]:
    """Return which trainings are held against each other; one alone is held against each.

    Raises `HarnessError` where both have several, of other seeds.
    """
    if set(before.runs) == set(after.runs):
        return [(seed, seed) for seed in after.runs]
    if len(before.runs) == 1:
        return [(next(iter(before.runs)), seed) for seed in after.runs]
    if len(after.runs) == 1:
        return [(seed, next(iter(after.runs))) for seed in before.runs]
    raise HarnessError(
        f"{before.name} was trained with seeds {', '.join(map(str, before.runs))} and {after.name} "
        f"with {', '.join(map(str, after.runs))}: give the folder of one cell of each "
        "(results/runs/cells/KEY)"
    )


def _refuse_missing_figures(
    before: LoggedModel, after: LoggedModel, names: Sequence[str], choice: FigureChoice
) -> None:
    """Refuse a metric or a filter that no task of both models has."""
    scores = [
        (name, score)
        for model in (before, after)
        for run in model.runs.values()
        for task in names
        for name, score in run[task].scores.items()
    ]
    if typed := choice.unfitting(scores):
        figures = ", ".join(dict.fromkeys(name for name, _ in scores if name)) or "none"
        raise HarnessError(f"{typed}: no task has such a figure; these have {figures}")


def _pair_task(
    before: LoggedModel,
    after: LoggedModel,
    task: str,
    seeds: Sequence[tuple[int | None, int | None]],
    choice: FigureChoice,
    *,
    other_prompts: bool,
) -> _TaskPair:
    """Pair one task of both models, run by run, or say why they cannot be compared."""
    runs = [(before.runs[old][task], after.runs[new][task]) for old, new in seeds]
    figures = _common_figures(runs[0], choice)
    difference = next(
        filter(None, (_item_difference(*run, other_prompts=other_prompts) for run in runs)), None
    )
    if difference is None and not figures:
        difference = _no_common_figure(*runs[0])
    if difference is None:
        difference = next(
            filter(None, (_figure_difference(*run, figures[0]) for run in runs)), None
        )
    if difference is not None:
        return _TaskPair([], "", (), difference)
    pairs = [
        _frozen_pair(old, new, figures[0], after.name, position)
        for position, (old, new) in enumerate(runs)
    ]
    items = runs[0][1].items or runs[0][0].items
    numbers = tuple(item.number for item in items) or tuple(range(pairs[0].current.n))
    return _TaskPair(pairs, figures[0], numbers, None, _note_on_figures(task, figures))


def _common_figures(run: tuple[LoggedTask, LoggedTask], choice: FigureChoice) -> list[str]:
    """Return the names of the figures that both logs have, those of the choice first."""
    before, after = run
    common = [name for name in before.scores if name in after.scores]
    return sorted(common, key=lambda name: -choice.fit(name, before.scores[name]))


def _note_on_figures(task: str, figures: Sequence[str]) -> str:
    if len(figures) < 2:
        return ""
    first, *others = figures
    return (
        f"{task}: compared by {first} (both logs also have {', '.join(others)}: --metric, --filter)"
    )


def _no_common_figure(before: LoggedTask, after: LoggedTask) -> Difference:
    return Difference(
        "metric",
        f"no figure stands in both: {', '.join(before.scores) or 'none'} in the first log, "
        f"{', '.join(after.scores) or 'none'} in the second",
    )


def _item_difference(
    before: LoggedTask, after: LoggedTask, *, other_prompts: bool
) -> Difference | None:
    """Return how the items of two logs differ, None where they are the same."""
    if not before.items or not after.items:
        return _digest_difference(before, after)
    documents = [
        {item.number: (item.document, item.target) for item in log.items} for log in (before, after)
    ]
    shared = sum(documents[1].get(number) == item for number, item in documents[0].items())
    counts = [len(log.items) for log in (before, after)]
    if shared < max(counts):
        return Difference(
            "items",
            f"other items: {max(counts) - shared:,} of {max(counts):,} differ by document or target"
            f" ({counts[0]:,} in the first log, {counts[1]:,} in the second, {shared:,} the same)",
        )
    prompts = {item.number: item.prompt for item in before.items}
    differing = sum(prompts[item.number] != item.prompt for item in after.items)
    if differing and not other_prompts:
        return Difference(
            "prompts",
            f"the same documents in other prompts: {differing:,} of {counts[0]:,} (other shots, or "
            "another template); --other-prompts compares them",
        )
    return None


def _digest_difference(before: LoggedTask, after: LoggedTask) -> Difference | None:
    """Compare items of which one side has no more than the digest that a record keeps."""
    digests = [_items_digest(log) for log in (before, after)]
    if digests[0] == digests[1]:
        return None
    return Difference(
        "items",
        "other items, prompts or targets (a record was kept without its items, so that only their "
        "digests can be compared)",
    )


def _items_digest(log: LoggedTask) -> str:
    """Return the digest that a record has of its items, of a log that has the items themselves."""
    stored = next(iter(log.scores.values())).items_digest
    return stored or digest_of(
        [(item.number, item.document, item.prompt, item.target) for item in log.items]
    )


def _figure_difference(before: LoggedTask, after: LoggedTask, name: str) -> Difference | None:
    """Return why a figure of two logs cannot be compared, None where it can."""
    old, new = before.scores[name], after.scores[name]
    if reason := old.unpaired or new.unpaired:
        return Difference("metric", f"{name or 'the figure'} cannot be compared: {reason}")
    if old.metric and new.metric and old.metric != new.metric:
        return Difference("metric", f"{old.metric} in the first log, {new.metric} in the second")
    kinds = [(score.kind == "perplexity", score.lower_is_better) for score in (old, new)]
    if kinds[0] != kinds[1] or old.form != new.form:
        return Difference("metric", f"{name} is another kind of figure in each log")
    if old.parts != new.parts:
        return Difference("weights", "items count with other weights in each log")
    return None


def _frozen_pair(
    before: LoggedTask, after: LoggedTask, figure: str, label: str, position: int
) -> FrozenPair:
    """Return both scores of one training as the frozen layer takes them."""
    old, new = (_score_alike(log.scores[figure], log.task) for log in (before, after))
    row = FrozenRow(
        label=label,
        seed=position,
        key="",
        student_digest=None,
        weight_bytes=None,
        conditions={},
        machine={},
        scores=(),
    )
    limited = after.limited if after.limited is not None else before.limited is not False
    return FrozenPair(row, freeze_score(old), _record(label, position, limited=limited), new)


def _score_alike(score: TaskScore, task: str) -> TaskScore:
    """Return a score as any writer would have it, its answers known by what they were worth too.

    How many answers were readable, or how long they are, belongs to a model and forbids nothing.
    """
    worth = [score.numbers, score.totals, score.statistics]
    return score.model_copy(
        update={
            "task": task,
            "version": "",
            "kind": "perplexity" if score.kind == "perplexity" else "generate",
            "answers_digest": digest_of(score.answers_digest, worth),
            "likelihoods_digest": "",
            "invalid_share": 0.0,
            "truncated_share": None,
            "tokens_per_answer": None,
        }
    )


def _record(label: str, position: int, *, limited: bool) -> RunRecord:
    """Return the record of a model of which nothing is known but its items."""
    model = ModelReference(name=label, digest="")
    return RunRecord(
        key="",
        status="success",
        label=label,
        method=label,
        family="",
        is_control=False,
        conditions=Conditions(
            suites=(),
            teachers=(),
            tasks=(),
            device="",
            dtype="",
            limited=limited,
            student_recipe="",
            student_base=model,
            budget_tokens=0,
            budget_rows=0,
        ),
        seed=position,
        path="",
    )


def _with_interval(finding: Finding, compared: Mapping[str, _TaskPair]) -> Finding:
    """Return a finding on a task with the difference of both figures and its interval.

    The items that changed are named beside the findings, by their own numbers.
    """
    finding = replace(finding, items=())
    pair = compared.get(finding.task)
    if pair is None or pair.seeds[0].current.kind == "perplexity":
        return finding
    interval = _difference_of(pair.seeds)
    if interval.value is None:
        return finding
    is_share = pair.seeds[0].current.unit == "share"
    quantity = columns.DIFFERENCE if is_share else columns.DIFFERENCE_OF_NUMBERS
    text = f"difference {quantity.with_interval(interval)}{' points' if is_share else ''}"
    numbers = {
        "difference": interval.value,
        "difference_low": interval.low,
        "difference_high": interval.high,
    }
    return replace(finding, told=f"{finding.told}; {text}", numbers={**finding.numbers, **numbers})


def _difference_of(seeds: Sequence[FrozenPair]) -> Interval:
    """Return the second figure less the first, with the interval that the tables have."""
    if are_hits(seeds) and len(seeds) == 1:
        runs = outcomes_by_run(seeds)
        return stats.difference_interval(stats.count_pairs(runs.after[0], runs.before[0]))
    values, score = item_values_by_run(seeds), seeds[0].current
    interval: Interval = tests_of(score).difference_interval(
        values.after, values.before, score.parts
    )
    return interval


def _changed_items(task: str, pair: _TaskPair) -> ChangedItems:
    """Return the items that got worse and those that got better, over all trainings together.

    Documents all change a little, and a figure of all items together has no single ones.
    """
    score = pair.seeds[0].current
    if score.kind == "perplexity" or score.form:
        return ChangedItems(task, pair.figure, (), ())
    sign = -1 if score.lower_is_better else 1
    changes = [0.0] * score.n
    for seed in pair.seeds:
        numbers = zip(seed.frozen.numbers, seed.current.numbers, strict=True)
        for position, (old, new) in enumerate(numbers):
            changes[position] += sign * (new - old)
    return ChangedItems(
        task,
        pair.figure,
        tuple(pair.numbers[position] for position, change in enumerate(changes) if change < 0),
        tuple(pair.numbers[position] for position, change in enumerate(changes) if change > 0),
    )


_MAX_LISTED = 20  # items a line


def changed_text(comparison: Comparison) -> str:
    """Return the items that changed for a terminal, task by task, both ways; "" without any."""
    lines = []
    for items in comparison.changed:
        for word, numbers in (("lost", items.lost), ("won", items.won)):
            if numbers:
                listed = ", ".join(map(str, numbers[:_MAX_LISTED]))
                more = f" and {len(numbers) - _MAX_LISTED} more" if numbers[_MAX_LISTED:] else ""
                lines.append(clean(f"{word} on {items.task} ({items.figure}): {listed}{more}"))
    return "\n".join(lines)
