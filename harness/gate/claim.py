"""The claim layer of `harness check`: does a row keep the margin of its teacher's score? No torch.

It is a test of non-inferiority on the same items. It is about a checkpoint: items alone decide it,
and seeds that gave the same student count as one training. If guessing scores (choices), the margin
applies to what lies above chance. If the teacher itself is at chance, nothing is judged.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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
from harness.gate.frozen_items import rules_for_row
from harness.gate.rules import (
    Difference,
    Finding,
    ItemsNeeded,
    Rules,
    Verdict,
    abbreviated,
    is_judged,
    items_needed,
    items_needed_among,
    not_comparable,
    unmet_verdict,
)
from harness.records import columns
from harness.records.record import TEACHER, RunRecord, TaskScore
from harness.statistics import stats
from harness.statistics.figures import BITS_PER_BYTE

if TYPE_CHECKING:
    from harness.records.baseline import Baseline

Numbers = dict[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class RetentionClaim:
    """A tested claim that a row keeps its margin, on one task or pooled over several."""

    layer: str = "claim"
    label: str
    task: str = ""  # "": pooled over tasks
    p_met: float  # small: the row was shown to keep the margin
    p_unmet: float  # small: it was shown not to keep it
    line: str
    numbers: Numbers
    n: int
    score: TaskScore | None = None  # None: pooled
    limited: bool = False
    tasks: tuple[str, ...] = ()  # pooled: the tasks whose items it holds
    available_items: int | None = None  # pooled: how many items these tasks have, if known
    speaks_for: tuple[str, ...] = ()

    def items_to_decide(self, needed: int | None) -> ItemsNeeded:
        """Return how many items would decide the claim, if its tasks have as many."""
        if self.score is None:
            return items_needed_among(needed, self.available_items, " and ".join(self.tasks))
        unit = "documents" if self.score.kind == "perplexity" else "items"
        return items_needed(needed, self.score, self.limited, unit=unit)


@dataclass(frozen=True)
class ClaimedRow:
    """A row that must keep a margin, and its teacher's row, each with one record per student."""

    group: Group
    row: ResultRow
    teacher: ResultRow | None
    seeds: int
    rules: Rules  # with the row's own margin, if it has one

    @property
    def trainings(self) -> str:
        """The remark that seeds gave equal students; "" where every seed gave its own."""
        count = len(self.row.records)
        if count >= self.seeds:
            return ""
        plural = "s" if count > 1 else ""
        return f"; {self.seeds} seeds, {count} training{plural} (equal students)"


class ClaimTests(NamedTuple):
    """The claims that were tested, and the findings on those that cannot be tested."""

    claims: list[RetentionClaim]
    untestable: list[Finding]


def claimed_rows(
    groups: Sequence[Group], rules: Rules, baseline: "Baseline | None" = None
) -> list[ClaimedRow]:
    """Return the rows that must keep a margin, once for every table in which they stand.

    The margin is the row's own one of the baseline, else that of the rules.
    """
    rows = [
        ClaimedRow(
            group,
            one_record_per_student(row),
            one_record_per_student(group.teacher) if group.teacher else None,
            len(row.succeeded),
            rules_for_row(baseline, row.label, rules),
        )
        for group in groups
        for row in group.rows
        if is_judged(row.first, rules) and row.succeeded and row.first.method != TEACHER
    ]
    return [claimed for claimed in rows if claimed.rules.margin is not None]


def one_record_per_student(row: ResultRow) -> ResultRow:
    """Return a row with one record per student: seeds that gave equal students are one training."""
    return ResultRow(row.label, row.trainings)


def claims_of(rows: Sequence[ClaimedRow], records: Sequence[RunRecord]) -> ClaimTests:
    """Test every row and task against the teacher's outcomes on the same items."""
    untestable: list[Finding] = []
    claims: dict[tuple[str, str], RetentionClaim] = {}
    for claimed in rows:
        for score in claimed.row.first.scores:
            outcome = _untestable_finding(claimed, score, records) or _test_claim(claimed, score)
            if isinstance(outcome, Finding):
                untestable.append(outcome)
            else:
                claims.setdefault((claimed.row.label, score.task), outcome)
    return ClaimTests(list(claims.values()), untestable)


def judge_claims(
    claims: Sequence[RetentionClaim], rules: Rules, frozen_labels: Collection[str]
) -> list[Finding]:
    """Judge claims: Holm's adjustment over all of them, pooled ones included.

    `frozen_labels` are the rows of the baseline: a claim that one of them does not keep is a
    regression.
    """
    met = stats.holm([claim.p_met for claim in claims])
    unmet = stats.holm([claim.p_unmet for claim in claims])
    return [
        _judge_claim(claim, p_met, p_unmet, len(claims), rules, frozen_labels)
        for claim, p_met, p_unmet in zip(claims, met, unmet, strict=True)
    ]


