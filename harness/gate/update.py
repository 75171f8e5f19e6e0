"""How a baseline moves: with a reason, from whole runs, and past no unaccepted regression.

New records are judged twice by the same rules: against what is frozen, and against the first
accepted value of each score, so that many small steps down are seen too. A row that does not keep
the margin is refused, or frozen with a margin of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from harness.errors import HarnessError
from harness.gate.check import check
from harness.gate.frozen import condition_difference, score_difference
from harness.gate.frozen_items import rules_for_row
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

# the verdicts of the claim layer on a row that does not keep the margin
_UNMET = frozenset({Verdict.regressed, Verdict.missed})
_CLAIMS = ("claim", "pooled")  # layers: by task, and over all tasks of a row
RowKey = tuple[str, int | None]  # a row's label and its seed


@dataclass(frozen=True)
class BaselineUpdate:
    """A baseline that was written, the one before it, and notes for people."""

    baseline: Baseline
    previous: Baseline | None
    notes: tuple[str, ...] = ()


class Regression(NamedTuple):
    """A finding that a row regressed."""

    finding: Finding
    reference: str = ""  # " against its first accepted value ..."; "": against what is frozen


class OwnMargins(NamedTuple):
    """The margins of rows that have one of their own, and notes on rows that cannot be judged."""

    margins: dict[str, float]
    notes: list[str]


class _OriginScores(NamedTuple):
    """A row's scores with their first accepted values, and a line for each that starts anew."""

    scores: tuple[FrozenScore, ...]
    started_anew: list[str]


def update_baseline(
    path: Path,
    records: Sequence[RunRecord],
    *,
    reason: str,
    rules: Rules,
    rows: Sequence[str] = (),
    accept: bool = False,
    drop: bool = False,
    own_margin: bool = False,
) -> BaselineUpdate:
    """Freeze records into the baseline at `path`; with `rows` only these and the teacher move.

    Raises `HarnessError` without a reason, and for records that are failed, limited, from a dirty
    working tree, double, or of two teachers. Other refusals can be lifted: `accept` those of a
    regression against the frozen or the first accepted values, `own_margin` those of rows that do
    not keep the margin, `drop` those of frozen rows without a record.
    """
    if not reason.strip():
        raise HarnessError("--reason is empty; say in a few words why the baseline moves")
    records = _records_to_freeze(records, rows)
    old = read_baseline(path) if path.exists() else None
    regressed = regressions(records, old, rows)
    if not accept:
        _refuse_regressions(path, regressed)
        _refuse_falling_seeds(path, records, old)
    rules = _margin_rules(rules, old)
    row_margins = own_margins(
        path, records, replace(rules, rows=tuple(rows)), old, allowed=own_margin
    )
    change = _history_entry(records, reason, [regression.finding for regression in regressed])
    accepted = frozenset((finding.row, finding.task) for finding, _ in regressed)
    moved_rows: list[FrozenRow] = []
    started_anew: list[str] = []
    for record in records:
        origins = _scores_with_origins(record, old, change, accepted)
        margin = _margin_fields(row_margins.margins.get(record.label), rules)
        moved_rows.append(
            freeze_record(record).model_copy(update={"scores": origins.scores, **margin})
        )
        started_anew += origins.started_anew
    started_anew = list(dict.fromkeys(started_anew))
    all_rows = [*_rows_that_stay(path, old, records, only_named=bool(rows), drop=drop), *moved_rows]
    _refuse_second_teacher(path, all_rows)
    history = old.history if old else ()
    baseline = Baseline(
        margin=rules.margin,
        points=rules.points,
        history=(*history, change.model_copy(update={"anew": tuple(started_anew)})),
        rows=tuple(
            sorted(all_rows, key=lambda row: (row.label != TEACHER, row.label, row.seed or 0))
        ),
    )
    write_baseline(path, baseline)
    notes = [f"the first accepted value starts anew: {line}" for line in started_anew]
    return BaselineUpdate(baseline, old, (*notes, *row_margins.notes))


