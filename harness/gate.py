"""The check behind `harness check`: does every row keep what it claims, and what it once had? Pure, from records and a baseline. No torch.

Three layers, each with its own preconditions. *Identity*: a row whose answers are the frozen ones to the last is done. *Claim*: a row
keeps at least the margin of its teacher's score on the same items (non-inferiority). *Frozen*: a row has lost no more items than it won
against its own frozen outcomes (exact one-sided McNemar), or less than the tolerance. P values are adjusted by Holm over all rows and
tasks of a layer. A row that nothing judged is never a pass. Bytes are compared exactly; speed only by ratios of two models timed by
turns in one job, never by stored seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from harness import stats
from harness.errors import HarnessError
from harness.groups import (
    TEACHER,
    Group,
    Row,
    Values,
    compare,
    conditions_of,
    group,
    of_documents,
    paired,
    paired_numbers,
    tests_of,
    times_of,
    values_of,
)
from harness.record import Measurement, RunRecord, TaskScore
from harness.store import twice

if TYPE_CHECKING:
    from harness.baseline import Baseline, FrozenRow, FrozenScore


class Verdict(StrEnum):
    """What a check can say. `cannot tell`: these items are too few; `not comparable`: it would compare unlike things."""

    passed = "passed"
    cannot_tell = "cannot tell"
    not_comparable = "not comparable"
    regressed = "regressed"


EXIT = {Verdict.passed: 0, Verdict.regressed: 1, Verdict.cannot_tell: 3, Verdict.not_comparable: 4}
_GRAVEST = (Verdict.regressed, Verdict.not_comparable, Verdict.cannot_tell, Verdict.passed)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is asked of every row. Shares are of 1; points are shares of the items."""

    margin: float | None = None  # of the teacher's score that must be kept; with `points`: what may be lost; None: no claim
    points: bool = False
    alpha: float = 0.05  # of the claim layer, one-sided
    frozen_alpha: float = 0.01  # of the frozen layer, one-sided
    tolerance: float = 0.02  # a smaller drop against the frozen outcomes is said, but is no regression
    detect: float = 0.05  # a drop that the frozen layer must be able to see (power .8), else it cannot tell
    invalid: float = 0.02  # rise of the share of unreadable answers from which scores are not comparable
    length: tuple[float, float] = (0.9, 1.1)  # tokens of an answer over the frozen ones: MLPerf's band
    perplexity: float = 0.02  # rise of a perplexity over the frozen one that is tolerated
    faster: float | None = None  # decode speed over the teacher's, timed by turns, that must be reached
    slower: float = 1.05  # slowdown against a model timed beside it (`--measured`) from which it is a regression
    exact: bool = False  # any flipped item is a regression, where machine and versions are the frozen ones
    rows: tuple[str, ...] = ()  # judge these rows alone; empty: every row that is no control

    def claim(self) -> str:
        """Say the margin in words."""
        if self.margin is None:
            return "no margin"
        return f"loses less than {100 * self.margin:g} points" if self.points else f"keeps {100 * self.margin:g} %"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked, and what came of it."""

    layer: str  # row, claim, frozen, bytes, speed
    row: str
    task: str = ""
    verdict: Verdict
    told: str  # one line for people
    differs: str = ""  # not comparable: which condition
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    warning: bool = False  # passed, with something to be known
    items: tuple[int, ...] = ()  # that were lost, counted in item order

    @property
    def name(self) -> str:
        """Name the thing checked: what a test or an annotation is called."""
        return f"{self.row}{f' {self.task}' if self.task else ''} [{self.layer}]"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Everything that a check found."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    rules: Rules

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict; without any finding nothing was shown, so it cannot tell."""
        found = {one.verdict for one in self.findings}
        return next((one for one in _GRAVEST if one in found), Verdict.cannot_tell)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 regressed, 3 cannot tell, 4 not comparable."""
        return EXIT[self.verdict]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON-serialisable values."""
        return {
            "schema": 1, "verdict": self.verdict.value, "exit_code": self.exit_code, "rules": asdict(self.rules), "notes": self.notes,
            "findings": [{**asdict(one), "verdict": one.verdict.value} for one in self.findings],
        }  # fmt: skip


