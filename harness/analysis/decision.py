"""Which row to take: the smallest or the fastest that is shown to keep what was asked. No torch.

A row is never named for a figure that looks good. It is named where tests and bounds say so:

- *Retention*: on every task the hypothesis "it does not keep what was asked" is rejected. A row's p
  is the largest of its tasks (all must hold, so nothing is adjusted within a row: Berger, 1982,
  "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24, 295-300). Holm's
  adjustment is over the candidate rows: the probability of naming *any* row that does not keep what
  was asked is at most alpha.
- *Speed*: the lower end of the interval of its ratio to the teacher's, in every scenario.
- *Memory and size*: as measured; bytes have no error.

Bytes and speeds say nothing about answers, so rows that miss them leave the family before the
tests. Where nothing can be named, and a row could still be, the answer is how many items decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from harness.analysis.comparison import (
    Group,
    ResultRow,
    compare,
    figure_ratio,
    retention_test,
    row_block,
    teacher_at_chance,
)
from harness.analysis.items_needed import items_needed
from harness.analysis.measured_rows import mean_measurement, scenario_ratios
from harness.records import columns
from harness.records.record import TEACHER, TaskScore
from harness.statistics import stats
from harness.statistics.intervals import Interval


class Answer(StrEnum):
    """What a decision says."""

    take = "take"
    cannot_tell = "cannot tell"
    no_row = "no row can"


class Standing(StrEnum):
    """How a candidate stands to what was asked."""

    holds = "holds"
    undecided = "cannot tell"
    fails = "fails"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a row must show, and which of those that show it is taken."""

    # share of the teacher's score to keep (of choices: of what it has above chance); with
    # `points`, the share of the items that may be lost
    keep: float
    points: bool = False
    memory: float | None = None  # bytes at the peak, at most
    faster: float | None = None  # decode speed over the teacher's, at least
    smaller: float | None = None  # the teacher's bytes on disk over the row's, at least
    tasks: tuple[str, ...] = ()  # that must be kept; empty: all
    rows: tuple[str, ...] = ()  # the candidates; empty: all that are no teacher and no control
    take: Literal["smallest", "fastest"] = "smallest"
    alpha: float = 0.05  # one-sided, of naming any row that does not keep what was asked

    @property
    def claim(self) -> str:
        """What must be kept, in words."""
        if self.points:
            return f"loses less than {100 * self.keep:g} points"
        return f"keeps {100 * self.keep:g} %"


@dataclass(frozen=True, kw_only=True)
class TaskEvidence:
    """What the items of one task show of a candidate."""

    task: str
    retention: Interval
    p_kept: float  # of "it does not keep what was asked": small where it does
    p_lost: float  # of "it keeps what was asked": small where it does not
    n: int
    needed: int | None = None  # how many items would decide; None: decided, or more than it has
    reason: str = ""  # why it cannot be judged; "" where it can
    remark: str = ""  # on the items that would decide


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row that could be taken, and what is shown of it."""

    label: str
    standing: Standing
    reasons: tuple[str, ...]  # why it fails, or cannot be told
    tasks: tuple[TaskEvidence, ...] = ()
    p_kept: float = 1.0  # over all tasks, adjusted by Holm over the candidates
    disk: float | None  # bytes of the weight files
    memory: float | None  # bytes at the peak, else of the weights in memory
    speed: Interval  # decode speed over the teacher's, of the slowest scenario
    limits_hold: bool = True  # memory, size and speed were shown to hold


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer, the row it names or the nearest one, and every candidate, best first."""

    answer: Answer
    question: Question
    row: Candidate | None  # to take; of `cannot tell`: the one that is nearest to it
    candidates: tuple[Candidate, ...]
    tests: int  # rows in the Holm family
    reason: str = ""  # where there is no candidate at all

    @property
    def exit_code(self) -> int:
        """0 a row is named, 1 no row can, 3 cannot tell."""
        return {Answer.take: 0, Answer.no_row: 1, Answer.cannot_tell: 3}[self.answer]

    @property
    def more_items(self) -> int | None:
        """How many further items would decide on the nearest row, None where that is not known."""
        if self.answer is not Answer.cannot_tell or self.row is None:
            return None
        needed = [task.needed - task.n for task in self.row.tasks if task.needed is not None]
        return max(needed, default=None)


