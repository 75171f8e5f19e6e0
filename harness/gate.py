"""The check behind `harness check`: does every row keep what it claims, and what it once had? Pure, from records and a baseline. No torch.

Three layers, each with its own preconditions. *Identity*: a row whose answers are the frozen ones to the last is done. *Claim*: a row
keeps at least the margin of its teacher's score on the same items (non-inferiority). *Frozen*: a row has lost no more items than it won
against its own frozen outcomes (exact one-sided McNemar), or less than the tolerance. P values are adjusted by Holm over all rows and
tasks of a layer. Bytes are compared exactly; speed only by ratios of two models timed by turns in one job, never by stored seconds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from harness import stats
from harness.groups import TEACHER, Group, Row, compare, group, paired
from harness.record import Measurement, RunRecord, TaskScore

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
    measured: Mapping[str, Sequence[Measurement]] | None = None,
) -> Checked:  # fmt: skip
    """Check records by the rules, against a baseline where one is given; `measured`: speed ratios of models timed in one job."""
    findings: list[Finding] = []
    notes: list[str] = []
    groups = group(records)
    judged = [record for record in records if _judged(record, rules)]
    for label in dict.fromkeys(record.label for record in judged):
        findings += _broken(label, [record for record in judged if record.label == label], baseline, notes)
    if rules.margin is not None:
        findings += _claims(groups, rules)
    if baseline is not None:
        findings += _frozen(records, baseline, rules, notes)
    if rules.faster is not None:
        findings += [one for found in groups for one in _speed(found, rules, rules.faster)]
    findings += _beside(measured or {}, rules)
    for row in [row for row in rules.rows if row not in {record.label for record in records}]:
        findings.append(_unlike("row", row, "", "rows", f"no record of the row {row}"))
    return Checked(findings=tuple(findings), notes=tuple(dict.fromkeys(notes)), rules=rules)


def _judged(record: RunRecord, rules: Rules) -> bool:
    return record.label in rules.rows if rules.rows else record.method != TEACHER and not record.is_control


def _unlike(layer: str, row: str, task: str, what: str, told: str) -> Finding:
    return Finding(layer=layer, row=row, task=task, verdict=Verdict.not_comparable, differs=what, told=told)


def _broken(label: str, records: Sequence[RunRecord], baseline: "Baseline | None", notes: list[str]) -> list[Finding]:
    """A row that failed is not comparable: a check never passes over it. A skipped one only where the baseline has it."""
    newest: dict[int | None, RunRecord] = {}
    for record in sorted(records, key=lambda one: (one.status == "success", one.created)):
        newest[record.seed] = record
    found = []
    for record in newest.values():
        if record.status == "failed" or (record.status == "skipped" and baseline is not None and label in baseline.labels):
            found.append(_unlike("row", label, "", "status", f"{record.status}: {record.reason}"))
        elif record.status == "skipped":
            notes.append(f"{label} was skipped: {record.reason}")
    return found


def _claims(groups: Sequence[Group], rules: Rules) -> list[Finding]:
    """Judge every row and task against the teacher's outcomes on the same items; Holm over all of them."""
    asked: list[tuple[Row, Row, TaskScore, list[str], list[str]]] = []
    found: list[Finding] = []
    for one in groups:
        for row in one.rows:
            if not _judged(row.first, rules) or not row.done or row.first.method == TEACHER:
                continue
            for score in row.done[0].scores:
                teacher = one.teacher
                if teacher is None or not teacher.scores(score.task):
                    found.append(_unlike("claim", row.label, score.task, "teacher", "the teacher has no score under these conditions"))
                elif any(each.items_digest != teacher.scores(score.task)[0].items_digest for each in row.scores(score.task)):
                    found.append(_unlike("claim", row.label, score.task, "items", "scored on other items than the teacher"))
                elif score.kind == "perplexity":
                    found.append(_perplexity_claim(row, teacher, score.task, rules))
                elif not any("1" in run for run in teacher.outcomes(score.task)):
                    told = "the teacher solves nothing: there is no retention"
                    found.append(Finding(layer="claim", row=row.label, task=score.task, verdict=Verdict.cannot_tell, told=told))
                else:
                    asked.append((row, teacher, score, *paired(row, teacher, score.task)))
    stats.prepare(run for *_, ours, theirs in asked for run in (*ours, *theirs))
    assert rules.margin is not None
    tests = [stats.keeps(ours, theirs, rules.margin, points=rules.points) for *_, ours, theirs in asked]
    met, unmet = (stats.holm([test[side] for test in tests]) for side in (0, 1))
    for (row, teacher, score, ours, _), test, kept, lost in zip(asked, tests, met, unmet, strict=True):
        value = compare(row, teacher, score.task, ratio=not rules.points)
        verdict = Verdict.passed if kept <= rules.alpha else Verdict.regressed if lost <= rules.alpha else Verdict.cannot_tell
        needed = stats.items_to_decide(test[0], score.n, alpha=rules.alpha / len(asked)) if verdict is Verdict.cannot_tell else None
        told = f"{_shown(value, points=rules.points)} on {score.n:,} items; must show that it {rules.claim()}"
        if verdict is Verdict.cannot_tell:
            told += f"; about {needed:,} items would decide" if needed else "; it stands exactly at the margin"
        numbers = {"value": value.value, "low": value.low, "high": value.high, "p_met": test[0], "p_met_holm": kept, "p_unmet": test[1],
                   "p_unmet_holm": lost, "n": score.n, "seeds": len(ours), "needed": needed}  # fmt: skip
        found.append(Finding(layer="claim", row=row.label, task=score.task, verdict=verdict, told=told, numbers=numbers))
    return found