def _judge_claim(
    claim: RetentionClaim,
    p_met: float,
    p_unmet: float,
    tests: int,
    rules: Rules,
    frozen_labels: Collection[str],
) -> Finding:
    """Return the verdict on a claim from its adjusted p values; `tests` is their number."""
    verdict = Verdict.cannot_tell
    if p_met <= rules.alpha:
        verdict = Verdict.passed
    elif p_unmet <= rules.alpha:
        verdict = unmet_verdict(claim.label, frozen_labels)
    numbers: Numbers = {
        **claim.numbers,
        "p_met_holm": p_met,
        "p_unmet_holm": p_unmet,
        "tests": tests,
        "needed": None,
    }
    line = claim.line
    if verdict is Verdict.cannot_tell:
        needed = stats.items_to_decide(claim.p_met, claim.n, alpha=rules.alpha / tests)
        decision = claim.items_to_decide(needed)
        numbers |= {"needed": decision.needed, "task_items": decision.task_items}
        among = (
            f" (one of {tests} tests; with fewer rows, --rows, fewer would do)" if tests > 1 else ""
        )
        line += f"; {decision.text or 'the figure lies at the margin'}{among}"
    return Finding(
        layer=claim.layer,
        row=claim.label,
        task=claim.task,
        verdict=verdict,
        told=line,
        numbers=numbers,
        speaks_for=claim.speaks_for,
    )


def teacher_at_chance_reason(group: Group, score: TaskScore) -> str:
    """Return why nothing is judged if the teacher may be at chance; "" if it is shown above it."""
    if not teacher_at_chance(group, score.task) or group.teacher is None:
        return ""
    teacher_score = group.teacher.scores(score.task)[0]
    floor = max(teacher_score.chance, 0.05) if teacher_score.unit == "share" else 0.0
    figure = f"{teacher_score.format_value(teacher_score.value)} on {teacher_score.n:,} items"
    return (
        f"teacher at chance: not judged ({figure} is not shown to be above "
        f"{teacher_score.format_value(floor)})"
    )


def _untestable_finding(
    claimed: ClaimedRow, score: TaskScore, records: Sequence[RunRecord]
) -> Finding | None:
    """Return the finding that a row's claim on a task cannot be tested, None where it can."""
    row, teacher = claimed.row, claimed.teacher
    if teacher is None or not teacher.scores(score.task):
        difference = _difference_from_teacher(row.first, records)
        return not_comparable("claim", row.label, score.task, difference)
    teacher_score = teacher.scores(score.task)[0]
    row_scores = row.scores(score.task)
    if any(row_score.items_digest != teacher_score.items_digest for row_score in row_scores):
        difference = Difference("items", "scored on other items than the teacher")
        return not_comparable("claim", row.label, score.task, difference)
    reason = (
        teacher_score.unpaired
        or next((row_score.unpaired for row_score in row_scores if row_score.unpaired), "")
        or teacher_at_chance_reason(claimed.group, score)
        or _no_points_reason(score, claimed.rules)
    )
    return _cannot_tell(row, score, reason) if reason else None


def _no_points_reason(score: TaskScore, rules: Rules) -> str:
    """Return why a margin in points does not fit a score, "" where it does."""
    if not rules.points:
        return ""
    if score.kind == "perplexity":
        return "perplexities have no points; give a ratio"
    if score.unit == "number" and not score.signed:
        return f"{score.metric or score.primary} is no share and has no points; give a ratio"
    return ""


def _cannot_tell(row: ResultRow, score: TaskScore, reason: str) -> Finding:
    return Finding(
        layer="claim", row=row.label, task=score.task, verdict=Verdict.cannot_tell, told=reason
    )


def _missing_interval_reason(figure: stats.Interval, score: TaskScore, rules: Rules) -> str:
    """Return why a figure has no interval and is not judged, "" where it has one."""
    if figure.value is not None and figure.low is not None:
        return ""
    if figure.value is None and score.chance and not rules.points:
        return (
            f"the teacher is too near chance ({100 * score.chance:.4g} %) for a retention above "
            "chance: not judged"
        )
    if score.signed and not rules.points:
        return f"{figure.reason}; give --margin 2points"
    unit = "document" if score.kind == "perplexity" else "item"
    return figure.reason or f"one {unit} gives no interval"


def _claim_figure(
    row: ResultRow, teacher: ResultRow, score: TaskScore, rules: Rules
) -> stats.Interval:
    """Return the figure that a claim is about, with its interval."""
    if score.kind == "perplexity":
        return figure_ratio(row, teacher, score.task)
    chance = _chance_level(score, rules)
    return compare(row, teacher, score.task, ratio=not rules.points, chance=chance)


def _chance_level(score: TaskScore, rules: Rules) -> float:
    """Return the share above which a margin applies; 0 for points, which are the same anywhere."""
    return 0.0 if rules.points or score.lower_is_better or score.unit != "share" else score.chance


