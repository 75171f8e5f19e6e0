"""Which records may stand in one table, and how two of its rows are compared. No torch.

Rows of one table share teacher, student shape, budget, device, dtype, scoring path, machine, GPU
with driver and CUDA, and task versions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar

from harness.files.digests import digest_of
from harness.records.conditions import shared_conditions
from harness.records.record import TEACHER, RunRecord, TaskScore, row_kinds
from harness.statistics import corpus, means, stats
from harness.statistics.figures import BITS_PER_BYTE as BITS_PER_BYTE
from harness.statistics.intervals import Interval, RetentionTest, one_sided_p, two_sided_p
from harness.statistics.pooled import Corpus

ALPHA = 0.05  # of a verdict in a table
_Run = TypeVar("_Run")
# of one run: a number an item, or what each adds to a figure of all of them
ItemValues = tuple[float, ...] | Corpus


@dataclass(frozen=True)
class ResultRow:
    """All records of one label: the seeds of one row."""

    label: str
    records: tuple[RunRecord, ...]

    @cached_property
    def succeeded(self) -> tuple[RunRecord, ...]:
        """The records that succeeded."""
        return tuple(record for record in self.records if record.status == "success")

    @property
    def first(self) -> RunRecord:
        """Any record of the row, for what all of them share."""
        return self.records[0]

    @cached_property
    def trainings(self) -> tuple[RunRecord, ...]:
        """The records that succeeded, one a student: seeds that gave the same student, and the same
        answers, are one training.
        """
        return tuple({_student_of(record): record for record in reversed(self.succeeded)}.values())[
            ::-1
        ]

    @property
    def trained_once(self) -> bool:
        """Tell whether a draw was made (a training, a random control) and made only once: then
        nothing is known of its spread.
        """
        return (
            bool(self.succeeded) and self.succeeded[0].seed is not None and len(self.trainings) < 2
        )

    def scores(self, task: str) -> list[TaskScore]:
        """The row's scores on a task, one a seed."""
        return [score for record in self.succeeded if (score := record.score(task)) is not None]

    def outcomes_by_seed(self, task: str) -> dict[int | None, str]:
        """Per-item outcomes by seed, one a training, where every item is hit or miss."""
        scores = [
            (record.seed, score)
            for record in self.trainings
            if (score := record.score(task)) is not None
        ]
        return {seed: score.outcomes[score.primary] for seed, score in scores if score.hit_or_miss}

    def outcomes(self, task: str) -> list[str]:
        """Per-item outcomes of the primary extractor, one string a seed; none where items are no
        hits or misses.
        """
        return list(self.outcomes_by_seed(task).values())

    def values_by_seed(self, task: str) -> dict[int | None, ItemValues]:
        """Per-item values by seed, one a training: 1 and 0 of hits and misses, numbers, or what
        items add to a figure of all.
        """
        scores = [
            (record.seed, score)
            for record in self.trainings
            if (score := record.score(task)) is not None
        ]
        return {seed: values for seed, score in scores if (values := values_of(score))}


class _ScoredItems(Protocol):
    """A score of a record or of a baseline."""

    @property
    def form(self) -> str: ...
    @property
    def statistics(self) -> tuple[str, ...]: ...
    @property
    def numbers(self) -> tuple[float, ...]: ...


def values_of(score: _ScoredItems) -> ItemValues:
    """Return what a score's items carry; empty where they carry nothing."""
    return Corpus(score.form, score.statistics) if score.form else score.numbers


def tests_of(score: TaskScore) -> ModuleType:
    """Return the functions that compare such values: `statistics/corpus.py` or
    `statistics/means.py`, which share names and arguments.
    """
    return corpus if score.form else means


def _student_of(record: RunRecord) -> tuple[object, ...]:
    """Return what tells one training's student from another's."""
    answers = tuple((score.task, score.answers_digest, score.value) for score in record.scores)
    return (record.student.digest if record.student else record.key, *answers)


