"""Which rows are not dominated in retention, speed and size, as far as it is shown. No torch.

A row is judged by its strongest rival: of the rows that are no larger and were not shown to be
slower, the one that keeps most. All others are larger, slower or keep less. It is

- *on the front* where nothing rivals it, or where it is shown to be better than its rival on a task
  (one-sided; the rival is the best of many, so that the test errs to the careful side);
- *dominated* where the rival is shown to keep up on every task (it loses less than 2 points, as
  `harness check` tolerates; of a perplexity 2 %), is no slower by more than 5 %, and is shown to be
  better in one way at least: smaller, faster, or better on a task;
- else it *cannot be told*.

Holm's adjustment is over the rows of the table, for each of the two questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import NamedTuple

from harness.analysis.comparison import (
    ALPHA,
    Group,
    ResultRow,
    inferiority_test,
    retention_test,
    row_block,
    teacher_at_chance,
)
from harness.analysis.measured_rows import mean_measurement, scenario_ratios
from harness.records import columns
from harness.records.record import TEACHER
from harness.statistics import stats
from harness.statistics.intervals import Interval

_LOSS = 0.02  # points, or the share of a figure that has none, within which a rival keeps up
_SLOWER = 1.05  # times slower, within which a rival keeps up


class Standpoint(StrEnum):
    """Where a row stands."""

    front = "yes"
    dominated = "no"
    unknown = "cannot tell"


@dataclass(frozen=True)
class FrontPlace:
    """Where a row stands, and beside whom."""

    place: Standpoint
    rival: str = ""  # who dominates it, or may

    @property
    def text(self) -> str:
        """The place as a cell of a table."""
        return f"{self.place.value}: {self.rival}" if self.rival else self.place.value


class _Subject(NamedTuple):
    """A row with what the front looks at."""

    row: ResultRow
    size: float  # bytes of the weight files
    speeds: Mapping[str, Interval]  # over the teacher's, by scenario
    kept: float  # mean share of the teacher's figures, to choose rivals by


def front_places(group: Group) -> dict[str, FrontPlace]:
    """Return the place of every row that was weighed and could be taken, by its label.

    Empty where there are fewer than two, or the teacher says nothing on any task.
    """
    tasks = [task for task in group.tasks if _is_judged(group, task)]
    subjects = [
        subject
        for row in group.rows
        if row.succeeded and row_block(row) not in (TEACHER, "control")
        for subject in [_subject(group, row, tasks)]
        if subject is not None
    ]
    if len(subjects) < 2:
        return {}
    rivals = {subject.row.label: _rival(subject, subjects) for subject in subjects}
    pairs = [
        (subject, rival) for subject in subjects if (rival := rivals[subject.row.label]) is not None
    ]
    return {
        **{label: FrontPlace(Standpoint.front) for label, rival in rivals.items() if rival is None},
        **_judged(pairs, tasks),
    }


def _is_judged(group: Group, task: str) -> bool:
    """Tell whether a task says what rows keep: all have it, and the teacher is above chance."""
    rows = [row for row in group.rows if row.succeeded]
    scores = [score for row in rows for score in row.scores(task)]
    return (
        group.teacher is not None
        and all(row.scores(task) for row in rows)
        and not any(score.unpaired or score.signed for score in scores)
        and len({score.items_digest for score in scores}) == 1
        and not teacher_at_chance(group, task)
    )


def _subject(group: Group, row: ResultRow, tasks: Sequence[str]) -> _Subject | None:
    size = mean_measurement(row, columns.DISK.key)
    if not tasks or size is None:
        return None
    return _Subject(
        row,
        size,
        scenario_ratios(row, columns.DECODE_X.key),
        fmean(_kept_share(group, row, task) for task in tasks),
    )


def _kept_share(group: Group, row: ResultRow, task: str) -> float:
    """Return a row's mean figure over the teacher's; the inverse where lower is better."""
    assert group.teacher is not None
    ours, theirs = (
        fmean(score.value for score in side.scores(task)) for side in (row, group.teacher)
    )
    if row.scores(task)[0].lower_is_better:
        ours, theirs = theirs, ours
    return ours / theirs if theirs else 0.0


def _rival(subject: _Subject, subjects: Sequence[_Subject]) -> _Subject | None:
    """Return the row that keeps most of those no larger and not shown to be slower."""
    rivals = [
        other
        for other in subjects
        if other.row is not subject.row
        and other.size <= subject.size
        and not _is_faster(subject, other)
    ]
    return max(rivals, key=lambda other: (other.kept, other.row.label), default=None)


def _is_faster(first: _Subject, second: _Subject) -> bool:
    """Tell whether the first of two rows is shown to decode faster in some scenario."""
    return any(
        low > high
        for low, high in (
            (interval.low, second.speeds[scenario].high)
            for scenario, interval in first.speeds.items()
            if scenario in second.speeds
        )
        if low is not None and high is not None
    )


def _keeps_pace(rival: _Subject, subject: _Subject) -> bool:
    """Tell whether a rival is shown to be no slower by more than is tolerated, in any scenario.

    Rows of which neither was timed are not compared by speed.
    """
    if not rival.speeds and not subject.speeds:
        return True
    if set(rival.speeds) != set(subject.speeds):
        return False
    ends = [
        (rival.speeds[scenario].low, interval.high) for scenario, interval in subject.speeds.items()
    ]
    return all(low is not None and high is not None and low * _SLOWER >= high for low, high in ends)


def _judged(
    pairs: Sequence[tuple[_Subject, _Subject]], tasks: Sequence[str]
) -> dict[str, FrontPlace]:
    """Judge rows beside their rivals."""
    better = stats.holm([_p_better(subject, rival, tasks) for subject, rival in pairs])
    dominated = stats.holm([_p_dominated(subject, rival, tasks) for subject, rival in pairs])
    places = {}
    for position, (subject, rival) in enumerate(pairs):
        if better[position] <= ALPHA:
            places[subject.row.label] = FrontPlace(Standpoint.front)
        else:
            place = Standpoint.dominated if dominated[position] <= ALPHA else Standpoint.unknown
            places[subject.row.label] = FrontPlace(place, rival.row.label)
    return places


def _p_dominated(subject: _Subject, rival: _Subject, tasks: Sequence[str]) -> float:
    """Return the p of "the rival does not keep up, or is better in no way".

    Both must be rejected, so it is the larger of their p. 1 where speeds or the first of them
    forbid it already.
    """
    if not _keeps_pace(rival, subject):
        return 1.0
    p_keeps_up = max(_p_within(rival.row, subject.row, task) for task in tasks)
    if p_keeps_up > ALPHA or rival.size < subject.size or _is_faster(rival, subject):
        return p_keeps_up
    return max(p_keeps_up, _p_better(rival, subject, tasks))


def _p_better(first: _Subject, second: _Subject, tasks: Sequence[str]) -> float:
    """Return the p of "the first row is better than the second on no task" (Bonferroni).

    A task on which it is not the better one as measured shows nothing.
    """
    ahead = [task for task in tasks if _is_ahead(first.row, second.row, task)]
    p_values = [inferiority_test(second.row, first.row, task) for task in ahead]
    return min(1.0, len(tasks) * min(p_values, default=1.0))


def _is_ahead(first: ResultRow, second: ResultRow, task: str) -> bool:
    figures = [fmean(score.value for score in row.scores(task)) for row in (first, second)]
    lower = first.scores(task)[0].lower_is_better
    return figures[0] < figures[1] if lower else figures[0] > figures[1]


def _p_within(rival: ResultRow, row: ResultRow, task: str) -> float:
    score = row.scores(task)[0]
    in_points = score.kind != "perplexity" and score.unit == "share"
    margin = _LOSS if in_points else 1 - _LOSS
    return retention_test(rival, row, task, margin, points=in_points).p_noninferior