def _records_to_freeze(records: Sequence[RunRecord], rows: Sequence[str]) -> list[RunRecord]:
    """Return the records that move. Raises `HarnessError` for rows without one, and unfit ones."""
    labels = {record.label for record in records}
    if missing := next((label for label in rows if label not in labels), None):
        raise HarnessError(
            f"no record of the row {missing!r}; there are: {', '.join(sorted(labels))}"
        )
    moving = [
        record for record in records if not rows or record.label in rows or record.label == TEACHER
    ]
    _refuse_unfit_records(moving)
    return moving


def _refuse_unfit_records(records: Sequence[RunRecord]) -> None:
    """Raise `HarnessError` with the first reason why no baseline may be made of these records."""
    if not any(record.status == "success" and record.method != TEACHER for record in records):
        raise HarnessError(
            "there is no row that succeeded to freeze; type first: harness run --methods ..."
        )
    if duplicate := duplicate_row(records):
        raise HarnessError(
            f"two records of {duplicate}; name one run's file (results/runs/runs/NAME.json) in "
            "place of the store"
        )
    for record in records:
        name = f"{record.label}{f' (seed {record.seed})' if record.seed is not None else ''}"
        if record.status != "success":
            raise HarnessError(
                f"{name} {record.status}: {record.reason}; a baseline needs complete runs: fix "
                "it, or name other rows with --rows"
            )
        if record.conditions.limited:
            raise HarnessError(
                f"{name} was scored on a sample of the items; run it again without --limit before "
                "you freeze it"
            )
        if record.environment and record.environment.dirty:
            raise HarnessError(
                f"{name} was made from a working tree with changes; commit them and run again: a "
                "baseline must name the code that made it"
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
) -> list[Regression]:
    """Return what regressed against what is frozen or, where that shows nothing, first accepted."""
    if old is None:
        return []
    rules = Rules(rows=tuple(rows))
    against_frozen = [
        finding
        for finding in check(records, rules, old).findings
        if finding.verdict is Verdict.regressed
    ]
    reported = {(finding.row, finding.task) for finding in against_frozen}
    against_first = [
        finding
        for finding in check(records, rules, old.first).findings
        if finding.verdict is Verdict.regressed
        and finding.layer == "frozen"
        and (finding.row, finding.task) not in reported
    ]
    return [Regression(finding) for finding in against_frozen] + [
        Regression(finding, f" against its first accepted value{_origin_text(old, finding)}")
        for finding in against_first
    ]


def _refuse_regressions(path: Path, regressed: Sequence[Regression]) -> None:
    """Raise `HarnessError` for the first regression, if there is one."""
    for finding, reference in regressed:
        raise HarnessError(
            f"{path} does not move: {finding.name} regressed{reference} ({finding.told}); fix it, "
            "or accept it with --accept-regression"
        )


def _refuse_falling_seeds(path: Path, records: Sequence[RunRecord], old: Baseline | None) -> None:
    """Raise `HarnessError` if other seeds than frozen score less than the first accepted values.

    Items of other trainings are not paired with the frozen ones, so the check finds no record for
    these. Here the means of the seeds are compared; a fall within the tolerance is allowed.
    """
    for label, frozen_rows in _frozen_by_row(old).items():
        new_records = [record for record in records if record.label == label]
        frozen_seeds = {row.seed for row in frozen_rows}
        if not new_records or {record.seed for record in new_records} & frozen_seeds:
            continue
        for score in frozen_rows[0].scores:
            current = [
                new_score
                for record in new_records
                if (new_score := record.score(score.task))
                and new_score.items_digest == score.items_digest
            ]
            if not current:
                continue
            first = fmean(
                frozen.first.value
                for row in frozen_rows
                for frozen in row.scores
                if frozen.task == score.task
            )
            value = fmean(new_score.value for new_score in current)
            fall = value - first if current[0].lower_is_better else first - value
            is_share = score.unit == "share" and score.kind != "perplexity"
            if fall > Rules().tolerance * (1.0 if is_share else abs(first)):
                raise HarnessError(
                    f"{path} does not move: {label} {score.task}, other seeds than frozen, went "
                    f"from {score.format_value(first)} (first accepted) "
                    f"to {score.format_value(value)}; fix it, or accept it with --accept-regression"
                )


