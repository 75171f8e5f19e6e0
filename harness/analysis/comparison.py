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
from typing import Generic, NamedTuple, Protocol, TypeVar

from harness.files.digests import digest_of
from harness.records.conditions import shared_conditions
from harness.records.record import CHECKPOINT, TEACHER, RunRecord, TaskScore, row_kinds
from harness.statistics import corpus, means, stats
from harness.statistics.figures import BITS_PER_BYTE as BITS_PER_BYTE
from harness.statistics.intervals import Interval, RetentionTest, one_sided_p, two_sided_p
from harness.statistics.pooled import Corpus

ALPHA = 0.05  # of a verdict in a table
_Run = TypeVar("_Run")
# of one run: a number for each item, or what each item adds to a figure of all of them
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
        """The records that succeeded, one for each student.

        Seeds that gave the same student and the same answers count as one training.
        """
        by_student = {_student_identity(record): record for record in reversed(self.succeeded)}
        return tuple(by_student.values())[::-1]

    @property
    def trained_once(self) -> bool:
        """Tell whether the row depends on a seed and was made with one only.

        Nothing is known then of how much another seed would differ. It holds for a single training
        and for a single draw of a random control.
        """
        has_seed = bool(self.succeeded) and self.succeeded[0].seed is not None
        return has_seed and len(self.trainings) < 2

    def scores(self, task: str) -> list[TaskScore]:
        """The row's scores on a task, one for each seed."""
        return [score for record in self.succeeded if (score := record.score(task)) is not None]

    def training_scores(self, task: str) -> dict[int | None, TaskScore]:
        """The scores on a task by seed, one for each training."""
        scores = {record.seed: record.score(task) for record in self.trainings}
        return {seed: score for seed, score in scores.items() if score is not None}

    def outcomes_by_seed(self, task: str) -> dict[int | None, str]:
        """Item outcomes by seed, one for each training; none where items are no hits or misses."""
        scores = self.training_scores(task).items()
        return {seed: score.outcomes[score.primary] for seed, score in scores if score.hit_or_miss}

    def outcomes(self, task: str) -> list[str]:
        """Item outcomes of the primary extractor, one string of 0 and 1 for each training."""
        return list(self.outcomes_by_seed(task).values())

    def values_by_seed(self, task: str) -> dict[int | None, ItemValues]:
        """Item values by seed, one for each training: 1 and 0 of hits and misses, or numbers."""
        scores = self.training_scores(task).items()
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
    """Return the values of a score's items; empty where the items have none."""
    return Corpus(score.form, score.statistics) if score.form else score.numbers


def tests_of(score: TaskScore) -> ModuleType:
    """Return the module that compares such values: `statistics.corpus` or `statistics.means`.

    Both have functions of the same names and arguments.
    """
    return corpus if score.form else means


def _student_identity(record: RunRecord) -> tuple[object, ...]:
    """Return what distinguishes one training's student from another's."""
    answers = tuple((score.task, score.answers_digest, score.value) for score in record.scores)
    return (record.student.digest if record.student else record.key, *answers)


# --- which records may stand in one table


@dataclass(frozen=True)
class Group:
    """Records that may stand in one table, and what they share."""

    shared: Mapping[str, str]
    rows: tuple[ResultRow, ...]
    tasks: tuple[str, ...]
    superseded: int  # older records of the same rows and seeds, which are left out

    @property
    def teacher(self) -> ResultRow | None:
        """The teacher's row, where it succeeded."""
        return next((row for row in self.rows if row.label == TEACHER and row.succeeded), None)


def _scoring_conditions(record: RunRecord) -> dict[str, str]:
    """Return what every row of a table shares; failed records have it too."""
    return shared_conditions(record.conditions)


def _measuring_conditions(record: RunRecord) -> dict[str, str]:
    """Return what rows that succeeded share in addition."""
    environment = (
        shared_conditions(record.environment)
        if record.environment
        else {"threads": "", "machine": ""}
    )
    items = digest_of([score.items_digest for score in record.scores])
    return {"path": record.path, "items": items, **environment}


def _measured_alike(record: RunRecord, measuring: Mapping[str, str]) -> bool:
    """Tell whether a record may stand among rows that were measured under these conditions.

    A checkpoint from outside may have another scoring path: that of what opens it.
    """
    own_conditions = _measuring_conditions(record)
    if record.method == CHECKPOINT:
        own_conditions["path"] = measuring.get("path", "")
    return own_conditions == measuring