def _shown(value: stats.Interval, *, points: bool) -> str:
    if value.value is None:
        return value.reason or "undefined"
    word, form = ("difference", "+.1f") if points else ("retention", ".1f")
    unit = " points" if points else " %"
    text = f"{word} {100 * value.value:{form}}{unit}"
    return text if value.low is None or value.high is None else f"{text} [{100 * value.low:{form}}, {100 * value.high:{form}}]"


def _perplexity_claim(row: Row, teacher: Row, task: str, rules: Rules) -> Finding:
    """A perplexity's claim: no more than 1 / margin times the teacher's, by the interval over documents."""
    assert rules.margin is not None
    if rules.points:
        return Finding(
            layer="claim", row=row.label, task=task, verdict=Verdict.cannot_tell, told="a perplexity has no points; give a ratio"
        )
    return _perplexities("claim", row.label, row.scores(task)[0], teacher.scores(task)[0].totals, 1 / rules.margin, "the teacher's")


def _perplexities(layer: str, label: str, score: TaskScore, before: Sequence[tuple[float, float]], limit: float, whose: str) -> Finding:
    found = stats.perplexity_ratio(score.totals, before)
    low, high = found.low, found.high
    if found.value is None or low is None or high is None:
        return Finding(layer=layer, row=label, task=score.task, verdict=Verdict.cannot_tell, told=found.reason or "one document only")
    verdict = Verdict.passed if high <= limit else Verdict.regressed if low > limit else Verdict.cannot_tell
    told = f"perplexity x{found.value:.3f} [{low:.3f}, {high:.3f}] of {whose} on {score.n} documents; at most x{limit:.3f}"
    numbers: dict[str, float | int | None] = {"value": found.value, "low": low, "high": high, "n": score.n}
    if verdict is Verdict.cannot_tell:
        gap, half = abs(math.log(found.value / limit)), math.log(high / low) / 2
        numbers["needed"] = math.ceil(score.n * (half / gap) ** 2) if gap > 1e-6 else None
        told += f"; about {numbers['needed']:,} documents would decide" if numbers["needed"] else "; it stands at the limit"
    return Finding(layer=layer, row=label, task=score.task, verdict=verdict, told=told, numbers=numbers)