def check(
    records: Sequence[RunRecord], rules: Rules, baseline: "Baseline | None" = None, *,
    measured: Sequence[tuple[str, Sequence[Measurement]]] = (),
) -> Checked:  # fmt: skip
    """Check one run's records by the rules, against a baseline where one is given; `measured`: speed ratios of models timed in one job.

    Raises `HarnessError` where a row and seed has two records: which of them is judged would be a matter of chance.
    """
    if double := twice(records):
        raise HarnessError(f"two records of {double}: a check judges one run; name its file")
    notes: list[str] = []
    groups = group(records)
    findings = [one for record in records if _judged(record, rules) for one in _broken(record, rules, baseline, notes)]
    if rules.margin is not None:
        findings += _claims(groups, records, rules)
    if baseline is not None:
        findings += _frozen(records, baseline, rules)
    if rules.faster is not None:
        findings += [one for found in groups for one in _speed(found, rules, rules.faster)]
    findings += [one for name, found in measured for one in _beside(name, found, rules)]
    findings += [
        _unlike("row", row, "", "rows", f"no record of the row {row}") for row in rules.rows if row not in {one.label for one in records}
    ]
    findings += _unjudged(records, findings, rules, baseline)
    if baseline is not None and (
        new := dict.fromkeys(one.label for one in records if one.label not in baseline.labels and not one.is_control)
    ):
        notes.append(f"not in the baseline: {', '.join(new)} (freeze them: harness baseline update)")
    if any(record.limited and _judged(record, rules) for record in records):
        notes.append("a trial: these rows were scored on a sample of the items (--limit)")
    distinct = {(one.layer, one.row, one.task, one.told): one for one in findings}
    return Checked(findings=tuple(distinct.values()), notes=tuple(dict.fromkeys(notes)), rules=rules)


def _judged(record: RunRecord, rules: Rules) -> bool:
    return record.label in rules.rows if rules.rows else record.method != TEACHER and not record.is_control


def _unlike(layer: str, row: str, task: str, what: str, told: str) -> Finding:
    return Finding(layer=layer, row=row, task=task, verdict=Verdict.not_comparable, differs=what, told=told)


def _broken(record: RunRecord, rules: Rules, baseline: "Baseline | None", notes: list[str]) -> list[Finding]:
    """A row that failed is not comparable: a check never passes over it. A skipped one where it was named or frozen."""
    if record.status == "failed":
        return [_unlike("row", record.label, "", "status", f"failed: {record.reason}")]
    if record.status == "skipped" and (record.label in rules.rows or (baseline is not None and record.label in baseline.labels)):
        return [_unlike("row", record.label, "", "status", f"skipped: {record.reason}")]
    if record.status == "skipped":
        notes.append(f"{record.label} was skipped: {record.reason}")
    return []


def _unjudged(records: Sequence[RunRecord], findings: Sequence[Finding], rules: Rules, baseline: "Baseline | None") -> list[Finding]:
    """Say of every row and seed that neither its claim nor its frozen items judged that nothing is known of it."""
    claimed = {one.row for one in findings if one.layer == "claim"}
    told = {one.row for one in findings if one.layer in ("row", "frozen")}
    known = {(row.label, row.seed) for row in baseline.rows} if baseline is not None else set()
    found = []
    for record in records:
        named = f"{record.label}{f' (seed {record.seed})' if record.seed is not None else ''}"
        judged = record.label in claimed or (record.label in told and (record.label, record.seed) in known) or record.status != "success"
        if not judged and _judged(record, rules) and (baseline is not None or rules.faster is None):
            why = f"{named} is not in the baseline and there is no --margin: nothing says what it must keep"
            found.append(Finding(layer="row", row=record.label, verdict=Verdict.cannot_tell, told=why))
    return found