def _training_conditions(record: RunRecord) -> dict[str, str]:
    """Return what rows share in how their students were made; empty for teachers' rows."""
    return shared_conditions(record.conditions, row_kinds(record))


def _fits(record: RunRecord, training_conditions: Mapping[str, str]) -> bool:
    """Tell whether a record may stand in a table of students made under these conditions.

    It may where it names no other value of any condition.
    """
    own_conditions = _training_conditions(record)
    return all(training_conditions.get(name) == value for name, value in own_conditions.items())


def conditions_of(record: RunRecord) -> dict[str, str]:
    """Return everything that the rows of one table share, of one record that succeeded."""
    return {**_scoring_conditions(record), **_measuring_conditions(record)}


def group_records(records: Iterable[RunRecord]) -> list[Group]:
    """Split records into groups that may stand in one table each.

    The teacher and untrained rows join every group that they fit into; so do failed records.
    """
    records = list(records)
    groups: list[Group] = []
    for scoring in _distinct(map(_scoring_conditions, records)):
        scored_alike = [record for record in records if _scoring_conditions(record) == scoring]
        succeeded = [record for record in scored_alike if record.status == "success"]
        failed = [record for record in scored_alike if record.status != "success"]
        made_here = [record for record in succeeded if record.method != CHECKPOINT]
        for measuring in _distinct(map(_measuring_conditions, made_here or succeeded)) or [{}]:
            members = [record for record in succeeded if _measured_alike(record, measuring)]
            members += failed
            for training in _distinct_training_conditions(members):
                fitting = [record for record in members if _fits(record, training)]
                groups.append(_build_group(fitting, {**scoring, **measuring, **training}))
    return sorted(groups, key=lambda group: sorted(group.shared.items()))