@dataclass(frozen=True)
class Group:
    """Records that may stand in one table, and what they share."""

    shared: Mapping[str, str]
    rows: tuple[ResultRow, ...]
    tasks: tuple[str, ...]
    superseded: int

    @property
    def teacher(self) -> ResultRow | None:
        """The teacher's row, when it succeeded."""
        return next((row for row in self.rows if row.label == TEACHER and row.succeeded), None)


def _scoring_conditions(record: RunRecord) -> dict[str, str]:
    """What every row of a table shares, known for failed records too."""
    return shared_conditions(record.conditions)


def _measuring_conditions(record: RunRecord) -> dict[str, str]:
    """What rows that succeeded share beside that."""
    environment = (
        shared_conditions(record.environment)
        if record.environment
        else {"threads": "", "machine": ""}
    )
    return {
        "path": record.path,
        "items": digest_of([score.items_digest for score in record.scores]),
        **environment,
    }


def _training_conditions(record: RunRecord) -> dict[str, str]:
    """What rows of one table share in how their students were made; teachers' rows have
    none of it.
    """
    return shared_conditions(record.conditions, row_kinds(record))


def _fits(record: RunRecord, made: Mapping[str, str]) -> bool:
    """Tell whether a record may stand in a table of students made so: it names nothing else than
    they do.
    """
    return all(made.get(name) == value for name, value in _training_conditions(record).items())


def group_records(records: Iterable[RunRecord]) -> list[Group]:
    """Split records into tables. The teacher and untrained rows join every table that they fit;
    failed ones too.
    """
    every = list(records)
    groups: list[Group] = []
    for scored in _distinct(_scoring_conditions(record) for record in every):
        here = [record for record in every if _scoring_conditions(record) == scored]
        worked = [record for record in here if record.status == "success"]
        failed = [record for record in here if record.status != "success"]
        for measured in _distinct(_measuring_conditions(record) for record in worked) or [{}]:
            alike = [record for record in worked if _measuring_conditions(record) == measured]
            members = [*alike, *failed]
            made = _distinct(_training_conditions(record) for record in members if record.trains)
            made = (
                made
                or _distinct(
                    _training_conditions(record) for record in members if record.method != TEACHER
                )
                or [{}]
            )
            groups += [
                _build_group([r for r in members if _fits(r, one)], {**scored, **measured, **one})
                for one in made
            ]
    return sorted(groups, key=lambda one: sorted(one.shared.items()))


