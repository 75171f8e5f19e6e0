"""How a baseline moves: with a reason, from whole runs, past no regression that nobody accepted,
however small its steps. No torch.

New records are judged twice by the same rules: against what is frozen, and against the first
accepted value of each score. A row that does not keep what the margin asks is refused, or frozen
with a margin of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from harness.errors import HarnessError
from harness.gate.check import check
from harness.gate.frozen import unlike_conditions, unlike_scores
from harness.gate.frozen_items import margin_of
from harness.gate.rules import Finding, Rules, Verdict
from harness.records.baseline import (
    ITEM_FIELDS,
    Baseline,
    Change,
    FrozenRow,
    FrozenScore,
    Origin,
    freeze_record,
    read_baseline,
    write_baseline,
)
from harness.records.record import TEACHER, RunRecord
from harness.records.store import duplicate_row

# what the claim layer says of a row that does not keep the margin
_UNMET = frozenset({"regressed", "missed"})
_CLAIMS = ("claim", "pooled")  # layers: by task, and over all tasks of a row
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Moved:
    """A baseline that was written, the one before, and what there is to know of the move."""

    made: Baseline
    old: Baseline | None
    notes: tuple[str, ...] = ()


def update(
    path: Path,
    records: Sequence[RunRecord],
    *,
    reason: str,
    rules: Rules,
    rows: Sequence[str] = (),
    accept: bool = False,
    drop: bool = False,
    own_margin: bool = False,
) -> Moved:
    """Freeze records into `path`; with `rows` only these (and the teacher) move.

    Refuses without a reason, from failed, limited or dirty runs, two records of one row and seed,
    two teachers; unless `accept`, from a run that has regressed against what is frozen or what was
    first accepted; unless `own_margin`, one whose rows do not keep the margin; unless `drop`, one
    that lacks frozen rows.
    """
    if not reason.strip():
        raise HarnessError("--reason is empty; say in a few words why the baseline moves")
    wanted = _wanted(records, rows)
    old = read_baseline(path) if path.exists() else None
    regressed = regressions(wanted, old, rows)
    if regressed and not accept:
        finding, against = regressed[0]
        raise HarnessError(
            f"{path} does not move: {finding.name} regressed{against} ({finding.told}); mend it, "
            "or accept it with --accept-regression"
        )
    asked = _margin_asked(rules, old)
    if not accept:
        _refuse_falling_seeds(path, wanted, old)
    own, unclear = own_margins(
        path, wanted, replace(asked, rows=tuple(rows)), old, allowed=own_margin
    )
    change = _change(wanted, reason, tuple(dict.fromkeys(finding.name for finding, _ in regressed)))
    accepted = frozenset((finding.row, finding.task) for finding, _ in regressed)
    fresh = {(record.label, record.seed): freeze_record(record) for record in wanted}
    stay = _left(path, old, fresh, moving=bool(rows), drop=drop)
    _of_one_teacher(path, [*stay, *fresh.values()])
    anew = [_since(record, old, change, accepted) for record in wanted]
    frozen = [
        row.model_copy(update={"scores": scores, **_own(own.get(row.label), asked)})
        for row, (scores, _) in zip(fresh.values(), anew, strict=True)
    ]
    started = tuple(dict.fromkeys(line for _, lines in anew for line in lines))
    made = Baseline(
        margin=asked.margin,
        points=asked.points,
        history=(*(old.history if old else ()), change.model_copy(update={"anew": started})),
        rows=tuple(
            sorted(
                [*stay, *frozen], key=lambda row: (row.label != TEACHER, row.label, row.seed or 0)
            )
        ),
    )
    write_baseline(path, made)
    return Moved(
        made,
        old,
        (*(f"the first accepted value starts anew: {line}" for line in started), *unclear),
    )


def _wanted(records: Sequence[RunRecord], rows: Sequence[str]) -> list[RunRecord]:
    """Return the records that move; refuses rows that have none, and what no baseline may be made
    of.
    """
    labels = {record.label for record in records}
    if missing := next((label for label in rows if label not in labels), None):
        raise HarnessError(
            f"no record of the row {missing!r}; there are: {', '.join(sorted(labels))}"
        )
    wanted = [
        record for record in records if not rows or record.label in rows or record.label == TEACHER
    ]
    _fit_to_freeze(wanted)
    return wanted


def _fit_to_freeze(records: Sequence[RunRecord]) -> None:
    """Refuse what no baseline may be made of, naming the first reason."""
    if not any(record.status == "success" and record.method != TEACHER for record in records):
        raise HarnessError(
            "there is no row that succeeded to freeze; type first: harness run --methods ..."
        )
    if double := duplicate_row(records):
        raise HarnessError(
            f"two records of {double}; name one run's file (results/runs/runs/NAME.json) in place "
            "of the store"
        )
    for record in records:
        name = f"{record.label}{f' (seed {record.seed})' if record.seed is not None else ''}"
        if record.status != "success":
            told = f"{name} {record.status}: {record.reason}"
            raise HarnessError(
                f"{told}; a baseline is made of whole runs: mend it, or name others with --rows"
            )
        if record.conditions.limited:
            raise HarnessError(
                f"{name} was scored on a sample of the items; run it again without --limit before "
                "you freeze it"
            )
        if record.environment and record.environment.dirty:
            raise HarnessError(
                f"{name} was made from a working tree with changes; commit them and run again: its "
                "code must be found"
            )
    teachers = {
        " ".join(teacher.digest for teacher in record.conditions.teachers) for record in records
    }
    if len(teachers) > 1:
        raise HarnessError(
            f"the records have {len(teachers)} different teachers; a baseline has one: name one "
            "run's file"
        )


def regressions(
    records: Sequence[RunRecord], old: Baseline | None, rows: Sequence[str] = ()
) -> list[tuple[Finding, str]]:
    """Return what regressed, against what is frozen and, where that shows nothing, against the
    first accepted values; with what is said.
    """
    if old is None:
        return []
    rules = Rules(rows=tuple(rows))
    now = [
        finding
        for finding in check(records, rules, old).findings
        if finding.verdict is Verdict.regressed
    ]
    known = {(finding.row, finding.task) for finding in now}
    first = [
        finding
        for finding in check(records, rules, old.first).findings
        if finding.verdict is Verdict.regressed
        and finding.layer == "frozen"
        and (finding.row, finding.task) not in known
    ]
    return [(finding, "") for finding in now] + [
        (finding, f" against its first accepted value{_dated(old, finding)}") for finding in first
    ]


def _refuse_falling_seeds(path: Path, records: Sequence[RunRecord], old: Baseline | None) -> None:
    """Refuse seeds that take the place of others and score less than the row's first accepted
    values, by more than the tolerance.

    Items of other trainings are not paired with the frozen ones, so the check finds no record of
    theirs: this is seen by the means.
    """
    tolerance = Rules().tolerance
    for label, frozen in _frozen_by_row(old).items():
        fresh = [record for record in records if record.label == label]
        if not fresh or {record.seed for record in fresh} & {row.seed for row in frozen}:
            continue
        for score in frozen[0].scores:
            then = [known for row in frozen for known in row.scores if known.task == score.task]
            now = [
                found
                for record in fresh
                if (found := record.score(score.task)) and found.items_digest == score.items_digest
            ]
            if not now:
                continue
            first, fell = fmean(one.first.value for one in then), fmean(one.value for one in now)
            lower = now[0].lower_is_better
            allowed = tolerance * (
                1.0 if score.unit == "share" and score.kind != "perplexity" else abs(first)
            )
            if (fell - first if lower else first - fell) > allowed:
                raise HarnessError(
                    f"{path} does not move: {label} {score.task}, other seeds than frozen, went "
                    f"from {score.shown(first)} (first accepted) "
                    f"to {score.shown(fell)}; mend it, or accept it with --accept-regression"
                )


def _frozen_by_row(old: Baseline | None) -> dict[str, list[FrozenRow]]:
    """Return the frozen rows that a draw made, by label."""
    rows: dict[str, list[FrozenRow]] = {}
    for row in old.rows if old else ():
        if row.seed is not None:
            rows.setdefault(row.label, []).append(row)
    return rows


def _dated(old: Baseline, finding: Finding) -> str:
    """Say since when a first accepted value stands."""
    scores = [
        score
        for row in old.rows
        if row.label == finding.row
        for score in row.scores
        if score.task == finding.task
    ]
    origin = next((score.origin for score in scores if score.origin), None)
    return f" of {origin.date[:10]}, {origin.reason!r}" if origin else ""


def _margin_asked(rules: Rules, old: Baseline | None) -> Rules:
    """Return the margin that is given, else the old baseline's."""
    if rules.margin is not None or old is None:
        return Rules(margin=rules.margin, points=rules.points)
    return Rules(margin=old.margin, points=old.points)


