"""Checks that what a record or a baseline says twice agrees, run when a file is read. No torch.

A digest shows that a file is the one that was written; it does not show that what was written is
true. Objects that are made in memory are not checked: a finished cell is never lost to a check.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from harness.statistics import pooled
from harness.statistics.figures import BITS_PER_BYTE

if TYPE_CHECKING:
    from harness.records.record import Measurement, RunRecord, TaskScore

# the context in which checks run: `Model.model_validate(data, context=READING)`
READING_CONTEXT = {"reading": True}
WAY_OUT = "; delete it and run again"
_KIND = "contradiction"
_REL_TOLERANCE = 1e-9  # sums of floats in another order

Check = Callable[[Any], str]  # returns what contradicts, "" where nothing does
# each with the field that is wrong where it fails; the first failure is told
Checks = tuple[tuple[str, Check], ...]


class ConsistentModel(BaseModel):
    """A frozen model that is refused where it contradicts itself when a file is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    checks: ClassVar[Checks] = ()

    @model_validator(mode="after")
    def _agrees(self, info: ValidationInfo) -> Self:
        if info.context == READING_CONTEXT:
            for field, check in self.checks:
                if problem := check(self):
                    raise PydanticCustomError(_KIND, "{told}", {"told": f"{field}: {problem}"})
        return self


def first_problem(problem: ValidationError) -> str:
    """Return the first problem of a file in one line: its field, and what is right."""
    first = problem.errors()[0]
    # files have their fields among the others
    place = ".".join(str(part) for part in first["loc"] if part != "conditions")
    if first["type"] == _KIND:
        return f"field {place}{'.' if place else ''}{first['msg']}"
    return f"field {place}: {first['msg']}"


def is_contradiction(problem: ValidationError) -> bool:
    """Tell whether a file has the right form and contradicts itself.

    No newer version reads such a file either.
    """
    return bool(problem.errors()[0]["type"] == _KIND)


def nonnegative_fields(*names: str) -> Checks:
    """Return a check for each of these fields: a finite number that is not negative, or None."""

    def check(name: str) -> Check:
        def wrong(model: Any) -> str:
            value = getattr(model, name)
            return (
                ""
                if value is None or 0 <= value < math.inf
                else f"{value}; it is a number of 0 or more"
            )

        return wrong

    return tuple((name, check(name)) for name in names)


def finite_fields(*names: str) -> Checks:
    """Return a check for each of these fields: a finite number."""

    def check(name: str) -> Check:
        def wrong(model: Any) -> str:
            value = getattr(model, name)
            return "" if math.isfinite(value) else f"{value} is no finite number"

        return wrong

    return tuple((name, check(name)) for name in names)


