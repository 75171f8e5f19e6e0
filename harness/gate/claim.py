"""The claim layer of `harness check`: does a row keep the margin of its teacher's score on the same
items (non-inferiority)? No torch.

The question is asked of a checkpoint, so items alone decide it, and seeds that gave the same
student are one training. Where guessing scores (choices), the margin is asked of what lies above
chance; where the teacher is at chance, nothing can be kept and nothing is judged.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.analysis.comparison import (
    Group,
    ResultRow,
    compare,
    conditions_of,
    figure_ratio,
    paired_outcomes,
    retention_test,
    teacher_at_chance,
)
from harness.gate.frozen_items import margin_of
from harness.gate.rules import (
    Decides,
    Finding,
    Rules,
    Verdict,
    decides,
    decides_among,
    is_judged,
    not_comparable,
    short,
    unmet,
)
from harness.records import columns
from harness.records.record import TEACHER, RunRecord, TaskScore
from harness.statistics import stats
from harness.statistics.figures import BITS

if TYPE_CHECKING:
    from harness.records.baseline import Baseline

Numbers = dict[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim that was tested: p of "it does not keep the margin", p of "it does"."""

    layer: str = "claim"
    label: str
    task: str = ""  # none: pooled over tasks
    unmet_if_large: float
    met_if_large: float
    told: str
    numbers: Numbers
    n: int
    score: TaskScore | None = None  # None: pooled
    limited: bool = False
    tasks: tuple[str, ...] = ()  # pooled: whose items stand in it
    there: int | None = None  # pooled: how many items these tasks have
    speaks_for: tuple[str, ...] = ()

    def decides(self, needed: int | None) -> Decides:
        """Say how many items would decide, never more than there are."""
        if self.score is None:
            return decides_among(needed, self.there, " and ".join(self.tasks))
        return decides(
            needed,
            self.score,
            self.limited,
            what="documents" if self.score.kind == "perplexity" else "items",
        )


@dataclass(frozen=True)
class Asked:
    """A row whose claims are asked for, one record a training, and its teacher's; `rules` hold the
    row's own margin, where it has one.
    """

    group: Group
    row: ResultRow
    teacher: ResultRow | None
    seeds: int
    rules: Rules

    @property
    def trainings(self) -> str:
        """Say how many trainings stand behind the seeds, where seeds gave equal students."""
        count = len(self.row.records)
        return (
            f"; {self.seeds} seeds, {count} training{'s' if count > 1 else ''} (equal students)"
            if count < self.seeds
            else ""
        )


def asked_rows(
    groups: Sequence[Group], rules: Rules, baseline: "Baseline | None" = None
) -> list[Asked]:
    """Return the rows of which a margin is asked, in every table in which they stand; the baseline
    may hold one to a margin of its own.
    """
    rows = [
        (table, row)
        for table in groups
        for row in table.rows
        if is_judged(row.first, rules) and row.succeeded and row.first.method != TEACHER
    ]
    asked = [
        Asked(
            table,
            one_a_student(row),
            one_a_student(table.teacher) if table.teacher else None,
            len(row.succeeded),
            margin_of(baseline, row.label, rules),
        )
        for table, row in rows
        if is_judged(row.first, rules)
    ]
    return [candidate for candidate in asked if candidate.rules.margin is not None]


def one_a_student(row: ResultRow) -> ResultRow:
    """Return a row with one record a student: seeds that gave equal students are one training, and
    a teacher is one model.
    """
    return ResultRow(row.label, row.trainings)


def claims_of(
    asked: Sequence[Asked], records: Sequence[RunRecord]
) -> tuple[list[Claim], list[Finding]]:
    """Test every row and task against the teacher's outcomes on the same items; return the tests,
    and what cannot be tested.
    """
    untold: list[Finding] = []
    tested: dict[tuple[str, str], Claim] = {}
    for candidate in asked:
        for score in candidate.row.first.scores:
            outcome = _no_claim(candidate, score, records) or _claim(candidate, score)
            if isinstance(outcome, Finding):
                untold.append(outcome)
            else:
                tested.setdefault((candidate.row.label, score.task), outcome)
    return list(tested.values()), untold


def judged(claims: Sequence[Claim], rules: Rules, held: Collection[str]) -> list[Finding]:
    """Judge tests: Holm over all of them, rows and tasks and pooled ones alike; `held` are the rows
    of the baseline.
    """
    met = stats.holm([claim.unmet_if_large for claim in claims])
    lost = stats.holm([claim.met_if_large for claim in claims])
    return [
        _judged(claim, p, other, len(claims), rules, held)
        for claim, p, other in zip(claims, met, lost, strict=True)
    ]