def _distinct(conditions: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return list({digest_of(one): one for one in conditions}.values())


def _build_group(records: Sequence[RunRecord], shared: Mapping[str, str]) -> Group:
    """Keep the newest record of each row and seed; one that succeeded before one that did not."""
    newest: dict[tuple[str, int | None], RunRecord] = {}
    for record in sorted(records, key=lambda r: (r.status == "success", r.created, r.key)):
        newest[record.label, record.seed] = record
    labels = dict.fromkeys(
        label for label, _ in sorted(newest, key=lambda pair: (pair[0], pair[1] or 0))
    )
    rows = tuple(
        ResultRow(
            label,
            tuple(
                record
                for (name, _), record in sorted(newest.items(), key=_label_and_seed)
                if name == label
            ),
        )
        for label in labels
    )
    sample = next((record for record in newest.values() if record.status == "success"), None)
    tasks = tuple(score.task for score in sample.scores) if sample else ()
    return Group(shared, rows, tasks, len(records) - len(newest))


def _label_and_seed(pair: tuple[tuple[str, int | None], RunRecord]) -> tuple[str, int]:
    return pair[0][0], pair[0][1] or 0


def row_block(row: ResultRow) -> str:
    """Return the block of a table that a row stands in: teacher, its family, or control."""
    return (
        TEACHER
        if row.first.method == TEACHER
        else "control"
        if row.first.is_control
        else row.first.family
    )


def ordered_rows(group: Group) -> list[ResultRow]:
    """Teachers, then families of methods with the best row's family first, then controls; within
    each by mean score, best first.
    """

    def score(row: ResultRow) -> float:
        values = [
            -score.value if score.lower_is_better else score.value
            for task in group.tasks
            for score in row.scores(task)
        ]
        return -fmean(values) if values else float("inf")

    best: dict[str, float] = {}
    for row in group.rows:
        best[row_block(row)] = min(score(row), best.get(row_block(row), float("inf")))
    ends = {TEACHER: 0, "control": 2}

    def place(row: ResultRow) -> tuple[int, float, str, bool, float, str]:
        block = row_block(row)
        return ends.get(block, 1), best[block], block, row.label != TEACHER, score(row), row.label

    return sorted(group.rows, key=place)


def compare(
    student: ResultRow, reference: ResultRow, task: str, *, ratio: bool, chance: float = 0.0
) -> Interval:
    """Compare two rows on a task, on the same items: score intervals of one run against one,
    Student's t over runs and items otherwise.
    """
    ours, theirs = student.scores(task), reference.scores(task)
    if why := next((score.unpaired for score in [*ours, *theirs] if score.unpaired), ""):
        return Interval(None, reason=why)
    if student is reference and ours and not (ratio and (chance or ours[0].signed)):
        # itself, by definition
        return Interval(1.0, 1.0, 1.0) if ratio else Interval(0.0, 0.0, 0.0)
    if not ours or not theirs:
        return Interval(None, reason="not scored")
    if len({score.items_digest for score in [*ours, *theirs]}) > 1:
        return Interval(None, reason="scored on different items")
    runs = paired_values(student, reference, task)
    if not runs.left or not runs.right:
        return Interval(None, reason="no outcomes")
    if runs.single and all(score.hit_or_miss for score in [*ours, *theirs]):
        counts = stats.count_pairs(
            *(next(iter(row.outcomes_by_seed(task).values())) for row in (student, reference))
        )
        found = stats.difference_interval(counts) if not ratio else stats.retention_interval(counts)
        found = stats.above_chance_interval(counts, chance) if ratio and chance else found
    elif ratio and ours[0].signed:
        return Interval(
            None,
            reason=f"{ours[0].metric} may be below zero, and a ratio of two says nothing; see the "
            "difference",
        )
    elif ratio:
        found = tests_of(ours[0]).ratio_interval(
            runs.left, runs.right, ours[0].parts, chance=chance, paired=runs.together
        )
    else:
        found = tests_of(ours[0]).difference_interval(
            runs.left, runs.right, ours[0].parts, paired=runs.together
        )
    if student is reference and found.value is not None:
        return Interval(1.0, 1.0, 1.0)
    # no share is negative
    nothing_below = (
        ratio and not chance and all(score.unit == "share" for score in [*ours, *theirs])
    )
    return (
        replace(found, low=max(0.0, found.low))
        if nothing_below and found.low is not None
        else found
    )


class PairedRuns(NamedTuple):
    """What is compared with what: the numbers of both rows' items, run by run."""

    left: list[ItemValues]
    right: list[ItemValues]
    together: bool  # runs of one position are one training: one row was made from the other

    @property
    def single(self) -> bool:
        """Tell whether one run stands against one."""
        return len(self.left) == len(self.right) == 1


def paired_outcomes(
    student: ResultRow, reference: ResultRow, task: str
) -> tuple[list[str], list[str]]:
    """Return both rows' outcomes, run by run."""
    left, right, _ = _paired_runs(
        student, student.outcomes_by_seed(task), reference, reference.outcomes_by_seed(task)
    )
    return left, right


def paired_values(student: ResultRow, reference: ResultRow, task: str) -> PairedRuns:
    """Return the numbers of both rows' items, run by run."""
    return PairedRuns(
        *_paired_runs(
            student, student.values_by_seed(task), reference, reference.values_by_seed(task)
        )
    )


def _paired_runs(
    student: ResultRow,
    left: Mapping[int | None, _Run],
    reference: ResultRow,
    right: Mapping[int | None, _Run],
) -> tuple[list[_Run], list[_Run], bool]:
    """Return all runs of both rows; of rows of which one was made from the other's students those
    of the seeds that they share.

    Equal seeds alone make no pairs: two methods draw their trainings each for itself.
    """
    shared = sorted(set(left) & set(right), key=str)
    if len(shared) > 1 and _is_further_stage(student.label, reference.label):
        return [left[seed] for seed in shared], [right[seed] for seed in shared], True
    return list(left.values()), list(right.values()), False


def _is_further_stage(one: str, other: str) -> bool:
    """Tell whether one row's students are the other's with a further stage."""
    return one.startswith(f"{other}+") or other.startswith(f"{one}+")


def retention_test(
    row: ResultRow,
    reference: ResultRow,
    task: str,
    margin: float,
    *,
    points: bool = False,
    chance: float = 0.0,
) -> RetentionTest:
    """Test whether a row keeps `margin` of what a reference has above `chance` (or, `points`, all
    but `margin`) on the same items.

    Returns the one-sided (p of "it does not", p of "it does"): the same test for tables and gate.
    Of figures that are better when lower, at most 1 / `margin` of the reference's.
    """
    score = row.scores(task)[0]
    if score.kind == "perplexity":
        return stats.ratio_test(figure_ratio(row, reference, task), 1 / margin)
    runs = paired_values(row, reference, task)
    if runs.single and all(one.hit_or_miss for one in [*row.scores(task), *reference.scores(task)]):
        return stats.retention_test(
            *paired_outcomes(row, reference, task), margin, points=points, chance=chance
        )
    p: RetentionTest = tests_of(score).retention_test(
        runs.left,
        runs.right,
        margin,
        score.parts,
        points=points,
        lower=score.lower_is_better,
        chance=chance,
        paired=runs.together,
    )
    return p


def difference_p_value(row: ResultRow, other: ResultRow, task: str) -> float | None:
    """Return the two-sided p of "both rows score alike" on the same items; None where they cannot
    be compared.
    """
    scores = [*row.scores(task), *other.scores(task)]
    if (
        not row.scores(task)
        or not other.scores(task)
        or len({score.items_digest for score in scores}) > 1
    ):
        return None
    if any(score.unpaired for score in scores):
        return None
    if scores[0].kind == "perplexity":
        ratio = figure_ratio(row, other, task)
        return (
            two_sided_p(math.log(ratio.value), ratio.sources)
            if ratio.value and ratio.sources and ratio.value < math.inf
            else None
        )
    runs = paired_values(row, other, task)
    if runs.single and all(score.hit_or_miss for score in scores):
        left, right = paired_outcomes(row, other, task)
        return stats.equality_test(left, right)
    if not runs.left or not runs.right:
        return None
    p: float = tests_of(scores[0]).equality_test(
        runs.left, runs.right, scores[0].parts, paired=runs.together
    )
    return p


def lower_is_better(row: ResultRow, task: str) -> bool:
    """Tell whether smaller figures of a task are the better ones."""
    return any(score.lower_is_better for score in row.scores(task))


def figure_ratio(row: ResultRow, reference: ResultRow, task: str) -> Interval:
    """Return a row's figure over a reference's where lower is better: below 1 is better."""
    scores = [*row.scores(task), *reference.scores(task)]
    if why := next((score.unpaired for score in scores if score.unpaired), ""):
        return Interval(None, reason=why)
    if scores[0].kind != "perplexity":
        return compare(row, reference, task, ratio=True)
    ours, theirs = (
        [score.totals for score in _training_scores(one, task)] for one in (row, reference)
    )
    return ratio_of_documents(ours, theirs, scores[0])


def _training_scores(row: ResultRow, task: str) -> list[TaskScore]:
    return [score for record in row.trainings if (score := record.score(task)) is not None]


def ratio_of_documents(
    ours: Sequence[means.Documents], theirs: Sequence[means.Documents], score: TaskScore
) -> Interval:
    """Return a perplexity over another's on the same documents, run by run; of bits per byte the
    ratio of the bits.
    """
    return means.perplexity_ratio_interval(ours, theirs, bits=score.metric == BITS_PER_BYTE)


def conditions_of(record: RunRecord) -> dict[str, str]:
    """Return everything that rows of one table share, of one record that succeeded."""
    return {**_scoring_conditions(record), **_measuring_conditions(record)}


def teacher_at_chance(group: Group, task: str) -> bool:
    """Tell whether a task with right answers was scored and its teacher is at chance there: no
    retention means anything.
    """
    scores = group.teacher.scores(task) if group.teacher else []
    return bool(scores) and scores[0].retains and not retention_is_meaningful(group, task)


def retention_is_meaningful(group: Group, task: str) -> bool:
    """Tell whether a retention on a task says anything: the teacher's lower 95 % end lies above
    chance (and above 5 %).
    """
    scores = [
        score for score in (group.teacher.scores(task) if group.teacher else ()) if score.retains
    ]
    return any(
        score.value - 1.96 * _standard_error(score)
        > (max(score.chance, 0.05) if score.unit == "share" else 0)
        for score in scores
    )


def _standard_error(score: TaskScore) -> float:
    """Return a figure's standard error, of hits and misses from the items themselves."""
    return (
        math.sqrt(score.value * (1 - score.value) / score.n)
        if score.hit_or_miss
        else score.stderr or 0.0
    )


def best_labels(group: Group, task: str) -> frozenset[str]:
    """Return the labels of the best row that is no control, and of all that are not significantly
    worse on the same items.

    One-sided tests against the best row (exact McNemar of one run each, else Student's t), Holm's
    adjustment over the rows, alpha .05. Nothing is best where there is no choice (fewer than two
    rows), no difference that counts (a teacher at chance), or where a row was trained once: of its
    method nothing is known.
    """
    rows = [
        row for row in group.rows if row_block(row) not in (TEACHER, "control") and row.scores(task)
    ]
    unknown = teacher_at_chance(group, task) or any(
        row.trained_once or score.unpaired for row in rows for score in row.scores(task)
    )
    if len(rows) < 2 or unknown:
        return frozenset()
    sign = -1 if lower_is_better(rows[0], task) else 1
    best = max(
        rows, key=lambda row: (sign * fmean(score.value for score in row.scores(task)), row.label)
    )
    digest = best.scores(task)[0].items_digest
    others = [
        row
        for row in rows
        if row is not best and all(score.items_digest == digest for score in row.scores(task))
    ]
    adjusted = stats.holm([_worse_p_value(row, best, task) for row in others])
    return frozenset(
        [best.label, *(row.label for row, p in zip(others, adjusted, strict=True) if p > ALPHA)]
    )


def _worse_p_value(row: ResultRow, best: ResultRow, task: str) -> float:
    """Return the one-sided p of "the row is no worse than the best one"."""
    scores = [*row.scores(task), *best.scores(task)]
    if scores[0].kind == "perplexity":
        ratio = figure_ratio(row, best, task)
        return (
            one_sided_p(math.log(ratio.value), ratio.sources)
            if ratio.value and ratio.sources and ratio.value < math.inf
            else 1.0
        )
    runs = paired_values(row, best, task)
    if runs.single and all(score.hit_or_miss for score in scores):
        return stats.inferiority_test(*paired_outcomes(row, best, task))
    p: float = tests_of(scores[0]).inferiority_test(
        runs.left,
        runs.right,
        scores[0].parts,
        lower=scores[0].lower_is_better,
        paired=runs.together,
    )
    return p