def _frozen_by_row(old: Baseline | None) -> dict[str, list[FrozenRow]]:
    """Return the frozen rows that depend on a seed, by label."""
    rows: dict[str, list[FrozenRow]] = {}
    for row in old.rows if old else ():
        if row.seed is not None:
            rows.setdefault(row.label, []).append(row)
    return rows


def _origin_text(old: Baseline, finding: Finding) -> str:
    """Return since when a first accepted value stands, and why."""
    origins = (
        score.origin
        for row in old.rows
        if row.label == finding.row
        for score in row.scores
        if score.task == finding.task and score.origin
    )
    origin = next(origins, None)
    return f" of {origin.date[:10]}, {origin.reason!r}" if origin else ""


def _margin_rules(rules: Rules, old: Baseline | None) -> Rules:
    """Return rules with nothing but the margin: the one given, else the old baseline's."""
    if rules.margin is not None or old is None:
        return Rules(margin=rules.margin, points=rules.points)
    return Rules(margin=old.margin, points=old.points)


def own_margins(
    path: Path, records: Sequence[RunRecord], rules: Rules, old: Baseline | None, *, allowed: bool
) -> OwnMargins:
    """Return the margins of rows that do not keep the margin of all rows.

    Raises `HarnessError` for such a row, unless own margins are `allowed` or the row keeps one that
    was accepted before.
    """
    if rules.margin is None:
        return OwnMargins({}, [])
    claims: dict[str, list[Finding]] = {}
    for finding in check(records, rules).findings:
        if finding.layer in _CLAIMS:
            claims.setdefault(finding.row, []).append(finding)
    not_passed = [
        label
        for label, findings in claims.items()
        if any(finding.verdict is not Verdict.passed for finding in findings)
    ]
    accepted = {
        label: margin
        for label in not_passed
        if (margin := _accepted_margin(records, label, rules, old)) is not None
    }
    unmet = {label: _first_unmet(findings) for label, findings in claims.items()}
    refused = {
        label: finding
        for label, finding in unmet.items()
        if finding is not None and label not in accepted
    }
    if refused and not allowed:
        others = [label for label in claims if label not in refused]
        raise HarnessError(_margin_refusal(path, refused, rules, others, old))
    measured = {
        label: _margin_it_keeps(records, claims[label], rules)
        for label in not_passed
        if allowed and any(map(_has_interval, claims[label]))
    }
    margins = measured | accepted
    notes = [
        f"{finding.row} {finding.task}: whether it {rules.claim()} is not known ({finding.told})"
        for label, findings in claims.items()
        if label not in margins
        for finding in findings
        if finding.layer == "claim"
        and finding.verdict in (Verdict.cannot_tell, Verdict.not_comparable)
    ]
    return OwnMargins(margins, notes)


def _first_unmet(findings: Sequence[Finding]) -> Finding | None:
    """Return the first finding that a claim was shown not to hold."""
    return next((finding for finding in findings if finding.verdict in _UNMET), None)


def _accepted_margin(
    records: Sequence[RunRecord], label: str, rules: Rules, old: Baseline | None
) -> float | None:
    """Return a row's own margin in the old baseline, None without one that it still keeps.

    It must have the same form (ratio or points), and these records may not fall short of it.
    """
    own_rules = rules_for_row(old, label, replace(rules, margin=None))
    if own_rules.margin is None or own_rules.points != rules.points:
        return None
    findings = check(records, replace(own_rules, rows=(label,))).findings
    claims = [finding for finding in findings if finding.layer in _CLAIMS]
    return own_rules.margin if _first_unmet(claims) is None else None