def decide(groups: Sequence[Group], question: Question) -> Decision:
    """Answer which row to take, of all rows of these tables that are no teacher and no control.

    Of several seeds the mean of a row's trainings is asked, as the tables' retention is.
    """
    return decide_each(groups, [question])[0]


def decide_each(groups: Sequence[Group], questions: Sequence[Question]) -> list[Decision]:
    """Answer several questions of the same rows, each as `decide` does.

    What two questions ask of a row's items in the same way is tested once.
    """
    known: _KnownEvidence = {}
    return [_decide(groups, question, known) for question in questions]


def _decide(groups: Sequence[Group], question: Question, known: "_KnownEvidence") -> Decision:
    subjects = _subjects(groups, question)
    limited = [_limits_of(subject, question) for subject in subjects]
    tested = [number for number, limits in enumerate(limited) if not limits.failed]
    evidence = [_evidence_of(subjects[number], question, known) for number in tested]
    kept = stats.holm([max((task.p_kept for task in tasks), default=1.0) for tasks in evidence])
    lost = stats.holm(
        [
            min(1.0, len(tasks) * min((task.p_lost for task in tasks), default=1.0))
            for tasks in evidence
        ]
    )
    candidates = [
        _failed_candidate(subject, limits)
        for subject, limits in zip(subjects, limited, strict=True)
        if limits.failed
    ]
    for position, number in enumerate(tested):
        candidates.append(
            _judged_candidate(
                _Case(subjects[number], limited[number], tuple(evidence[position])),
                question,
                kept[position],
                lost[position],
                tests=len(tested),
            )
        )
    return _answer(candidates, question, tests=len(tested))


class _Subject(NamedTuple):
    """A row in the table where it stands beside its teacher."""

    group: Group
    row: ResultRow


def _subjects(groups: Sequence[Group], question: Question) -> list[_Subject]:
    """Return every row that could be taken, once, though it may stand in several tables."""
    subjects: dict[tuple[str, ...], _Subject] = {}
    for group in groups:
        for row in group.rows:
            block = row_block(row)
            is_candidate = row.label in question.rows if question.rows else block != "control"
            if row.succeeded and block != TEACHER and is_candidate:
                subjects.setdefault(
                    (row.label, *(record.key for record in row.records)), _Subject(group, row)
                )
    return list(subjects.values())


# --- bytes and speed


class _Limits(NamedTuple):
    """What bytes and speed show of a row."""

    failed: tuple[str, ...]
    unknown: tuple[str, ...]
    disk: float | None
    memory: float | None
    speed: Interval


def _limits_of(subject: _Subject, question: Question) -> _Limits:
    row = subject.row
    failed: list[str] = []
    unknown: list[str] = []
    disk, memory = mean_measurement(row, columns.DISK.key), peak_memory(row)
    for reason, is_known in (
        _memory_reason(memory, question),
        _size_reason(subject, disk, question),
        _speed_reason(slowest_ratio(row), question),
    ):
        if reason:
            (failed if is_known else unknown).append(reason)
    return _Limits(tuple(failed), tuple(unknown), disk, memory, slowest_ratio(row))


class _Reason(NamedTuple):
    """Why a limit does not hold, "" where it does; `is_known` tells failure from ignorance."""

    text: str
    is_known: bool = True


def _memory_reason(memory: float | None, question: Question) -> _Reason:
    if question.memory is None:
        return _Reason("")
    if memory is None:
        return _Reason("its memory was not measured (harness run with --grid)", is_known=False)
    if memory <= question.memory:
        return _Reason("")
    return _Reason(f"needs {bytes_text(memory)}, and {bytes_text(question.memory)} are given")


def _size_reason(subject: _Subject, disk: float | None, question: Question) -> _Reason:
    if question.smaller is None:
        return _Reason("")
    teacher = mean_measurement(subject.group.teacher, columns.DISK.key)
    if not disk or not teacher:
        return _Reason("its bytes on disk were not measured beside a teacher's", is_known=False)
    if teacher / disk >= question.smaller:
        return _Reason("")
    return _Reason(f"is {teacher / disk:.2f} times smaller, and {question.smaller:g} was asked")