class ScoredItems(Protocol):
    """What scores of records and of baselines have in common: a figure and the items behind it."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def primary(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def n(self) -> int: ...  # noqa: D102
    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def numbers(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def totals(self) -> tuple[tuple[float, float], ...]: ...  # noqa: D102
    @property
    def parts(self) -> tuple[tuple[int, float], ...]: ...  # noqa: D102
    @property
    def form(self) -> str: ...  # noqa: D102
    @property
    def statistics(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def unpaired(self) -> str: ...  # noqa: D102


def figure_of_items(
    kind: str,
    metric: str,
    numbers: Sequence[float],
    totals: Sequence[tuple[float, float]],
    parts: Sequence[tuple[int, float]],
) -> float | None:
    """Return the figure that items make, None without items.

    It is the (weighted) mean of their numbers, a perplexity, or bits per byte.
    """
    if kind == "perplexity":
        return _figure_of_documents(metric, totals) if totals else None
    if not numbers:
        return None
    if not parts:
        return math.fsum(numbers) / len(numbers)
    weights = [weight for items, weight in parts for _ in range(items)]
    return math.fsum(number * weight for number, weight in zip(numbers, weights, strict=True))


def _figure_of_documents(metric: str, totals: Sequence[tuple[float, float]]) -> float:
    nats = -sum(total for total, _ in totals) / sum(size for _, size in totals)
    return (
        nats / math.log(2)
        if metric == BITS_PER_BYTE
        else math.exp(nats)
        if nats < 700
        else math.inf
    )


def value_is_its_items(score: ScoredItems) -> str:
    """Return what is wrong where a figure is not the one that its items make."""
    if score.form:
        run = pooled.Corpus(score.form, score.statistics)
        try:
            expected: float | None = pooled.corpus_figure(run, score.parts)
        except (KeyError, ValueError, IndexError) as problem:
            return f"its items' statistics make no {score.form} ({problem})"
    else:
        expected = figure_of_items(
            score.kind, score.metric, score.numbers, score.totals, score.parts
        )
    if expected is None:
        source = score.primary or score.kind
        return "" if score.unpaired else f"{score.value:.6g}, and no item of {source} says so"
    if math.isclose(score.value, expected, rel_tol=_REL_TOLERANCE, abs_tol=1e-12):
        return ""
    return f"{score.value:.6g}, and its {score.n:,} items make {expected:.6g}"


def n_is_its_items(score: ScoredItems) -> str:
    """Return what is wrong where a number of items is not that of the numbers or documents."""
    if score.n < 1:
        return f"{score.n}; a score has an item"
    counts = {
        "documents": len(score.totals),
        "items": len(score.numbers),
        "statistics of items": len(score.statistics),
    }
    return next(
        (
            f"{score.n:,}, and there are {count:,} {kind}"
            for kind, count in counts.items()
            if count not in (0, score.n)
        ),
        "",
    )


def parts_are_whole(score: ScoredItems) -> str:
    """Return what is wrong where a group's parts miss items, or do not weigh 1 together."""
    if not score.parts:
        return ""
    counts = [count for count, _ in score.parts]
    if sum(counts) != score.n or min(counts) < 1:
        return f"{sum(counts):,} items in parts of {score.n:,}"
    weight = math.fsum(count * weight for count, weight in score.parts)
    if math.isclose(weight, 1, rel_tol=1e-6):
        return ""
    return f"weights that make {weight:.6g} together; they make 1"


def documents_have_sizes(score: ScoredItems) -> str:
    """Return what is wrong where a document has no words, or a likelihood above 1."""
    if score.totals and score.kind != "perplexity":
        return f"documents of a task that is scored by {score.kind}"
    for position, (total, size) in enumerate(score.totals):
        if not (total <= 1e-6 and 0 < size < math.inf):
            return f"document {position} has a log-likelihood of {total:.6g} for {size:g} words"
    return ""


# In this order: a value is worked out of items that are known to be whole.
FIGURE_CHECKS: Checks = (
    ("n", n_is_its_items),
    ("totals", documents_have_sizes),
    ("parts", parts_are_whole),
    ("value", value_is_its_items),
)


def outcomes_are_marks(score: "TaskScore") -> str:
    """Return what is wrong where an extractor's outcomes are not one "0" or "1" an item.

    An extractor that has values too judged its items twice.
    """
    for name, marks in score.outcomes.items():
        if set(marks) - {"0", "1"}:
            return f"{name} holds {sorted(set(marks) - {'0', '1'})[0]!r}; an outcome is 0 or 1"
        if len(marks) != score.n:
            return f"{name} has {len(marks):,} of {score.n:,} items"
    judged_twice = sorted(set(score.outcomes) & set(score.values))
    return f"{judged_twice[0]} stands among the values too" if judged_twice else ""


def values_are_numbers(score: "TaskScore") -> str:
    """Return what is wrong where an extractor's values are not one number an item."""
    for name, values in score.values.items():
        if len(values) != score.n:
            return f"{name} has {len(values):,} of {score.n:,} items"
    for name, values in score.values.items():
        if any(math.isnan(value) for value in values):
            return f"{name} holds an item that is no number"
    return ""