def _margin_refusal(
    path: Path,
    refused: Mapping[str, Finding],
    rules: Rules,
    others: Sequence[str],
    old: Baseline | None,
) -> str:
    """Return which row does not keep the margin, and what to type."""
    label, finding = next(iter(refused.items()))
    own_rules = rules_for_row(old, label, rules)
    margin = f"{rules.margin:g}{' of the items' if rules.points else ''}"
    if own_rules is not rules:
        margin += f", nor its own of {own_rules.margin:g}"
    leave_out = (
        f"leave it out (--rows {','.join(others)})" if others else "leave it out with --rows"
    )
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return (
        f"{path} does not move: {finding.name.rpartition(' [')[0]}{more} does not keep the margin "
        f"of {margin} ({finding.told}); "
        f"{leave_out}, or freeze it with what it keeps (--own-margin)"
    )


def _has_interval(finding: Finding) -> bool:
    """Tell whether a claim has an interval, from which a margin can be read."""
    return isinstance(finding.numbers.get("low"), float)


def _margin_it_keeps(
    records: Sequence[RunRecord], findings: Sequence[Finding], rules: Rules
) -> float:
    """Return the tightest margin, a share in whole per cents, that these records of a row pass.

    A margin is the share that must be kept; with `rules.points`, what may be lost. The search
    starts at the worst lower bound of the row's intervals, and loosens the margin by one per cent
    until a check of the records passes (`_shown_to_keep`).
    """
    tested = [finding for finding in findings if _has_interval(finding)]
    lower_bound = 100 * min(_lower_bound(records, finding, rules) for finding in tested)
    if rules.points:  # looser is more
        percent, step = max(1, math.ceil(-lower_bound - 1e-9)), 1
    else:  # looser is less
        percent, step = min(99, math.floor(lower_bound + 1e-9)), -1
    while 0 < percent < 100 and not _shown_to_keep(
        records, tested, replace(rules, margin=percent / 100)
    ):
        percent += step
    if not 0 < percent < 100:
        raise HarnessError(
            f"{findings[0].row} is shown to keep no margin at all ({findings[0].told}); "
            "leave it out with --rows"
        )
    return percent / 100


def _shown_to_keep(records: Sequence[RunRecord], findings: Sequence[Finding], rules: Rules) -> bool:
    """Tell whether a check of these records passes a row's claims at the margin of the rules.

    Each claim is tested at the level of Holm's first step, the strictest. Other findings do not
    matter.
    """
    tests = max(int(finding.numbers.get("tests") or 1) for finding in findings)
    row_rules = replace(rules, rows=(findings[0].row,), alpha=rules.alpha / tests)
    return all(
        finding.verdict is Verdict.passed
        for finding in check(records, row_rules).findings
        if finding.layer in _CLAIMS and _has_interval(finding)
    )


def _lower_bound(records: Sequence[RunRecord], finding: Finding, rules: Rules) -> float:
    """Return the lower end of what a row keeps on a task.

    For a figure that is better when lower, it is one over the upper end (in points: its negative).
    """
    low, high = finding.numbers["low"], finding.numbers["high"]
    assert low is not None and high is not None
    scores = [
        score
        for record in records
        if record.label == finding.row and (score := record.score(finding.task))
    ]
    # a pooled figure has no score here: it is better when higher
    lower_is_better = any(score.lower_is_better for score in scores)
    if rules.points:
        return -high if lower_is_better else low
    return 1 / high if lower_is_better and high > 0 else low


def _margin_fields(margin: float | None, rules: Rules) -> dict[str, object]:
    return {} if margin is None else {"margin": margin, "points": rules.points}


def _history_entry(
    records: Sequence[RunRecord], reason: str, regressed: Sequence[Finding]
) -> Change:
    """Return the line of the baseline's history."""
    environment = next((record.environment for record in records if record.environment), None)
    return Change(
        reason=reason.strip(),
        date=max(record.created for record in records),
        commit=environment.commit if environment else None,
        rows=tuple(dict.fromkeys(record.label for record in records)),
        accepted=tuple(dict.fromkeys(finding.name for finding in regressed)),
    )


