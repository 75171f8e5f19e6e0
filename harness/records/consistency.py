"""What a record or a baseline says twice must agree: named checks that their classes run while a
file is read. No torch.

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
                if wrong := check(self):
                    raise PydanticCustomError(_KIND, "{told}", {"told": f"{field}: {wrong}"})
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
    """Tell whether a file has the right form and contradicts itself: no newer version reads it
    either.
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
    """What the score of a record and that of a baseline have in common: a figure and the items that
    it is made from.
    """

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
    """Return the figure that items make: the (weighted) mean of their numbers, a perplexity or bits
    per byte; None without items.
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
    """Say where a figure is not the one that its items make."""
    try:
        together = (
            pooled.corpus_figure(pooled.Corpus(score.form, score.statistics), score.parts)
            if score.form
            else None
        )
    except (KeyError, ValueError, IndexError) as problem:
        return f"its items' statistics make no {score.form} ({problem})"
    made = (
        together
        if score.form
        else figure_of_items(score.kind, score.metric, score.numbers, score.totals, score.parts)
    )
    if made is None:
        return (
            ""
            if score.unpaired
            else f"{score.value:.6g}, and no item of {score.primary or score.kind} says so"
        )
    if math.isclose(score.value, made, rel_tol=_REL_TOLERANCE, abs_tol=1e-12):
        return ""
    return f"{score.value:.6g}, and its {score.n:,} items make {made:.6g}"


def n_is_its_items(score: ScoredItems) -> str:
    """Say where a number of items is not that of the numbers or documents that are there."""
    if score.n < 1:
        return f"{score.n}; a score has an item"
    counts = {
        "documents": len(score.totals),
        "items": len(score.numbers),
        "statistics of items": len(score.statistics),
    }
    return next(
        (
            f"{score.n:,}, and there are {count:,} {what}"
            for what, count in counts.items()
            if count not in (0, score.n)
        ),
        "",
    )


def parts_are_whole(score: ScoredItems) -> str:
    """Say where the parts of a group are not all its items, or their weights not 1 together."""
    if not score.parts:
        return ""
    items, weight = (
        sum(count for count, _ in score.parts),
        math.fsum(count * weight for count, weight in score.parts),
    )
    if items != score.n or min(count for count, _ in score.parts) < 1:
        return f"{items:,} items in parts of {score.n:,}"
    return (
        ""
        if math.isclose(weight, 1, rel_tol=1e-6)
        else f"weights that make {weight:.6g} together; they make 1"
    )


def documents_have_sizes(score: ScoredItems) -> str:
    """Say where a document has no words, or a likelihood above 1."""
    if score.totals and score.kind != "perplexity":
        return f"documents of a task that is scored by {score.kind}"
    odd = next(
        (
            at
            for at, (total, size) in enumerate(score.totals)
            if not (total <= 1e-6 and 0 < size < math.inf)
        ),
        None,
    )
    return (
        ""
        if odd is None
        else f"document {odd} has a log-likelihood of {score.totals[odd][0]:.6g} for "
        f"{score.totals[odd][1]:g} words"
    )


# In this order: a value is worked out of items that are known to be whole.
FIGURE_CHECKS: Checks = (
    ("n", n_is_its_items),
    ("totals", documents_have_sizes),
    ("parts", parts_are_whole),
    ("value", value_is_its_items),
)


def outcomes_are_marks(score: "TaskScore") -> str:
    """Say where an extractor's outcomes are not one "0" or "1" an item, or an extractor judged
    items twice.
    """
    for name, marks in score.outcomes.items():
        if set(marks) - {"0", "1"}:
            return f"{name} holds {sorted(set(marks) - {'0', '1'})[0]!r}; an outcome is 0 or 1"
        if len(marks) != score.n:
            return f"{name} has {len(marks):,} of {score.n:,} items"
    twice = sorted(set(score.outcomes) & set(score.values))
    return f"{twice[0]} stands among the values too" if twice else ""


def values_are_numbers(score: "TaskScore") -> str:
    """Say where an extractor's values are not one number an item."""
    wrong = next((name for name, values in score.values.items() if len(values) != score.n), None)
    if wrong is not None:
        return f"{wrong} has {len(score.values[wrong]):,} of {score.n:,} items"
    odd = next(
        (
            name
            for name, values in score.values.items()
            if any(math.isnan(value) for value in values)
        ),
        None,
    )
    return f"{odd} holds an item that is no number" if odd is not None else ""