@dataclass(frozen=True)
class _Pair:
    """A frozen score and the one that stands against it."""

    row: "FrozenRow"
    then: "FrozenScore"
    record: RunRecord
    now: TaskScore


def _frozen(records: Sequence[RunRecord], baseline: "Baseline", rules: Rules, notes: list[str]) -> list[Finding]:
    """Judge every frozen row by its own outcomes of then; seeds of a row are judged together, item by item."""
    found: list[Finding] = []
    known = {(row.label, row.seed) for row in baseline.rows}
    new = dict.fromkeys(record.label for record in records if record.status == "success" and (record.label, record.seed) not in known)
    if new:
        notes.append(f"not in the baseline: {', '.join(new)} (freeze them: harness baseline update)")
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    for row in baseline.rows:
        if rules.rows and row.label not in rules.rows and row.label != TEACHER:
            continue
        record = _standing_for(row, records)
        if record is None:
            failed = any(one.label == row.label and one.seed == row.seed for one in records)
            if not failed or row.label == TEACHER:  # a failed row that is judged is told by `_broken`
                seed = f" (seed {row.seed})" if row.seed is not None else ""
                found.append(_unlike("frozen", row.label, "", "rows", f"the baseline's row {row.label}{seed} has no record that succeeded"))
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


def _standing_for(row: "FrozenRow", records: Iterable[RunRecord]) -> RunRecord | None:
    """Return the newest record of a frozen row that succeeded, the one made under its conditions first."""
    alike = [one for one in records if (one.label, one.seed) == (row.label, row.seed) and one.status == "success"]
    return max(alike, key=lambda one: (_conditions(row, one) is None, one.created), default=None)


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
    """Judge by exact McNemar over items, Holm over rows and tasks; several seeds: an item counts by its net loss over the seeds."""
    found: list[Finding] = []
    tested: list[tuple[str, str, Sequence[_Pair], tuple[int, ...], int]] = []
    for (label, task), alike in pairs.items():
        if all(one.now.answers_digest == one.then.answers_digest for one in alike):
            numbers: dict[str, float | int | None] = {"n": alike[0].then.n, "lost": 0, "won": 0, "drop": 0.0}
            told = f"not one of {alike[0].then.n:,} answers differs"
            found.append(Finding(layer="frozen", row=label, task=task, verdict=Verdict.passed, told=told, numbers=numbers))
        elif alike[0].now.kind == "perplexity":
            one = alike[0]
            found.append(_perplexities("frozen", label, one.now, one.then.totals, 1 + rules.perplexity, "the frozen one"))
        else:
            lost, won = _net_flips(alike)
            tested.append((label, task, alike, lost, won))
    adjusted = stats.holm([stats.mcnemar(len(lost), won) for *_, lost, won in tested])
    for (label, task, alike, lost, won), p in zip(tested, adjusted, strict=True):
        found.append(_against_frozen(label, task, alike, lost, won, p, len(tested), rules))
    return found


def _net_flips(alike: Sequence[_Pair]) -> tuple[tuple[int, ...], int]:
    """Return the items that were lost over all seeds of a row together, and the number of those won."""
    totals = [0] * alike[0].now.n
    for one in alike:
        for at, (then, now) in enumerate(zip(one.then.outcomes, one.now.outcomes[one.now.primary], strict=True)):
            if then != now:
                totals[at] += 1 if now == "1" else -1
    return tuple(at for at, net in enumerate(totals) if net < 0), sum(net > 0 for net in totals)