@dataclass(frozen=True)
class _Claim:
    """A row and a task whose claim is tested: p of "it does not keep the margin", p of "it does"."""

    row: Row
    score: TaskScore
    unmet_if_large: float
    met_if_large: float
    told: str
    numbers: dict[str, float | int | None]


def _claims(groups: Sequence[Group], records: Sequence[RunRecord], rules: Rules) -> list[Finding]:
    """Judge every row and task against the teacher's outcomes on the same items; Holm over all of them."""
    found: list[Finding] = []
    tested: dict[tuple[str, str], _Claim] = {}
    stats.prepare(run for one in groups for row in one.rows for score in row.first.scores for run in row.outcomes(score.task))
    for one in groups:
        for row in one.rows:
            if not _judged(row.first, rules) or not row.done or row.first.method == TEACHER:
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
        return _unlike("claim", row.label, score.task, *_apart(row.done[0], records))
    theirs = teacher.scores(score.task)[0]
    if any(each.items_digest != theirs.items_digest for each in row.scores(score.task)):
        return _unlike("claim", row.label, score.task, "items", "scored on other items than the teacher")
    why = theirs.unpaired or next((each.unpaired for each in row.scores(score.task) if each.unpaired), "")
    if why:
        pass
    elif score.kind == "perplexity":
        ratio = times_of(row, teacher, score.task)
        why = "perplexities have no points; give a ratio" if rules.points else ratio.reason
        why = why or ("one document gives no interval" if ratio.low is None else "")
    elif not theirs.hit_or_miss or not score.hit_or_miss:
        ratio = compare(row, teacher, score.task, ratio=True)
        number = rules.points and score.unit == "number" and not score.signed
        why = f"{score.metric or score.primary} is no share and has no points; give a ratio" if number else ""
        why = why or ("" if rules.points else f"{ratio.reason}; give --margin 2points" if score.signed else ratio.reason)
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
    return name, f"{name} differs: {_short(conditions_of(teachers[nearest]).get(name))} of the teacher, {_short(own.get(name))} of the row"


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
    ours, theirs = paired_numbers(row, teacher, score.task)
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


@dataclass(frozen=True)
class _Pair:
    """A frozen score and the one that stands against it."""

    row: "FrozenRow"
    then: "FrozenScore"
    record: RunRecord
    now: TaskScore


def _frozen(records: Sequence[RunRecord], baseline: "Baseline", rules: Rules) -> list[Finding]:
    """Judge every frozen row by its own outcomes of then; seeds of a row are judged together, item by item. Controls only when named."""
    found: list[Finding] = []
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    for row in baseline.rows:
        if (row.label not in rules.rows) if rules.rows and row.label != TEACHER else (row.control and row.label not in rules.rows):
            continue
        record = next((one for one in records if (one.label, one.seed) == (row.label, row.seed)), None)
        seed = f" (seed {row.seed})" if row.seed is not None else ""
        if record is None or record.status != "success":
            if record is None or not _judged(record, rules):  # a judged row that failed is told by `_broken`
                told = f"the baseline's row {row.label}{seed} has no record" + (f" that succeeded: {record.reason}" if record else "")
                found.append(_unlike("frozen", row.label, "", "rows" if record is None else "status", told))
            continue
        unlike = _conditions(row, record)
        if unlike:
            found.append(_unlike("frozen", row.label, "", *unlike))
            continue
        found += _bytes(row, record)
        for then in row.scores:
            now = record.score(then.task)
            wrong = _scores_unlike(then, now)
            if wrong or now is None:
                found.append(_unlike("frozen", row.label, then.task, *(wrong or ("items", "missing"))))
            else:
                pairs.setdefault((row.label, then.task), []).append(_Pair(row, then, record, now))
    return found + _regressions(pairs, rules)