def own_margins(
    path: Path, records: Sequence[RunRecord], rules: Rules, old: Baseline | None, *, allowed: bool
) -> tuple[dict[str, float], list[str]]:
    """Return the margins of rows that are held to one of their own, and notes on rows whose items
    cannot tell.

    A row that does not keep what all are asked is refused, unless `allowed` or it keeps a margin of
    its own that was accepted before.
    """
    if rules.margin is None:
        return {}, []
    claims: dict[str, list[Finding]] = {}
    for finding in check(records, rules).findings:
        if finding.layer in _CLAIMS:
            claims.setdefault(finding.row, []).append(finding)
    short = {
        label: next(one for one in findings if one.verdict.value in _UNMET)
        for label, findings in claims.items()
        if any(one.verdict.value in _UNMET for one in findings)
    }
    met = {
        label
        for label, findings in claims.items()
        if all(one.verdict is Verdict.passed for one in findings)
    }
    before = {
        label: kept
        for label in claims
        if label not in met and (kept := _kept_before(records, label, rules, old)) is not None
    }
    refused = {
        label: finding for label, finding in short.items() if label not in before and not allowed
    }
    if refused:
        raise HarnessError(
            _refusal(path, refused, rules, [name for name in claims if name not in refused], old)
        )
    weak = (
        [
            label
            for label, findings in claims.items()
            if label not in met and any(_is_tested(one) for one in findings)
        ]
        if allowed
        else []
    )
    own = {label: _what_it_keeps(records, claims[label], rules) for label in weak} | before
    unclear = [
        finding
        for label, findings in claims.items()
        if label not in own
        for finding in findings
        if finding.layer == "claim"
        and finding.verdict in (Verdict.cannot_tell, Verdict.not_comparable)
    ]
    return own, [
        f"{one.row} {one.task}: whether it {rules.claim()} is not known ({one.told})"
        for one in unclear
    ]