def _speed_reason(speed: Interval, question: Question) -> _Reason:
    if question.faster is None:
        return _Reason("")
    if speed.value is None or speed.low is None or speed.high is None:
        why = speed.reason or "no interval"
        return _Reason(f"its speed has no bound ({why}; --rounds)", is_known=False)
    if speed.low >= question.faster:
        return _Reason("")
    text = (
        f"decodes {columns.DECODE_X.with_interval(speed)} times as fast, and {question.faster:g} "
        "was asked"
    )
    if speed.high < question.faster:
        return _Reason(text)
    return _Reason(f"{text}: more rounds would decide", is_known=False)


def peak_memory(row: ResultRow) -> float | None:
    """Return the most bytes that using a row took, of all scenarios, seeds and phases.

    Where no peak was measured: the bytes of its weights in memory; None where neither is known.
    """
    prefixes = (f"{columns.PEAK.key}:", f"{columns.PREFILL_PEAK.key}:")
    peaks = [
        measurement.value
        for record in row.succeeded
        for measurement in record.measurements
        if measurement.name.startswith(prefixes)
    ]
    return max(peaks) if peaks else mean_measurement(row, columns.WEIGHTS.key)


def slowest_ratio(row: ResultRow) -> Interval:
    """Return the decode speed over the teacher's in the scenario with the lowest lower end."""
    ratios = list(scenario_ratios(row, columns.DECODE_X.key).values())
    unbounded = next((ratio for ratio in ratios if ratio.low is None), None)
    if not ratios or unbounded:
        return unbounded or Interval(None, reason="not timed beside its teacher")
    return min(ratios, key=lambda ratio: ratio.low or 0.0)


# --- what is kept


# what was tested already: by the row (its identity), the task and what must be kept of it
_KnownEvidence = dict[tuple[int, str, float, bool], TaskEvidence]


def _evidence_of(
    subject: _Subject, question: Question, known: _KnownEvidence
) -> list[TaskEvidence]:
    """Test every task that must be kept."""
    evidence = []
    for task in question.tasks or subject.group.tasks:
        key = (id(subject.row), task, question.keep, question.points)
        if key not in known:
            known[key] = _task_evidence(subject, task, question)
        evidence.append(known[key])
    return evidence


def _task_evidence(subject: _Subject, task: str, question: Question) -> TaskEvidence:
    """Test one task; both p are 1 where it cannot be judged."""
    group, row = subject
    scores, teacher = row.scores(task), group.teacher
    n = scores[0].n if scores else 0
    if reason := _untestable_reason(group, row, task, question):
        return TaskEvidence(
            task=task, retention=Interval(None), p_kept=1.0, p_lost=1.0, n=n, reason=reason
        )
    assert teacher is not None
    chance = _chance_level(scores[0], question)
    figure = _figure(row, teacher, scores[0], question)
    if figure.value is None or figure.low is None:
        reason = figure.reason or "too few items for an interval"
        return TaskEvidence(task=task, retention=figure, p_kept=1.0, p_lost=1.0, n=n, reason=reason)
    kept, lost = retention_test(
        row, teacher, task, question.keep, points=question.points, chance=chance
    )
    return TaskEvidence(task=task, retention=figure, p_kept=kept, p_lost=lost, n=n)


def _untestable_reason(group: Group, row: ResultRow, task: str, question: Question) -> str:
    """Return why a task cannot be judged, "" where it can."""
    scores, teacher = row.scores(task), group.teacher
    teacher_scores = teacher.scores(task) if teacher else []
    if not scores or not teacher_scores:
        return f"{task} was not scored" if teacher else "no teacher stands beside it"
    both = [*scores, *teacher_scores]
    if len({score.items_digest for score in both}) > 1:
        return f"{task}: scored on other items than the teacher"
    if reason := next((score.unpaired for score in both if score.unpaired), ""):
        return f"{task}: {reason}"
    if teacher_at_chance(group, task):
        return f"{task}: the teacher is at chance, so that nothing can be kept (--on names tasks)"
    if question.points and (scores[0].kind == "perplexity" or scores[0].unit == "number"):
        return f"{task} has no points; give --keep as a ratio (--on names tasks)"
    return ""


def _chance_level(score: TaskScore, question: Question) -> float:
    """Return the share above which a task is kept; 0 of points, which are the same anywhere."""
    plain = question.points or score.lower_is_better or score.unit != "share"
    return 0.0 if plain else score.chance