def _conditions(row: "FrozenRow", record: RunRecord) -> tuple[str, str] | None:
    """Return the first condition that differs, with both its values; None where the two may be compared."""
    now = row.conditions_of(record)
    for name, then in row.conditions.items():
        if now.get(name) != then:
            return name, f"{name} differs: {_short(then)} in the baseline, {_short(now.get(name))} now"
    return None


def _short(value: object) -> str:
    text = str(value) if value not in (None, "") else "none"
    return text if len(text) <= 48 else f"{text[:12]}..{text[-12:]}" if " " not in text else f"{text[:45]}..."


def _scores_unlike(then: "FrozenScore", now: TaskScore | None) -> tuple[str, str] | None:
    if now is None:
        return "tasks", f"{then.task} was not scored"
    if now.version != then.version:
        return "task version", f"{then.task}@{then.version} in the baseline, @{now.version} now"
    if now.n != then.n:
        return "n", f"{then.n:,} items in the baseline, {now.n:,} now"
    if now.items_digest != then.items_digest:
        return "items", "other items, prompts or targets than in the baseline"
    if now.primary != then.primary:
        return "extractor", f"scored by {then.primary} in the baseline, by {now.primary} now"
    return None


def _regressions(pairs: Mapping[tuple[str, str], Sequence[_Pair]], rules: Rules) -> list[Finding]:
    """Judge what changed: Holm over rows and tasks together, perplexities among them."""
    found: list[Finding] = []
    tested: list[tuple[str, str, Sequence[_Pair], float]] = []
    for (label, task), alike in pairs.items():
        n = alike[0].then.n
        if all(one.now.answers_digest == one.then.answers_digest for one in alike):
            numbers: dict[str, float | int | None] = {"n": n, "lost": 0, "won": 0, "drop": 0.0}
            told = f"not one of {n:,} answers differs"
            found.append(Finding(layer="frozen", row=label, task=task, verdict=Verdict.passed, told=told, numbers=numbers))
        elif why := alike[0].now.unpaired or alike[0].then.unpaired:
            told = f"{alike[0].then.value:.4g} -> {alike[0].now.value:.4g}; {why}"
            found.append(Finding(layer="frozen", row=label, task=task, verdict=Verdict.cannot_tell, told=told))
        elif alike[0].now.kind == "perplexity":
            now, then = _documents(alike)
            p = stats.ratio_keeps(of_documents(now, then, alike[0].now), 1 + rules.perplexity)[1]
            tested.append((label, task, alike, p))
        elif not _hits(alike):
            before, after = _numbers(alike)
            lower = alike[0].now.lower_is_better
            tested.append((label, task, alike, tests_of(alike[0].now).worse(after, before, alike[0].now.parts, lower=lower)))
        else:
            tested.append((label, task, alike, stats.net_loss(*_runs(alike))[1]))
    adjusted = stats.holm([p for *_, p in tested])
    for (label, task, alike, _), p in zip(tested, adjusted, strict=True):
        judge = _against_frozen if _hits(alike) else _means_against_frozen
        judge = _perplexity_against_frozen if alike[0].now.kind == "perplexity" else judge
        found.append(judge(label, task, alike, p, len(tested), rules))
    return found


def _hits(alike: Sequence[_Pair]) -> bool:
    return all(one.now.hit_or_miss and one.then.packed and not one.then.parts for one in alike)


def _numbers(alike: Sequence[_Pair]) -> tuple[list[Values], list[Values]]:
    """Return the items' numbers of then and now, or what they add to the figure, run by run."""
    return [values_of(one.then) for one in alike], [values_of(one.now) for one in alike]