def _against_frozen(
    label: str, task: str, alike: Sequence[_Pair], lost: tuple[int, ...], won: int, p: float, tests: int, rules: Rules
) -> Finding:
    n = alike[0].now.n
    answers = n * len(alike)
    then = sum(one.then.outcomes.count("1") for one in alike)
    now = sum(one.now.outcomes[one.now.primary].count("1") for one in alike)
    before, after = then / answers, now / answers
    drop, flips = (then - now) / answers, (len(lost) + won) / n
    needed = stats.items_for(flips, rules.detect, alpha=rules.frozen_alpha / tests)
    numbers: dict[str, float | int | None] = {
        "n": n, "seeds": len(alike), "lost": len(lost), "won": won, "drop": drop, "p_holm": p, "flips": flips, "needed": needed,
    }  # fmt: skip
    seeds = f" (net over {len(alike)} seeds)" if len(alike) > 1 else ""
    told = f"{100 * before:.1f} % -> {100 * after:.1f} %, {len(lost)} lost and {won} won of {n:,}{seeds}, p {p:.2g}"

    def said(verdict: Verdict, told: str, *, differs: str = "", warning: bool = False) -> Finding:
        return Finding(
            layer="frozen", row=label, task=task, verdict=verdict, told=told, differs=differs, numbers=numbers, warning=warning, items=lost
        )

    if rules.exact and lost and all(each.row.machine == each.row.machine_of(each.record) for each in alike):
        return said(Verdict.regressed, f"{told}; --exact: no item may flip on the same machine and versions")
    significant = p < rules.frozen_alpha
    if significant and drop > rules.tolerance:
        return said(Verdict.regressed, told)
    unlike = _drifted(alike, rules)
    if unlike:
        return said(Verdict.not_comparable, f"{told}; {unlike[1]}", differs=unlike[0])
    if needed > n:
        told += f"; {n:,} items cannot show a drop of {100 * rules.detect:g} points at {100 * flips:.1f} % flips, {needed:,} would"
        return said(Verdict.cannot_tell, told)
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
    """Judge decode speed over the teacher's, which was timed by turns with it in one job."""
    told = []
    for row in found.rows:
        if not _judged(row.first, rules) or not row.done:
            continue
        ratios = [one for record in row.done if (one := record.measured("decode_speedup")) is not None]
        if not ratios:
            told.append(_unlike("speed", row.label, "", "timing", "was not timed beside its teacher (--grid none?)"))
            continue
        value = stats.ratio_of_rounds([one.value for one in ratios]) if len(ratios) > 1 else stats.Interval(
            ratios[0].value, ratios[0].low, ratios[0].high
        )  # fmt: skip
        told.append(_ratio_finding(row.label, value, least))
    return told


def _ratio_finding(label: str, value: stats.Interval, least: float) -> Finding:
    assert value.value is not None
    low, high = value.low, value.high
    numbers: dict[str, float | int | None] = {"value": value.value, "low": low, "high": high}
    if low is None or high is None:
        verdict, ends = Verdict.cannot_tell, "no interval (three rounds are the fewest)"
    else:
        verdict = Verdict.passed if low >= least else Verdict.regressed if high < least else Verdict.cannot_tell
        ends = f"[{low:.2f}, {high:.2f}]"
    told = f"decodes {value.value:.2f} times as fast {ends}; at least {least:g} by turns in one job"
    return Finding(layer="speed", row=label, verdict=verdict, told=told, numbers=numbers)


def _beside(measured: Mapping[str, Sequence[Measurement]], rules: Rules) -> list[Finding]:
    """Judge models of `harness measure BASE NEW`: regressed where the lower end of the slowdown exceeds what is tolerated."""
    found = []
    for name, measurements in measured.items():
        for one in measurements:
            if one.name != "decode_speedup":
                continue
            low, high = one.low, one.high
            if low is None or high is None:
                verdict, ends = Verdict.cannot_tell, "no interval"
            else:
                slow, fast = 1 / high, 1 / low
                verdict = Verdict.regressed if slow > rules.slower else Verdict.passed if fast <= rules.slower else Verdict.cannot_tell
                ends = f"[{slow:.3f}, {fast:.3f}]"
            told = f"slowdown {1 / one.value:.3f} {ends} beside the first model ({one.condition}); at most {rules.slower:g}"
            found.append(
                Finding(layer="speed", row=name, verdict=verdict, told=told, numbers={"value": one.value, "low": low, "high": high})
            )
    return found