def _judged(
    claim: Claim, met: float, lost: float, tests: int, rules: Rules, held: Collection[str]
) -> Finding:
    kept = met <= rules.alpha
    verdict = (
        Verdict.passed
        if kept
        else unmet(claim.label, held)
        if lost <= rules.alpha
        else Verdict.cannot_tell
    )
    numbers: Numbers = {
        **claim.numbers,
        "p_met_holm": met,
        "p_unmet_holm": lost,
        "tests": tests,
        "needed": None,
    }
    line = claim.told
    if verdict is Verdict.cannot_tell:
        needed = stats.items_to_decide(claim.unmet_if_large, claim.n, alpha=rules.alpha / tests)
        decided = claim.decides(needed)
        numbers |= {"needed": decided.needed, "task_items": decided.task_items}
        among = f" (one of {tests} tests: fewer rows, --rows, ask for less)" if tests > 1 else ""
        line += f"; {decided.told or 'it stands at the margin'}{among}"
    return Finding(
        layer=claim.layer,
        row=claim.label,
        task=claim.task,
        verdict=verdict,
        told=line,
        numbers=numbers,
        speaks_for=claim.speaks_for,
    )


def at_chance(group: Group, score: TaskScore) -> str:
    """Return why nothing can be kept of a teacher's figure that guessing may reach; "" where it is
    shown to be above chance.
    """
    if not teacher_at_chance(group, score.task) or group.teacher is None:
        return ""
    theirs = group.teacher.scores(score.task)[0]
    floor = max(theirs.chance, 0.05) if theirs.unit == "share" else 0.0
    seen = f"{theirs.shown(theirs.value)} on {theirs.n:,} items"
    return f"teacher at chance: not judged ({seen} is not shown to be above {theirs.shown(floor)})"


def _no_claim(candidate: Asked, score: TaskScore, records: Sequence[RunRecord]) -> Finding | None:
    """Return why a row's claim on a task cannot be tested, None where it can."""
    row, teacher, rules = candidate.row, candidate.teacher, candidate.rules
    if teacher is None or not teacher.scores(score.task):
        return not_comparable("claim", row.label, score.task, *_apart(row.first, records))
    theirs = teacher.scores(score.task)[0]
    if any(each.items_digest != theirs.items_digest for each in row.scores(score.task)):
        return not_comparable(
            "claim", row.label, score.task, "items", "scored on other items than the teacher"
        )
    why = (
        theirs.unpaired
        or next((each.unpaired for each in row.scores(score.task) if each.unpaired), "")
        or at_chance(candidate.group, score)
    )
    if (
        not why
        and rules.points
        and (score.kind == "perplexity" or (score.unit == "number" and not score.signed))
    ):
        name = (
            "perplexities have"
            if score.kind == "perplexity"
            else f"{score.metric or score.primary} is no share and has"
        )
        why = f"{name} no points; give a ratio"
    return _untold(row, score, why) if why else None


def _untold(row: ResultRow, score: TaskScore, why: str) -> Finding:
    return Finding(
        layer="claim", row=row.label, task=score.task, verdict=Verdict.cannot_tell, told=why
    )


def _no_interval(figure: stats.Interval, score: TaskScore, rules: Rules) -> str:
    """Return why a figure has no interval, "" where it has one: what has none is not judged."""
    if figure.value is not None and figure.low is not None:
        return ""
    if figure.value is None and score.chance and not rules.points:
        return (
            f"the teacher stands too near chance ({100 * score.chance:.4g} %) for a retention "
            "above it: not judged"
        )
    if score.signed and not rules.points:
        return f"{figure.reason}; give --margin 2points"
    unit = "document" if score.kind == "perplexity" else "item"
    return figure.reason or f"one {unit} gives no interval"


def _figure(row: ResultRow, teacher: ResultRow, score: TaskScore, rules: Rules) -> stats.Interval:
    """Return the figure of a claim with its interval: what is tested, and nothing else."""
    if score.kind == "perplexity":
        return figure_ratio(row, teacher, score.task)
    return compare(row, teacher, score.task, ratio=not rules.points, chance=_chance(score, rules))


def _chance(score: TaskScore, rules: Rules) -> float:
    """Return above what share a margin is asked; points are points, wherever they lie."""
    return 0.0 if rules.points or score.lower_is_better or score.unit != "share" else score.chance