def _distinct_training_conditions(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Return the training conditions of trained rows; without any, of the other students.

    Rows that calibrated on data of the user's own stand beside them, those of each data set in a
    table of their own.
    """
    trained = [record for record in records if record.trains]
    students = [record for record in records if row_kinds(record)]
    combined = []
    for training in _distinct(map(_uncalibrated_conditions, trained or students)) or [{}]:
        beside = [
            record
            for record in students
            if _uncalibrated_conditions(record).items() <= training.items()
        ]
        calibrations = _distinct(filter(None, map(_calibration_conditions, beside))) or [{}]
        combined += [{**training, **calibration} for calibration in calibrations]
    return combined


def _calibration_conditions(record: RunRecord) -> dict[str, str]:
    """Return what a row calibrated on; empty where that was no data of the user's own."""
    kinds = [kind for kind in row_kinds(record) if kind == "calibrated rows"]
    return shared_conditions(record.conditions, kinds) if kinds else {}


def _uncalibrated_conditions(record: RunRecord) -> dict[str, str]:
    """Return a row's training conditions but for what it calibrated on."""
    kinds = [kind for kind in row_kinds(record) if kind != "calibrated rows"]
    return shared_conditions(record.conditions, kinds)


def _distinct(conditions: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return list({digest_of(names): names for names in conditions}.values())


def _build_group(records: Sequence[RunRecord], shared: Mapping[str, str]) -> Group:
    """Keep the newest record of each row and seed; a success counts before any failure."""
    newest: dict[tuple[str, int | None], RunRecord] = {}
    for record in sorted(records, key=lambda r: (r.status == "success", r.created, r.key)):
        newest[record.label, record.seed] = record
    by_label: dict[str, list[RunRecord]] = {}
    for record in sorted(newest.values(), key=lambda record: (record.label, record.seed or 0)):
        by_label.setdefault(record.label, []).append(record)
    rows = tuple(ResultRow(label, tuple(seeds)) for label, seeds in by_label.items())
    sample = next((record for record in newest.values() if record.status == "success"), None)
    tasks = tuple(score.task for score in sample.scores) if sample else ()
    return Group(shared, rows, tasks, len(records) - len(newest))


def row_block(row: ResultRow) -> str:
    """Return the block of a table that a row stands in: teacher, control, or its family."""
    if row.first.method == TEACHER:
        return TEACHER
    return "control" if row.first.is_control else row.first.family


def ordered_rows(group: Group) -> list[ResultRow]:
    """Return teachers first, then families of methods, best row's family first, then controls.

    Within each block rows are ordered by mean score, best first.
    """

    def negative_score(row: ResultRow) -> float:
        values = [
            -score.value if score.lower_is_better else score.value
            for task in group.tasks
            for score in row.scores(task)
        ]
        return -fmean(values) if values else float("inf")

    best_of_block: dict[str, float] = {}
    for row in group.rows:
        best = best_of_block.get(row_block(row), float("inf"))
        best_of_block[row_block(row)] = min(negative_score(row), best)
    ends = {TEACHER: 0, "control": 2}

    def place(row: ResultRow) -> tuple[int, float, str, bool, float, str]:
        block, is_student = row_block(row), row.label != TEACHER
        best = best_of_block[block]
        return ends.get(block, 1), best, block, is_student, negative_score(row), row.label

    return sorted(group.rows, key=place)


# --- two rows on the same items


class PairedRuns(NamedTuple, Generic[_Run]):
    """The runs of two rows that are compared with each other."""

    student: list[_Run]
    reference: list[_Run]
    paired: bool  # runs of one position share a seed: one row was made from the other

    @property
    def single(self) -> bool:
        """Tell whether each row has one run."""
        return len(self.student) == len(self.reference) == 1


def paired_outcomes(student: ResultRow, reference: ResultRow, task: str) -> PairedRuns[str]:
    """Return both rows' outcomes, run by run."""
    outcomes = student.outcomes_by_seed(task), reference.outcomes_by_seed(task)
    return _paired_runs(*outcomes, share_seeds=_is_further_stage(student.label, reference.label))


def paired_values(student: ResultRow, reference: ResultRow, task: str) -> PairedRuns[ItemValues]:
    """Return the values of both rows' items, run by run."""
    values = student.values_by_seed(task), reference.values_by_seed(task)
    return _paired_runs(*values, share_seeds=_is_further_stage(student.label, reference.label))


def _paired_runs(
    student: Mapping[int | None, _Run], reference: Mapping[int | None, _Run], *, share_seeds: bool
) -> PairedRuns[_Run]:
    """Return all runs of both rows, or only those of common seeds where they are true pairs.

    Equal seeds alone make no pairs: two methods draw their trainings independently. `share_seeds`
    tells that one row's students were made from the other's.
    """
    seeds = sorted(set(student) & set(reference), key=str)
    if share_seeds and len(seeds) > 1:
        return PairedRuns(
            [student[seed] for seed in seeds], [reference[seed] for seed in seeds], True
        )
    return PairedRuns(list(student.values()), list(reference.values()), False)


def _is_further_stage(label: str, other_label: str) -> bool:
    """Tell whether one row's students are the other's with a further stage."""
    return label.startswith(f"{other_label}+") or other_label.startswith(f"{label}+")


def compare(
    student: ResultRow, reference: ResultRow, task: str, *, ratio: bool, chance: float = 0.0
) -> Interval:
    """Return the difference of two rows on a task, or their ratio (`ratio`), on the same items.

    Hits and misses of one run each have a score interval; a figure that all items make together
    (`form`) has a paired bootstrap; all else Student's t over runs and items. `chance` is taken
    from both sides of a ratio. An interval without a value says why in its `reason`.
    """
    scores, reference_scores = student.scores(task), reference.scores(task)
    both = [*scores, *reference_scores]
    if reason := next((score.unpaired for score in both if score.unpaired), ""):
        return Interval(None, reason=reason)
    if student is reference and scores and not (ratio and (chance or scores[0].signed)):
        # a row against itself: known without a computation
        return Interval(1.0, 1.0, 1.0) if ratio else Interval(0.0, 0.0, 0.0)
    if not scores or not reference_scores:
        return Interval(None, reason="not scored")
    if not _same_items(both):
        return Interval(None, reason="scored on different items")
    runs = paired_values(student, reference, task)
    if not runs.student or not runs.reference:
        return Interval(None, reason="no outcomes")
    if runs.single and all(score.hit_or_miss for score in both):
        interval = _interval_of_outcomes(student, reference, task, ratio=ratio, chance=chance)
    elif ratio and scores[0].signed:
        return Interval(
            None,
            reason=f"{scores[0].metric} may be below zero, and a ratio of two says nothing; see "
            "the difference",
        )
    else:
        interval = _interval_of_values(runs, scores[0], ratio=ratio, chance=chance)
    if student is reference and interval.value is not None:
        return Interval(1.0, 1.0, 1.0)
    # no share is negative, and no ratio of shares
    never_negative = ratio and not chance and all(score.unit == "share" for score in both)
    if never_negative and interval.low is not None:
        return replace(interval, low=max(0.0, interval.low))
    return interval


def _same_items(scores: Sequence[TaskScore]) -> bool:
    return len({score.items_digest for score in scores}) == 1


def _interval_of_outcomes(
    student: ResultRow, reference: ResultRow, task: str, *, ratio: bool, chance: float
) -> Interval:
    """Compare one run with one run, of hits and misses."""
    counts = stats.count_pairs(student.outcomes(task)[0], reference.outcomes(task)[0])
    if not ratio:
        return stats.difference_interval(counts)
    if chance:
        return stats.above_chance_interval(counts, chance)
    return stats.retention_interval(counts)


def _interval_of_values(
    runs: PairedRuns[ItemValues], score: TaskScore, *, ratio: bool, chance: float
) -> Interval:
    """Compare several runs, items that carry numbers, or figures that all items make together."""
    tests, values = tests_of(score), (runs.student, runs.reference, score.parts)
    interval: Interval = (
        tests.ratio_interval(*values, chance=chance, paired=runs.paired)
        if ratio
        else tests.difference_interval(*values, paired=runs.paired)
    )
    return interval


def retention_test(
    row: ResultRow,
    reference: ResultRow,
    task: str,
    margin: float,
    *,
    points: bool = False,
    chance: float = 0.0,
) -> RetentionTest:
    """Test whether a row keeps the share `margin` of a reference's score, on the same items.

    The share is of what the reference has above `chance`. With `points` the row must keep all but
    `margin`. A figure that is better when lower may be at most 1 / `margin` of the reference's.
    Tables and gate use this one test; it returns both one-sided p values.
    """
    score = row.scores(task)[0]
    if score.kind == "perplexity":
        return stats.ratio_test(figure_ratio(row, reference, task), 1 / margin)
    runs, both = paired_values(row, reference, task), [*row.scores(task), *reference.scores(task)]
    if runs.single and all(score.hit_or_miss for score in both):
        outcomes = paired_outcomes(row, reference, task)
        return stats.retention_test(
            outcomes.student, outcomes.reference, margin, points=points, chance=chance
        )
    test: RetentionTest = tests_of(score).retention_test(
        runs.student,
        runs.reference,
        margin,
        score.parts,
        points=points,
        lower=score.lower_is_better,
        chance=chance,
        paired=runs.paired,
    )
    return test


def equality_test(row: ResultRow, reference: ResultRow, task: str) -> float | None:
    """Return the two-sided p value of "both rows score the same", on the same items.

    None where they cannot be compared.
    """
    scores, both = row.scores(task), [*row.scores(task), *reference.scores(task)]
    if not scores or not reference.scores(task) or not _same_items(both):
        return None
    if any(score.unpaired for score in both):
        return None
    if scores[0].kind == "perplexity":
        ratio = figure_ratio(row, reference, task)
        if not ratio.value or not ratio.sources or ratio.value == math.inf:
            return None
        return two_sided_p(math.log(ratio.value), ratio.sources)
    runs = paired_values(row, reference, task)
    if runs.single and all(score.hit_or_miss for score in both):
        outcomes = paired_outcomes(row, reference, task)
        return stats.equality_test(outcomes.student, outcomes.reference)
    if not runs.student or not runs.reference:
        return None
    p: float = tests_of(scores[0]).equality_test(
        runs.student, runs.reference, scores[0].parts, paired=runs.paired
    )
    return p


def lower_is_better(row: ResultRow, task: str) -> bool:
    """Tell whether smaller figures of a task are the better ones."""
    return any(score.lower_is_better for score in row.scores(task))


def figure_ratio(row: ResultRow, reference: ResultRow, task: str) -> Interval:
    """Return a row's figure over a reference's, of figures that are better when lower.

    A ratio below 1 is better.
    """
    both = [*row.scores(task), *reference.scores(task)]
    if reason := next((score.unpaired for score in both if score.unpaired), ""):
        return Interval(None, reason=reason)
    if both[0].kind != "perplexity":
        return compare(row, reference, task, ratio=True)
    totals = [score.totals for score in row.training_scores(task).values()]
    reference_totals = [score.totals for score in reference.training_scores(task).values()]
    return ratio_of_documents(totals, reference_totals, both[0])


def ratio_of_documents(
    student: Sequence[means.Documents], reference: Sequence[means.Documents], score: TaskScore
) -> Interval:
    """Return the ratio of two perplexities on the same documents, run by run.

    Of bits per byte it is the ratio of the bits.
    """
    bits = score.metric == BITS_PER_BYTE
    return means.perplexity_ratio_interval(student, reference, bits=bits)


# --- what a retention means, and which rows are the best


def teacher_at_chance(group: Group, task: str) -> bool:
    """Tell whether the teacher is at chance on a task with right answers.

    Then no retention means anything. False where the teacher was not scored.
    """
    scores = group.teacher.scores(task) if group.teacher else []
    return bool(scores) and scores[0].retains and not retention_is_meaningful(group, task)


def retention_is_meaningful(group: Group, task: str) -> bool:
    """Tell whether a retention on a task says anything.

    It does where the lower 95 % end of the teacher's score lies above chance (and above 5 %).
    """
    for score in group.teacher.scores(task) if group.teacher else ():
        floor = max(score.chance, 0.05) if score.unit == "share" else 0
        if score.retains and score.value - 1.96 * _standard_error(score) > floor:
            return True
    return False


def _standard_error(score: TaskScore) -> float:
    """Return a figure's standard error; of hits and misses it follows from the items."""
    if score.hit_or_miss:
        return math.sqrt(score.value * (1 - score.value) / score.n)
    return score.stderr or 0.0


def best_labels(group: Group, task: str) -> frozenset[str]:
    """Return the labels of the best row and of all rows that are not significantly worse.

    Controls do not count. Each row is tested against the best one on the same items, one-sided:
    exact McNemar of hits and misses of one run each, a paired bootstrap of a figure with a `form`,
    else Student's t. Holm's adjustment is over the rows, alpha .05. Returns no label where a choice
    is impossible: with fewer than two rows, with a teacher at chance, and where any row was trained
    once, since that tells nothing of its method.
    """
    rows = [
        row for row in group.rows if row_block(row) not in (TEACHER, "control") and row.scores(task)
    ]
    some_unknown = teacher_at_chance(group, task) or any(
        row.trained_once or score.unpaired for row in rows for score in row.scores(task)
    )
    if len(rows) < 2 or some_unknown:
        return frozenset()
    sign = -1 if lower_is_better(rows[0], task) else 1

    def mean_score(row: ResultRow) -> tuple[float, str]:
        return sign * fmean(score.value for score in row.scores(task)), row.label

    best = max(rows, key=mean_score)
    others = [
        row
        for row in rows
        if row is not best and _same_items([*best.scores(task), *row.scores(task)])
    ]
    adjusted = stats.holm([inferiority_test(row, best, task) for row in others])
    not_worse = [row.label for row, p in zip(others, adjusted, strict=True) if p > ALPHA]
    return frozenset([best.label, *not_worse])


def inferiority_test(row: ResultRow, best: ResultRow, task: str) -> float:
    """Return the one-sided p value of "the row is no worse than the best one"."""
    scores = [*row.scores(task), *best.scores(task)]
    if scores[0].kind == "perplexity":
        ratio = figure_ratio(row, best, task)
        if not ratio.value or not ratio.sources or ratio.value == math.inf:
            return 1.0
        return one_sided_p(math.log(ratio.value), ratio.sources)
    runs = paired_values(row, best, task)
    if runs.single and all(score.hit_or_miss for score in scores):
        outcomes = paired_outcomes(row, best, task)
        return stats.inferiority_test(outcomes.student, outcomes.reference)
    p: float = tests_of(scores[0]).inferiority_test(
        runs.student,
        runs.reference,
        scores[0].parts,
        lower=scores[0].lower_is_better,
        paired=runs.paired,
    )
    return p