def _kept_before(
    records: Sequence[RunRecord], label: str, rules: Rules, old: Baseline | None
) -> float | None:
    """Return a row's own margin of the old baseline, in the same form, where these records do not
    fall short of it.
    """
    asked = margin_of(old, label, replace(rules, margin=None))
    if asked.margin is None or asked.points != rules.points:
        return None
    findings = check(records, replace(asked, rows=(label,))).findings
    return (
        None
        if any(one.layer in _CLAIMS and one.verdict.value in _UNMET for one in findings)
        else asked.margin
    )


def _refusal(
    path: Path,
    refused: Mapping[str, Finding],
    rules: Rules,
    others: Sequence[str],
    old: Baseline | None,
) -> str:
    """Say which row does not keep the margin, and the two ways out."""
    label, finding = next(iter(refused.items()))
    asked = margin_of(old, label, rules)
    margin = f"{rules.margin:g}{' of the items' if rules.points else ''}" + (
        "" if asked is rules else f", nor its own of {asked.margin:g}"
    )
    leave = f"leave it out (--rows {','.join(others)})" if others else "leave it out with --rows"
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return (
        f"{path} does not move: {finding.name.rpartition(' [')[0]}{more} does not keep the margin "
        f"of {margin} ({finding.told}); "
        f"{leave}, or freeze it with what it keeps (--own-margin)"
    )


def _is_tested(finding: Finding) -> bool:
    """Tell whether a claim has an interval, from which a margin can be read."""
    return isinstance(finding.numbers.get("low"), float)


def _what_it_keeps(
    records: Sequence[RunRecord], findings: Sequence[Finding], rules: Rules
) -> float:
    """Return a row's own margin in whole per cents: the most that a check of these very records
    shows it to keep (points: the least lost).

    From the lower end of its interval it goes down until the claim holds among all tests of the
    check (Holm's largest factor).
    """
    label = findings[0].row
    tested = [finding for finding in findings if _is_tested(finding)]
    kept = [_kept(records, finding, rules) for finding in tested]
    percent = (
        math.ceil(100 * -min(kept) - 1e-9) if rules.points else math.floor(100 * min(kept) + 1e-9)
    )
    percent = max(1, percent) if rules.points else min(99, percent)
    while 0 < percent < 100 and not _shown_to_keep(
        records, tested, replace(rules, margin=percent / 100)
    ):
        percent += 1 if rules.points else -1
    margin = percent / 100
    if not 0 < margin < 1:
        raise HarnessError(
            f"{label} keeps nothing that could be asked of it ({findings[0].told}); leave it out "
            "with --rows"
        )
    return margin