def _rows_that_stay(
    path: Path,
    old: Baseline | None,
    records: Sequence[RunRecord],
    *,
    only_named: bool,
    drop: bool,
) -> list[FrozenRow]:
    """Return the frozen rows that stay as they are: those without a record of their label and seed.

    Rows stay with `only_named` (`--rows`) alone. Else all are replaced: raises `HarnessError` for
    a frozen row without a record, unless `drop`.
    """
    keys: set[RowKey] = {(record.label, record.seed) for record in records}
    without_record = [row for row in (old.rows if old else ()) if (row.label, row.seed) not in keys]
    if only_named:
        return without_record
    if without_record and not drop:
        row = without_record[0]
        seed = "" if row.seed is None else f" (seed {row.seed})"
        raise HarnessError(
            f"{path} holds {row.label}{seed}, of which there is no record here; move single rows "
            "with --rows, or drop it with --drop"
        )
    return []


def _refuse_second_teacher(path: Path, rows: Sequence[FrozenRow]) -> None:
    """Raise `HarnessError` for rows of different teachers."""
    if len({row.conditions["teacher"] for row in rows}) > 1:
        raise HarnessError(
            f"{path}: its other rows have another teacher than these records; freeze all rows of "
            "the new teacher together"
        )


def _scores_with_origins(
    record: RunRecord, old: Baseline | None, change: Change, accepted: frozenset[tuple[str, str]]
) -> _OriginScores:
    """Return a row's scores with their first accepted values.

    A first accepted value starts anew if the score cannot be compared with the frozen one, or if
    its regression was accepted.
    """
    new_scores = freeze_record(record).scores
    frozen_row = next(
        (
            row
            for row in (old.rows if old else ())
            if (row.label, row.seed) == (record.label, record.seed)
        ),
        None,
    )
    if old is None or frozen_row is None:
        line = f"{record.label} seed {record.seed} (the row was frozen with other seeds)"
        return _OriginScores(
            tuple(_with_new_origin(score, change) for score in new_scores),
            [line] if record.label in _frozen_by_row(old) else [],
        )
    row_difference = condition_difference(frozen_row, record)
    scores, started_anew = [], []
    for score in new_scores:
        frozen = next(
            (candidate for candidate in frozen_row.scores if candidate.task == score.task), None
        )
        difference = None
        if frozen is not None:
            difference = row_difference or score_difference(frozen, record.score(score.task))
        if difference:
            started_anew.append(f"{record.label} {score.task} ({difference.text})")
        if frozen is None or difference or (record.label, score.task) in accepted:
            scores.append(_with_new_origin(score, change))
        else:
            scores.append(_with_origin_of(frozen, score, old.last_change(record.label)))
    return _OriginScores(tuple(scores), started_anew)


def _with_new_origin(score: FrozenScore, change: Change) -> FrozenScore:
    """Return a score that is itself the first accepted value."""
    origin = Origin(value=score.value, date=change.date, reason=change.reason)
    return score.model_copy(update={"origin": origin})


def _with_origin_of(frozen: FrozenScore, score: FrozenScore, moved: Change) -> FrozenScore:
    """Return a score with the first accepted value of the frozen one.

    The origin holds items only where they differ from the score's own. `moved` is the change that
    froze the frozen score.
    """
    origin = frozen.origin or Origin(value=frozen.value, date=moved.date, reason=moved.reason)
    items = {name: getattr(frozen.first, name) for name in ITEM_FIELDS}
    if all(getattr(score, name) == value for name, value in items.items()):
        no_items = Origin(value=0.0, date="", reason="")
        items = {name: getattr(no_items, name) for name in ITEM_FIELDS}
    return score.model_copy(update={"origin": origin.model_copy(update=items)})