def groups_hold_the_figure(score: "TaskScore") -> str:
    """Return what is wrong where a figure lies outside those of its groups.

    Of parts that count alike, groups may cut across them.
    """
    figures = score.groups.values()
    if any(math.isnan(figure) for figure in figures):
        return "a group's figure is no number"
    if not figures or score.parts:
        return ""
    low, high, slack = min(figures), max(figures), _REL_TOLERANCE * max(1.0, abs(score.value))
    if low - slack <= score.value <= high + slack:
        return ""
    return f"{low:.6g} to {high:.6g}, and the figure is {score.value:.6g}"


def macro_is_the_groups(score: "TaskScore") -> str:
    """Return what is wrong where the mean over groups is not the mean of the groups."""
    if score.macro is None:
        return ""
    if not score.groups:
        return f"{score.macro:.6g}, and there are no groups"
    mean = math.fsum(score.groups.values()) / len(score.groups)
    if math.isclose(score.macro, mean, rel_tol=_REL_TOLERANCE, abs_tol=1e-12):
        return ""
    return f"{score.macro:.6g}, and the groups' mean is {mean:.6g}"


def chosen_is_all(score: "TaskScore") -> str:
    """Return what is wrong where the shares of the chosen positions are not 1 together."""
    total = math.fsum(score.chosen.values())
    if not score.chosen or abs(total - 1) <= 1e-6:
        return ""
    return f"shares of {total:.6g} together; they make 1"


SCORE_CHECKS: Checks = (
    ("outcomes", outcomes_are_marks),
    ("values", values_are_numbers),
    *FIGURE_CHECKS,
    *nonnegative_fields("stderr", "tokens_per_answer", "cut_prompts", "seconds", "from_journal"),
    ("groups", groups_hold_the_figure),
    ("macro", macro_is_the_groups),
    ("chosen", chosen_is_all),
)


def value_is_in_its_interval(measurement: "Measurement") -> str:
    """Return what is wrong where a measured value lies outside its own interval."""
    value = measurement.value
    low = -math.inf if measurement.low is None else measurement.low
    high = math.inf if measurement.high is None else measurement.high
    slack = _REL_TOLERANCE * abs(value)
    if low - slack <= value <= high + slack:
        return ""
    return f"{value:.6g}, outside its interval [{low:.6g}, {high:.6g}]"


MEASUREMENT_CHECKS: Checks = (*nonnegative_fields("value"), ("value", value_is_in_its_interval))


def tasks_are_the_scores(record: "RunRecord") -> str:
    """Return what is wrong where a record's tasks are not those of its scores.

    Where it succeeded they are all of them, in order.
    """
    scored = [f"{score.task}@{score.version}" for score in record.scores]
    tasks = ", ".join(record.conditions.tasks) or "none"
    if record.status == "success" and scored != list(record.conditions.tasks):
        return f"{tasks}, and there are scores of {', '.join(scored) or 'none'}"
    if duplicate := next((task for task in scored if scored.count(task) > 1), None):
        return f"{duplicate} was scored twice"
    unknown = next((task for task in scored if task not in record.conditions.tasks), None)
    return f"{tasks}, and there is a score of {unknown}" if unknown else ""


def distances_are_of_its_tasks(record: "RunRecord") -> str:
    """Return what is wrong where a distance to the teacher is of a task that was not scored."""
    tasks = [fidelity.task for fidelity in record.fidelity]
    unscored = next((task for task in tasks if record.score(task) is None), None)
    return f"a distance on {unscored}, which has no score" if unscored else ""


def stages_end_in_the_row(record: "RunRecord") -> str:
    """Return what is wrong where the last stage of a chain is not the row, or scored otherwise."""
    if not record.stages:
        return ""
    last = record.stages[-1]
    if last.label != record.label:
        return f"the last one is {last.label}, and the row {record.label}"
    row_scores = {score.task: score.value for score in record.scores}
    for task, value in last.scores.items():
        if not math.isclose(value, row_scores.get(task, math.nan), rel_tol=_REL_TOLERANCE):
            return f"the last one scored {value:.6g} on {task}, and the row did not"
    return ""


RECORD_CHECKS: Checks = (
    ("tasks", tasks_are_the_scores),
    ("fidelity", distances_are_of_its_tasks),
    ("stages", stages_end_in_the_row),
    *nonnegative_fields("seconds"),
)