def _means_against_frozen(label: str, task: str, alike: Sequence[_Pair], p: float, tests: int, rules: Rules) -> Finding:
    """Judge items that carry numbers: tolerance and detectable drop are shares of 1, or of the frozen figure where it is no share."""
    before, after = _numbers(alike)
    score, n = alike[0].now, alike[0].now.n
    figures = [fmean(tests_of(score).weighted(run, score.parts) for run in side) for side in (before, after)]
    drop = (figures[0] - figures[1]) * (-1 if score.lower_is_better else 1)
    unit = 1.0 if score.unit == "share" or score.signed else abs(figures[0])
    error = tests_of(score).error_of_difference(after, before, score.parts)
    reach = (NormalDist().inv_cdf(1 - rules.frozen_alpha / tests) + NormalDist().inv_cdf(0.8)) * error
    sign = -1 if score.lower_is_better else 1
    pairs = [] if score.form else [(one.now.numbers, one.then.numbers) for one in alike]  # of a figure of all items no single one is worse
    items = tuple(at for at in range(n) if sign * sum(now[at] - then[at] for now, then in pairs) < 0)
    worse = f"{len(items)} of {n:,} items worse" if not score.form else f"{n:,} items"
    told = f"{score.shown(figures[0])} -> {score.shown(figures[1])}, {worse}, p {p:.2g}"
    numbers: dict[str, float | int | None] = {"n": n, "seeds": len(after), "lost": len(items), "drop": drop, "p_holm": p, "reach": reach}

    def said(verdict: Verdict, told: str, *, differs: str = "", warning: bool = False) -> Finding:
        return Finding(layer="frozen", row=label, task=task, verdict=verdict, told=told, differs=differs, numbers=numbers, warning=warning,
                       items=items)  # fmt: skip

    if rules.exact and before != after and all(each.row.machine == each.row.machine_of(each.record) for each in alike):
        return said(Verdict.regressed, f"{told}; --exact: no item may change on the same machine and versions")
    significant = p < rules.frozen_alpha
    if significant and drop > rules.tolerance * unit:
        return said(Verdict.regressed, told)
    if unlike := _drifted(alike, rules):
        return said(Verdict.not_comparable, f"{told}; {unlike[1]}", differs=unlike[0])
    if reach > rules.detect * unit:
        asked = score.shown(rules.detect * unit)
        return said(Verdict.cannot_tell, f"{told}; {n:,} items show drops from {score.shown(reach)} on, not from {asked}")
    return said(Verdict.passed, f"{told}; significant, but within the tolerance" if significant else told, warning=significant)


def _runs(alike: Sequence[_Pair]) -> tuple[list[str], list[str]]:
    """Return the outcomes of then and now, run by run."""
    return [one.then.outcomes for one in alike], [one.now.outcomes[one.now.primary] for one in alike]