def _apart(record: RunRecord, records: Sequence[RunRecord]) -> tuple[str, str]:
    """Return the first condition in which the nearest teacher's record differs from a row's, and
    how.
    """
    teachers = [one for one in records if one.method == TEACHER and one.status == "success"]
    if not teachers:
        return "teacher", "there is no record of the teacher that succeeded"
    own = conditions_of(record)
    gaps = [
        [
            name
            for name in {**conditions_of(one), **own}
            if own.get(name) != conditions_of(one).get(name)
        ]
        for one in teachers
    ]
    nearest = min(range(len(gaps)), key=lambda at: len(gaps[at]))
    if not gaps[nearest]:
        return "teacher", "the teacher was not scored on this task"
    name = gaps[nearest][0]
    return (
        name,
        f"{name} differs: {short(conditions_of(teachers[nearest]).get(name))} of the teacher, "
        f"{short(own.get(name))} of the row",
    )


def _claim(candidate: Asked, score: TaskScore) -> Claim | Finding:
    """Test one claim; the finding that it cannot be told where its figure has no interval."""
    rules = candidate.rules
    assert rules.margin is not None and candidate.teacher is not None
    figure, chance = _figure(candidate.row, candidate.teacher, score, rules), _chance(score, rules)
    if why := _no_interval(figure, score, rules):
        return _untold(candidate.row, score, why)
    numbers: Numbers = {
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "n": score.n,
        "seeds": len(candidate.row.records),
    }
    if score.kind == "perplexity":
        p, other = stats.ratio_keeps(figure, 1 / rules.margin)
        name = (columns.BITS_PER_BYTE if score.metric == BITS else columns.PERPLEXITY).header
        line = (
            f"{name} {columns.RATIO.with_interval(figure)} of the teacher's on {score.n:,} "
            f"documents; at most x{1 / rules.margin:.3f}"
        )
    else:
        p, other, flips = _tested(candidate.row, candidate.teacher, score, rules)
        numbers |= flips
        line = (
            f"{shown(figure, rules, above=bool(chance))} on {score.n:,} items; must show that it "
            f"{rules.claim(chance)}"
        )
        if score.lower_is_better and not rules.points:
            name = score.metric or score.primary
            line = (
                f"{name} {columns.RATIO.with_interval(figure)} of the teacher's on {score.n:,} "
                f"items; at most x{1 / rules.margin:.3f}"
            )
    return Claim(
        label=candidate.row.label,
        task=score.task,
        unmet_if_large=p,
        met_if_large=other,
        told=line + candidate.trainings,
        n=score.n,
        score=score,
        numbers={**numbers, **asked_of(rules, chance), "p_met": p, "p_unmet": other},
        limited=candidate.row.first.conditions.limited,
    )


def _tested(
    row: ResultRow, teacher: ResultRow, score: TaskScore, rules: Rules
) -> tuple[float, float, Numbers]:
    """Test a claim as tables do (`groups.keeps`); of hits return the flips that were seen, too."""
    chance = _chance(score, rules)
    seen: Numbers = {}
    if score.hit_or_miss and teacher.scores(score.task)[0].hit_or_miss:
        ours, theirs = paired_outcomes(row, teacher, score.task)
        counts = [stats.pairs(theirs[0], run) for run in ours]
        flips = sum(pair.teacher_only + pair.student_only for pair in counts) / sum(
            pair.n for pair in counts
        )
        seen = {"flips": flips, "teacher": theirs[0].count("1") / score.n}
    return *retention_test(
        row, teacher, score.task, rules.margin or 0.0, points=rules.points, chance=chance
    ), seen


def asked_of(rules: Rules, chance: float) -> Numbers:
    """Return what a claim asks, for those who read numbers."""
    return {"margin": rules.margin, "points": int(rules.points), "chance": chance}


def shown(value: stats.Interval, rules: Rules, *, above: bool) -> str:
    """Write the figure of a claim with its interval."""
    if value.value is None:
        return value.reason or "undefined"
    quantity = columns.DIFFERENCE if rules.points else columns.RETENTION
    text = (
        f"{quantity.header}{f' {columns.ABOVE_CHANCE.header}' if above else ''} "
        f"{quantity.digits(value.value)} {quantity.unit}"
    )
    return (
        text
        if value.low is None or value.high is None
        else f"{text} [{quantity.digits(value.low)}, {quantity.digits(value.high)}]"
    )