def _figure(row: ResultRow, teacher: ResultRow, score: TaskScore, question: Question) -> Interval:
    if score.kind == "perplexity":
        return figure_ratio(row, teacher, score.task)
    chance = _chance_level(score, question)
    return compare(row, teacher, score.task, ratio=not question.points, chance=chance)


# --- the answer


class _Case(NamedTuple):
    """A candidate before its verdict."""

    subject: _Subject
    limits: _Limits
    tasks: tuple[TaskEvidence, ...]


def _failed_candidate(subject: _Subject, limits: _Limits) -> Candidate:
    return Candidate(
        label=subject.row.label,
        standing=Standing.fails,
        reasons=limits.failed,
        disk=limits.disk,
        memory=limits.memory,
        speed=limits.speed,
        limits_hold=False,
    )


def _judged_candidate(
    case: _Case, question: Question, p_kept: float, p_lost: float, *, tests: int
) -> Candidate:
    """Return a candidate with its verdict, from p values that are adjusted over `tests` rows."""
    limits, judged = case.limits, all(not task.reason for task in case.tasks)
    tasks, reasons = case.tasks, list(limits.unknown)
    standing = Standing.undecided
    if judged and tasks and p_kept <= question.alpha:
        standing = Standing.undecided if reasons else Standing.holds
    elif p_lost <= question.alpha:
        standing = Standing.fails
        worst = min(tasks, key=lambda task: task.p_lost)
        reasons = [f"does not keep it on {worst.task}"]
    else:
        tasks = tuple(
            _with_needed(case.subject, task, question.alpha / tests, question) for task in tasks
        )
        reasons += [task.reason or task.remark for task in tasks if task.reason or task.remark]
    return Candidate(
        label=case.subject.row.label,
        standing=standing,
        reasons=tuple(dict.fromkeys(reasons)),
        tasks=tasks,
        p_kept=p_kept,
        disk=limits.disk,
        memory=limits.memory,
        speed=limits.speed,
        limits_hold=not limits.unknown,
    )


def _with_needed(
    subject: _Subject, task: TaskEvidence, alpha: float, question: Question
) -> TaskEvidence:
    """Return a task that is not decided with the number of items that would decide it."""
    if task.reason or task.p_kept <= alpha:
        return task
    score = subject.row.scores(task.task)[0]
    needed = stats.items_to_decide(task.p_kept, task.n, alpha=alpha)
    unit = "documents" if score.kind == "perplexity" else "items"
    decision = items_needed(needed, score, subject.row.first.conditions.limited, unit=unit)
    remark = f"{task.task}: {decision.text or 'the figure lies at the margin'}"
    return TaskEvidence(**{**vars(task), "needed": decision.needed, "remark": remark})


def _answer(candidates: Sequence[Candidate], question: Question, *, tests: int) -> Decision:
    """Name the best candidate that holds; else the nearest one that could; else none."""

    def decision(answer: Answer, row: Candidate | None, reason: str = "") -> Decision:
        ordered = sorted(candidates, key=lambda candidate: _place(candidate, question))
        return Decision(
            answer=answer,
            question=question,
            row=row,
            candidates=tuple(ordered),
            tests=tests,
            reason=reason,
        )

    holding = [row for row in candidates if row.standing is Standing.holds]
    if holding:
        return decision(Answer.take, min(holding, key=lambda row: _place(row, question)))
    undecided = [row for row in candidates if row.standing is Standing.undecided]
    if undecided:
        return decision(Answer.cannot_tell, min(undecided, key=lambda row: _place(row, question)))
    reason = "" if candidates else "there is no row but teachers and controls"
    return decision(Answer.no_row, None, reason)


def _place(candidate: Candidate, question: Question) -> tuple[int, float, float, float, str]:
    """Return where a candidate stands: those that hold by what is asked, others by their p."""
    order = (Standing.holds, Standing.undecided, Standing.fails).index(candidate.standing)
    size = candidate.disk if candidate.disk is not None else float("inf")
    speed = -(candidate.speed.low or 0.0)
    first, second = (size, speed) if question.take == "smallest" else (speed, size)
    if candidate.standing is Standing.holds:
        return order, first, second, 0.0, candidate.label
    return order, candidate.p_kept, first, second, candidate.label


def bytes_text(count: float) -> str:
    """Return a number of bytes in GiB or, below one, in MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