def _shown_to_keep(records: Sequence[RunRecord], findings: Sequence[Finding], rules: Rules) -> bool:
    """Tell whether a check of these records would pass a row at this margin, whatever its other
    tests say.
    """
    tests = max(int(finding.numbers.get("tests") or 1) for finding in findings)
    alone = check(
        records, replace(rules, rows=(findings[0].row,), alpha=rules.alpha / tests)
    ).findings
    return all(
        one.verdict is Verdict.passed for one in alone if one.layer in _CLAIMS and _is_tested(one)
    )


def _kept(records: Sequence[RunRecord], finding: Finding, rules: Rules) -> float:
    """Return the lower end of what a row keeps on a task: of a figure that is better when lower,
    one over its upper end.
    """
    low, high = finding.numbers["low"], finding.numbers["high"]
    assert low is not None and high is not None
    scores = [
        score
        for record in records
        if record.label == finding.row and (score := record.score(finding.task))
    ]
    lower = any(score.lower_is_better for score in scores)  # what is pooled is better when higher
    if rules.points:
        return -high if lower else low
    return 1 / high if lower and high > 0 else low


def _own(margin: float | None, rules: Rules) -> dict[str, object]:
    return {} if margin is None else {"margin": margin, "points": rules.points}


def _change(records: Sequence[RunRecord], reason: str, accepted: tuple[str, ...]) -> Change:
    """Return the line of the history."""
    environment = next((record.environment for record in records if record.environment), None)
    return Change(
        reason=reason.strip(),
        date=max(record.created for record in records),
        commit=environment.commit if environment else None,
        rows=tuple(dict.fromkeys(record.label for record in records)),
        accepted=accepted,
    )


def _left(
    path: Path, old: Baseline | None, fresh: Mapping[Key, FrozenRow], *, moving: bool, drop: bool
) -> list[FrozenRow]:
    """Return the frozen rows that stay as they are: those that do not move with `--rows`; else none
    may be lacking, unless dropped.
    """
    left = [row for row in (old.rows if old else ()) if (row.label, row.seed) not in fresh]
    if left and not moving and not drop:
        raise HarnessError(
            f"{path} holds {left[0].label}, of which there is no record here; move single rows "
            "with --rows, or drop it with --drop"
        )
    return left if moving else []


def _of_one_teacher(path: Path, rows: Sequence[FrozenRow]) -> None:
    if len({row.conditions["teacher"] for row in rows}) > 1:
        raise HarnessError(
            f"{path}: its other rows have another teacher than these records; freeze all rows of "
            "the new teacher together"
        )


def _since(
    record: RunRecord, old: Baseline | None, change: Change, accepted: frozenset[tuple[str, str]]
) -> tuple[tuple[FrozenScore, ...], list[str]]:
    """Return a row's scores with their first accepted values, and which of them start anew."""
    before = next(
        (
            row
            for row in (old.rows if old else ())
            if (row.label, row.seed) == (record.label, record.seed)
        ),
        None,
    )
    if old is None or before is None:
        moved = (
            [f"{record.label} seed {record.seed} (the row was frozen with other seeds)"]
            if record.label in _frozen_by_row(old)
            else []
        )
        return tuple(_first_of_all(score, change) for score in freeze_record(record).scores), moved
    unlike = unlike_conditions(before, record)
    scores, anew = [], []
    for score in freeze_record(record).scores:
        then = next((known for known in before.scores if known.task == score.task), None)
        differs = None if then is None else unlike or unlike_scores(then, record.score(score.task))
        if differs:
            anew.append(f"{record.label} {score.task} ({differs[1]})")
        keeps = then is not None and not differs and (record.label, score.task) not in accepted
        scores.append(
            _held_to(score, then, old.moved(record.label))
            if keeps and then
            else _first_of_all(score, change)
        )
    return tuple(scores), anew


def _first_of_all(score: FrozenScore, change: Change) -> FrozenScore:
    return score.model_copy(
        update={"origin": Origin(value=score.value, date=change.date, reason=change.reason)}
    )


def _held_to(score: FrozenScore, then: FrozenScore, moved: Change) -> FrozenScore:
    """Return a score that is held to what the one before it was held to; the items stand there only
    where they differ from its own.
    """
    first = then.first
    since = then.origin or Origin(value=then.value, date=moved.date, reason=moved.reason)
    items = {name: getattr(first, name) for name in ITEM_FIELDS}
    if all(getattr(score, name) == value for name, value in items.items()):
        items = {name: getattr(Origin(value=0.0, date="", reason=""), name) for name in ITEM_FIELDS}
    return score.model_copy(update={"origin": since.model_copy(update=items)})
