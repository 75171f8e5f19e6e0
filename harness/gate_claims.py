"""The claim layer of `harness check`: does a row keep the margin of its teacher's score on the same items (non-inferiority)? No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from harness import stats
from harness.findings import Finding, Rules, Verdict, is_judged, not_comparable, short
from harness.groups import TEACHER, Group, Row, compare, conditions_of, paired, paired_numbers, tests_of, times_of
from harness.record import RunRecord, TaskScore


@dataclass(frozen=True)
class _Claim:
    """A row and a task whose claim is tested: p of "it does not keep the margin", p of "it does"."""

    row: Row
    score: TaskScore
    unmet_if_large: float
    met_if_large: float
    told: str
    numbers: dict[str, float | int | None]


def claim_findings(groups: Sequence[Group], records: Sequence[RunRecord], rules: Rules) -> list[Finding]:
    """Judge every row and task against the teacher's outcomes on the same items; Holm over all of them."""
    found: list[Finding] = []
    tested: dict[tuple[str, str], _Claim] = {}
    for one in groups:
        for row in one.rows:
            if not is_judged(row.first, rules) or not row.done or row.first.method == TEACHER:
                continue
            for score in row.done[0].scores:
                reason = _no_claim(row, one.teacher, score, records, rules)
                if reason is not None:
                    found.append(reason)
                elif (row.label, score.task) not in tested and one.teacher is not None:
                    tested[row.label, score.task] = _claim(row, one.teacher, score, rules)
    claims = list(tested.values())
    met = stats.holm([one.unmet_if_large for one in claims])
    unmet = stats.holm([one.met_if_large for one in claims])
    for claim, kept, lost in zip(claims, met, unmet, strict=True):
        verdict = Verdict.passed if kept <= rules.alpha else Verdict.regressed if lost <= rules.alpha else Verdict.cannot_tell
        told, numbers = claim.told, {**claim.numbers, "p_met_holm": kept, "p_unmet_holm": lost, "needed": None}
        if verdict is Verdict.cannot_tell:
            needed = stats.items_to_decide(claim.unmet_if_large, claim.score.n, alpha=rules.alpha / len(claims))
            numbers["needed"] = needed
            told += f"; about {needed:,} items would decide" if needed else "; it stands exactly at the margin"
        found.append(Finding(layer="claim", row=claim.row.label, task=claim.score.task, verdict=verdict, told=told, numbers=numbers))
    return found


def _no_claim(row: Row, teacher: Row | None, score: TaskScore, records: Sequence[RunRecord], rules: Rules) -> Finding | None:
    """Return why a row's claim on a task cannot be tested, None where it can."""
    if teacher is None or not teacher.scores(score.task):
        return not_comparable("claim", row.label, score.task, *_apart(row.done[0], records))
    theirs = teacher.scores(score.task)[0]
    if any(each.items_digest != theirs.items_digest for each in row.scores(score.task)):
        return not_comparable("claim", row.label, score.task, "items", "scored on other items than the teacher")
    why = theirs.unpaired or next((each.unpaired for each in row.scores(score.task) if each.unpaired), "")
    if why:
        pass
    elif score.kind == "perplexity":
        ratio = times_of(row, teacher, score.task)
        why = "perplexities have no points; give a ratio" if rules.points else ratio.reason
        why = why or ("one document gives no interval" if ratio.low is None else "")
    elif not theirs.hit_or_miss or not score.hit_or_miss:
        ratio = compare(row, teacher, score.task, ratio=True)
        number = rules.points and score.unit == "number"
        why = f"{score.metric or score.primary} is no share and has no points; give a ratio" if number else ""
        why = why or ("" if rules.points else ratio.reason)
    elif not any("1" in run for run in teacher.outcomes(score.task)):
        why = "the teacher solves nothing: there is no retention"
    return Finding(layer="claim", row=row.label, task=score.task, verdict=Verdict.cannot_tell, told=why) if why else None


def _apart(record: RunRecord, records: Sequence[RunRecord]) -> tuple[str, str]:
    """Return the first condition in which the nearest teacher's record differs from a row's, and how."""
    teachers = [one for one in records if one.method == TEACHER and one.status == "success"]
    if not teachers:
        return "teacher", "there is no record of the teacher that succeeded"
    own = conditions_of(record)
    gaps = [[name for name in {**conditions_of(one), **own} if own.get(name) != conditions_of(one).get(name)] for one in teachers]
    nearest = min(range(len(gaps)), key=lambda at: len(gaps[at]))
    if not gaps[nearest]:
        return "teacher", "the teacher was not scored on this task"
    name = gaps[nearest][0]
    return name, f"{name} differs: {short(conditions_of(teachers[nearest]).get(name))} of the teacher, {short(own.get(name))} of the row"


def _claim(row: Row, teacher: Row, score: TaskScore, rules: Rules) -> _Claim:
    assert rules.margin is not None
    if score.kind == "perplexity":
        ratio, limit = times_of(row, teacher, score.task), 1 / rules.margin
        p, other = stats.ratio_keeps(ratio, limit)
        told = f"perplexity x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the teacher's on {score.n} documents"
        told += f"; at most x{limit:.3f}"
        numbers: dict[str, float | int | None] = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "n": score.n}
        return _Claim(row, score, p, other, told, numbers)
    if not score.hit_or_miss or not teacher.scores(score.task)[0].hit_or_miss:
        return _claim_of_means(row, teacher, score, rules.margin, rules)
    ours, theirs = paired(row, teacher, score.task)
    p, other = stats.keeps(ours, theirs, rules.margin, points=rules.points)
    value = compare(row, teacher, score.task, ratio=not rules.points)
    told = f"{_shown(value, points=rules.points)} on {score.n:,} items; must show that it {rules.claim()}"
    numbers = {"value": value.value, "low": value.low, "high": value.high, "p_met": p, "p_unmet": other, "n": score.n, "seeds": len(ours)}
    return _Claim(row, score, p, other, told, numbers)


def _claim_of_means(row: Row, teacher: Row, score: TaskScore, margin: float, rules: Rules) -> _Claim:
    """Test the claim on items that carry numbers; of a figure that is better when lower, at most 1 / margin of the teacher's."""
    ours, theirs, _ = paired_numbers(row, teacher, score.task)
    p, other = tests_of(score).keeps(ours, theirs, margin, score.parts, points=rules.points, lower=score.lower_is_better)
    value = compare(row, teacher, score.task, ratio=not rules.points)
    told = f"{_shown(value, points=rules.points)} on {score.n:,} items; must show that it {rules.claim()}"
    if score.lower_is_better and not rules.points:
        ends = "" if value.low is None or value.high is None else f" [{value.low:.3f}, {value.high:.3f}]"
        told = f"{score.metric or score.primary} x{value.value:.3f}{ends} of the teacher's on {score.n:,} items; at most x{1 / margin:.3f}"
    numbers: dict[str, float | int | None] = {
        "value": value.value, "low": value.low, "high": value.high, "p_met": p, "p_unmet": other, "n": score.n, "seeds": len(ours),
    }  # fmt: skip
    return _Claim(row, score, p, other, told, numbers)


def _shown(value: stats.Interval, *, points: bool) -> str:
    if value.value is None:
        return value.reason or "undefined"
    word, form = ("difference", "+.1f") if points else ("retention", ".1f")
    unit = " points" if points else " %"
    text = f"{word} {100 * value.value:{form}}{unit}"
    return text if value.low is None or value.high is None else f"{text} [{100 * value.low:{form}}, {100 * value.high:{form}}]"