def _difference_from_teacher(record: RunRecord, records: Sequence[RunRecord]) -> Difference:
    """Return how a row's conditions differ from those of the teacher's most similar record."""
    teachers = [
        conditions_of(candidate)
        for candidate in records
        if candidate.method == TEACHER and candidate.status == "success"
    ]
    if not teachers:
        return Difference("teacher", "there is no record of the teacher that succeeded")
    conditions = conditions_of(record)
    nearest = min(teachers, key=lambda teacher: len(_differing_names(teacher, conditions)))
    names = _differing_names(nearest, conditions)
    if not names:
        return Difference("teacher", "the teacher was not scored on this task")
    name = names[0]
    teacher_value, row_value = abbreviated(nearest.get(name)), abbreviated(conditions.get(name))
    return Difference(
        name, f"{name} differs: {teacher_value} of the teacher, {row_value} of the row"
    )


def _differing_names(teacher: Mapping[str, str], row: Mapping[str, str]) -> list[str]:
    """Return the names of the conditions that differ."""
    return [name for name in {**teacher, **row} if row.get(name) != teacher.get(name)]


def _test_claim(claimed: ClaimedRow, score: TaskScore) -> RetentionClaim | Finding:
    """Test the claim on a task; without an interval, return the finding that it cannot be told."""
    rules = claimed.rules
    assert rules.margin is not None and claimed.teacher is not None
    figure = _claim_figure(claimed.row, claimed.teacher, score, rules)
    if reason := _missing_interval_reason(figure, score, rules):
        return _cannot_tell(claimed.row, score, reason)
    chance = _chance_level(score, rules)
    flips: Numbers = {}
    if score.kind == "perplexity":
        p_met, p_unmet = stats.ratio_test(figure, 1 / rules.margin)
    else:
        p_met, p_unmet = retention_test(
            claimed.row,
            claimed.teacher,
            score.task,
            rules.margin,
            points=rules.points,
            chance=chance,
        )
        flips = _flip_numbers(claimed.row, claimed.teacher, score)
    return RetentionClaim(
        label=claimed.row.label,
        task=score.task,
        p_met=p_met,
        p_unmet=p_unmet,
        line=_claim_line(figure, score, rules) + claimed.trainings,
        n=score.n,
        score=score,
        numbers={
            "value": figure.value,
            "low": figure.low,
            "high": figure.high,
            "n": score.n,
            "seeds": len(claimed.row.records),
            **flips,
            **margin_numbers(rules, chance),
            "p_met": p_met,
            "p_unmet": p_unmet,
        },
        limited=not claimed.row.first.conditions.has_all_items,
    )


def _claim_line(figure: stats.Interval, score: TaskScore, rules: Rules) -> str:
    """Return the figure of a claim and what it must show, in words."""
    assert rules.margin is not None
    if score.kind == "perplexity":
        name = (
            columns.BITS_PER_BYTE if score.metric == BITS_PER_BYTE else columns.PERPLEXITY
        ).header
        unit = "documents"
    elif score.lower_is_better and not rules.points:
        name, unit = score.metric or score.primary, "items"
    else:
        chance = _chance_level(score, rules)
        return (
            f"{figure_text(figure, rules, above=bool(chance))} on {score.n:,} items; must show "
            f"that it {rules.claim(chance)}"
        )
    return (
        f"{name} {columns.RATIO.with_interval(figure)} of the teacher's on {score.n:,} {unit}; "
        f"at most x{1 / rules.margin:.3f}"
    )


def _flip_numbers(row: ResultRow, teacher: ResultRow, score: TaskScore) -> Numbers:
    """Return the share of flipped items and the teacher's hits; nothing where items are no hits."""
    if not (score.hit_or_miss and teacher.scores(score.task)[0].hit_or_miss):
        return {}
    outcomes = paired_outcomes(row, teacher, score.task)
    teacher_run = outcomes.reference[0]
    counts = [stats.count_pairs(run, teacher_run) for run in outcomes.student]
    flipped = sum(pair.teacher_only + pair.student_only for pair in counts)
    return {
        "flips": flipped / sum(pair.n for pair in counts),
        "teacher": teacher_run.count("1") / score.n,
    }


def margin_numbers(rules: Rules, chance: float) -> Numbers:
    """Return what a claim asks for, as numbers of its finding."""
    return {"margin": rules.margin, "points": int(rules.points), "chance": chance}


def figure_text(figure: stats.Interval, rules: Rules, *, above: bool) -> str:
    """Return the figure of a claim with its interval, as text; `above`: of what is above chance."""
    if figure.value is None:
        return figure.reason or "undefined"
    quantity = columns.DIFFERENCE if rules.points else columns.RETENTION
    name = f"{quantity.header} {columns.ABOVE_CHANCE.header}" if above else quantity.header
    text = f"{name} {quantity.digits(figure.value)} {quantity.unit}"
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{quantity.digits(figure.low)}, {quantity.digits(figure.high)}]"