def groups_hold_the_figure(score: "TaskScore") -> str:
    """Say where a figure lies outside those of its groups; of parts that count alike, groups may
    cut across them.
    """
    if any(math.isnan(value) for value in score.groups.values()):
        return "a group's figure is no number"
    if not score.groups or score.parts:
        return ""
    low, high, slack = (
        min(score.groups.values()),
        max(score.groups.values()),
        _REL_TOLERANCE * max(1.0, abs(score.value)),
    )
    return (
        ""
        if low - slack <= score.value <= high + slack
        else f"{low:.6g} to {high:.6g}, and the figure is {score.value:.6g}"
    )


def macro_is_the_groups(score: "TaskScore") -> str:
    """Say where the mean over groups is not the mean of the groups."""
    if score.macro is None:
        return ""
    if not score.groups:
        return f"{score.macro:.6g}, and there are no groups"
    mean = math.fsum(score.groups.values()) / len(score.groups)
    return (
        ""
        if math.isclose(score.macro, mean, rel_tol=_REL_TOLERANCE, abs_tol=1e-12)
        else f"{score.macro:.6g}, and the groups' mean is {mean:.6g}"
    )


def chosen_is_all(score: "TaskScore") -> str:
    """Say where the shares of the positions that were picked are not 1 together."""
    total = math.fsum(score.chosen.values())
    return (
        ""
        if not score.chosen or abs(total - 1) <= 1e-6
        else f"shares of {total:.6g} together; they make 1"
    )


SCORE_CHECKS: Checks = (
    ("outcomes", outcomes_are_marks),
    ("values", values_are_numbers),
    *FIGURE_CHECKS,
    *nonnegative_fields("stderr", "tokens_per_answer", "cut_prompts", "seconds", "from_journal"),
    ("groups", groups_hold_the_figure),
    ("macro", macro_is_the_groups),
    ("chosen", chosen_is_all),
)


def value_is_in_its_interval(one: "Measurement") -> str:
    """Say where a measured value lies outside its own interval."""
    low, high = (
        one.low if one.low is not None else -math.inf,
        one.high if one.high is not None else math.inf,
    )
    slack = _REL_TOLERANCE * abs(one.value)
    return (
        ""
        if low - slack <= one.value <= high + slack
        else f"{one.value:.6g}, outside its interval [{low:.6g}, {high:.6g}]"
    )


MEASUREMENT_CHECKS: Checks = (*nonnegative_fields("value"), ("value", value_is_in_its_interval))


def tasks_are_the_scores(record: "RunRecord") -> str:
    """Say where a record's tasks are not those of its scores: all of them, in order, where it
    succeeded.
    """
    scored = [f"{score.task}@{score.version}" for score in record.scores]
    if record.status == "success" and scored != list(record.conditions.tasks):
        return (
            f"{', '.join(record.conditions.tasks) or 'none'}, and there are scores of "
            f"{', '.join(scored) or 'none'}"
        )
    if double := next((one for one in scored if scored.count(one) > 1), None):
        return f"{double} was scored twice"
    strange = next((one for one in scored if one not in record.conditions.tasks), None)
    return (
        f"{', '.join(record.conditions.tasks) or 'none'}, and there is a score of {strange}"
        if strange
        else ""
    )


def distances_are_of_its_tasks(record: "RunRecord") -> str:
    """Say where a distance to the teacher is of a task that was not scored."""
    strange = next((one.task for one in record.fidelity if record.score(one.task) is None), None)
    return f"a distance on {strange}, which has no score" if strange else ""


def stages_end_in_the_row(record: "RunRecord") -> str:
    """Say where the last stage of a chain is not the row itself, or scored something else."""
    if not record.stages:
        return ""
    last = record.stages[-1]
    if last.label != record.label:
        return f"the last one is {last.label}, and the row {record.label}"
    own = {score.task: score.value for score in record.scores}
    wrong = next(
        (
            task
            for task, value in last.scores.items()
            if not math.isclose(value, own.get(task, math.nan), rel_tol=_REL_TOLERANCE)
        ),
        None,
    )
    return (
        f"the last one scored {last.scores[wrong]:.6g} on {wrong}, and the row did not"
        if wrong is not None
        else ""
    )


RECORD_CHECKS: Checks = (
    ("tasks", tasks_are_the_scores),
    ("fidelity", distances_are_of_its_tasks),
    ("stages", stages_end_in_the_row),
    *nonnegative_fields("seconds"),
)