def _documents(alike: Sequence[_Pair]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the documents of now and then, means over the seeds."""
    sides = [[one.now.totals for one in alike], [one.then.totals for one in alike]]
    now, then = ([(fmean(one[0] for one in document), document[0][1]) for document in zip(*side, strict=True)] for side in sides)
    return now, then


def _perplexity_against_frozen(label: str, task: str, alike: Sequence[_Pair], p: float, tests: int, rules: Rules) -> Finding:
    now, then = _documents(alike)
    found, limit = of_documents(now, then, alike[0].now), 1 + rules.perplexity
    if found.value is None or found.low is None or found.high is None:
        return Finding(
            layer="frozen", row=label, task=task, verdict=Verdict.cannot_tell, told=found.reason or "one document gives no interval"
        )
    fine = stats.ratio_keeps(found, limit)[0]
    verdict = Verdict.regressed if p < rules.frozen_alpha else Verdict.passed if fine * tests <= rules.alpha else Verdict.cannot_tell
    told = (
        f"perplexity x{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] of the frozen one on {len(now)} documents; at most x{limit:.3f}"
    )
    numbers: dict[str, float | int | None] = {"value": found.value, "low": found.low, "high": found.high, "n": len(now), "p_holm": p}
    if verdict is Verdict.cannot_tell:
        numbers["needed"] = stats.items_to_decide(fine, len(now), alpha=rules.alpha / tests)
        told += f"; about {numbers['needed']:,} documents would decide" if numbers["needed"] else "; it stands at the limit"
    return Finding(layer="frozen", row=label, task=task, verdict=verdict, told=told, numbers=numbers)


def _against_frozen(label: str, task: str, alike: Sequence[_Pair], p: float, tests: int, rules: Rules) -> Finding:
    then, now = _runs(alike)
    n, seeds = len(now[0]), len(now)
    net, _ = stats.net_loss(then, now)
    lost, won = tuple(at for at, one in enumerate(net) if one < 0), sum(one > 0 for one in net)
    right = [(sum(run.count("1") for run in side)) for side in (then, now)]
    drop, flips = (right[0] - right[1]) / (n * seeds), sum(one * one for one in net) / (n * seeds**2)
    needed = stats.items_for(flips, rules.detect, alpha=rules.frozen_alpha / tests)
    numbers: dict[str, float | int | None] = {
        "n": n, "seeds": seeds, "lost": len(lost), "won": won, "drop": drop, "p_holm": p, "flips": flips, "needed": needed,
    }  # fmt: skip
    net_over = f" (net over {seeds} seeds)" if seeds > 1 else ""
    shown = [f"{100 * one / (n * seeds):.1f} %" for one in right]
    told = f"{shown[0]} -> {shown[1]}, {len(lost)} lost and {won} won of {n:,}{net_over}, p {p:.2g}"

    def said(verdict: Verdict, told: str, *, differs: str = "", warning: bool = False) -> Finding:
        return Finding(
            layer="frozen", row=label, task=task, verdict=verdict, told=told, differs=differs, numbers=numbers, warning=warning, items=lost
        )

    if rules.exact and then != now and all(each.row.machine == each.row.machine_of(each.record) for each in alike):
        return said(Verdict.regressed, f"{told}; --exact: no item may flip on the same machine and versions")
    significant = p < rules.frozen_alpha
    anew = any(one.row.trains and one.record.student and one.record.student.digest != one.row.student_digest for one in alike)
    if significant and drop > rules.tolerance:
        if not anew:
            return said(Verdict.regressed, told)
        if seeds == 1:
            return said(Verdict.regressed, f"{told}; trained anew: one seed may be an unlucky training, freeze three")
        if stats.mean_below([a.count("1") - b.count("1") for a, b in zip(now, then, strict=True)]) < rules.alpha:
            return said(Verdict.regressed, told)
        return said(Verdict.cannot_tell, f"{told}; trained anew, and the {seeds} seeds do not agree; more would decide")
    unlike = _drifted(alike, rules)
    if unlike:
        return said(Verdict.not_comparable, f"{told}; {unlike[1]}", differs=unlike[0])
    if needed > n:
        told += f"; {n:,} items cannot show a drop of {100 * rules.detect:g} points at {100 * flips:.1f} % flips, {needed:,} would"
        return said(Verdict.cannot_tell, told)
    if drop > rules.detect:
        return said(Verdict.cannot_tell, f"{told}; a drop of more than {100 * rules.detect:g} points that the flips both ways hide")
    if significant:
        told += f"; significant, but within the tolerance of {100 * rules.tolerance:g} points"
    return said(Verdict.passed, told, warning=significant)


def _drifted(alike: Sequence[_Pair], rules: Rules) -> tuple[str, str] | None:
    """Tell whether the form of the answers changed so much that scores stand for something else."""
    for one in alike:
        rise = one.now.invalid_share - one.then.invalid_share
        if rise > rules.invalid:
            return "invalid share", f"{100 * rise:.1f} points more answers than before cannot be read"
        cut = (one.now.truncated_share or 0.0) - (one.then.truncated_share or 0.0)
        if cut > rules.invalid:
            return "truncated share", f"{100 * cut:.1f} points more answers than before run into the longest length"
        if one.then.tokens and one.now.tokens_per_answer:
            ratio = one.now.tokens_per_answer / one.then.tokens
            if not rules.length[0] <= ratio <= rules.length[1]:
                return "answer length", f"answers have {ratio:.2f} times the tokens of then (MLPerf's band: 0.9 to 1.1)"
    return None


def _bytes(row: "FrozenRow", record: RunRecord) -> list[Finding]:
    """Compare weight bytes exactly: fewer are said, more are a regression."""
    now = record.student.weight_bytes if record.student else None
    if row.weight_bytes is None or now is None:
        return []
    told = f"{now:,} bytes of weights" + ("" if now == row.weight_bytes else f", {row.weight_bytes:,} in the baseline")
    verdict = Verdict.regressed if now > row.weight_bytes else Verdict.passed
    numbers: dict[str, float | int | None] = {"bytes": now, "before": row.weight_bytes}
    return [Finding(layer="bytes", row=row.label, verdict=verdict, told=told, numbers=numbers, warning=now < row.weight_bytes)]


def _speed(found: Group, rules: Rules, least: float) -> list[Finding]:
    """Judge decode speed over the teacher's, timed by turns with it in one job, in every scenario."""
    told = []
    for row in found.rows:
        if not _judged(row.first, rules) or not row.done:
            continue
        every = [one for record in row.done for one in record.measurements if one.name == "decode_speedup"]
        if not every:
            told.append(_unlike("speed", row.label, "", "timing", "was not timed beside its teacher (--grid none?)"))
        for condition in dict.fromkeys(one.condition for one in every):
            ratios = [one for one in every if one.condition == condition]
            value = stats.Interval(ratios[0].value, ratios[0].low, ratios[0].high)
            if len(ratios) > 1:
                value = stats.ratio_of_rounds([one.value for one in ratios])
            told.append(_ratio_finding(row.label, condition, value, least))
    return told


def _ratio_finding(label: str, condition: str, value: stats.Interval, least: float) -> Finding:
    assert value.value is not None
    low, high = value.low, value.high
    numbers: dict[str, float | int | None] = {"value": value.value, "low": low, "high": high}
    if low is None or high is None:
        verdict, ends = Verdict.cannot_tell, "no interval (three rounds are the fewest)"
    else:
        verdict = Verdict.passed if low >= least else Verdict.regressed if high < least else Verdict.cannot_tell
        ends = f"[{low:.2f}, {high:.2f}]"
    told = f"decodes {value.value:.2f} times as fast {ends}{f' ({condition})' if condition else ''}; at least {least:g} by turns in one job"
    return Finding(layer="speed", row=label, verdict=verdict, told=told, numbers=numbers)


def _beside(name: str, measurements: Sequence[Measurement], rules: Rules) -> list[Finding]:
    """Judge a model of `harness measure BASE NEW`: regressed where the lower end of the slowdown exceeds what is tolerated."""
    found = []
    for one in [one for one in measurements if one.name == "decode_speedup"]:
        low, high = one.low, one.high
        if low is None or high is None or low <= 0:
            verdict, ends = Verdict.cannot_tell, "no interval"
        else:
            slow, fast = 1 / high, 1 / low
            verdict = Verdict.regressed if slow > rules.slower else Verdict.passed if fast <= rules.slower else Verdict.cannot_tell
            ends = f"[{slow:.3f}, {fast:.3f}]"
        told = f"slowdown {1 / one.value:.3f} {ends} beside the first model ({one.condition}); at most {rules.slower:g}"
        numbers: dict[str, float | int | None] = {"value": one.value, "low": low, "high": high}
        found.append(Finding(layer="speed", row=name, verdict=verdict, told=told, numbers=numbers))
    return found or [_unlike("speed", name, "", "timing", "was not timed beside the first model")]
