"""The check behind `harness check`: does every row keep what it claims, and what it once had? Pure,
from records and a baseline. No torch.

Three layers, each with its own preconditions. *Identity*: a row whose answers are the frozen ones
to the last is done. *Claim*: a row keeps at least the margin of what its teacher has above chance,
on the same items (non-inferiority). *Frozen*: a row has lost no more items than it won against its
own frozen outcomes (exact one-sided McNemar), or less than the tolerance. Beside the decisions by
task stands one pooled over a row's tasks. P values are adjusted by Holm over all rows, tasks and
pools of a layer. A row that nothing judged is never a pass. Bytes are compared exactly; speed only
by ratios of two models timed by turns in one job, never by stored seconds.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.analysis.comparison import Group, group_records
from harness.errors import HarnessError
from harness.gate.claim import asked_rows, claims_of, judged
from harness.gate.frozen import frozen_findings, frozen_notes
from harness.gate.passed import passed_means
from harness.gate.pooled import check_rules, pooled_claims
from harness.gate.rules import EXIT, Checked, Finding, Rules, Verdict, is_judged, not_comparable
from harness.gate.speed import measured_findings, speed_findings
from harness.records.record import Measurement, RunRecord
from harness.records.store import twice

if TYPE_CHECKING:
    from harness.records.baseline import Baseline

__all__ = ["EXIT", "Checked", "Finding", "Rules", "Verdict", "check"]


def check(
    records: Sequence[RunRecord],
    rules: Rules,
    baseline: "Baseline | None" = None,
    *,
    measured: Sequence[tuple[str, Sequence[Measurement]]] = (),
) -> Checked:
    """Check one run's records by the rules, against a baseline where one is given; `measured`:
    speed ratios of models timed in one job.

    Raises `HarnessError` where a row and seed has two records (which of them is judged would be a
    matter of chance), and where the rules ask what cannot be: a margin above 1, a weight of a task
    that no record has.
    """
    if double := twice(records):
        raise HarnessError(f"two records of {double}: a check judges one run; name its file")
    check_rules(rules, {score.task for record in records for score in record.scores})
    notes: list[str] = []
    groups, held = group_records(records), baseline.labels if baseline is not None else frozenset()
    findings = [
        one
        for record in records
        if is_judged(record, rules)
        for one in _broken(record, rules, baseline, notes)
    ]
    findings += _claimed(groups, records, rules, baseline)
    if baseline is not None:
        findings += frozen_findings(records, baseline, rules)
        notes += frozen_notes(records, baseline)
    if rules.faster is not None:
        findings += [
            one for found in groups for one in speed_findings(found, rules, rules.faster, held)
        ]
    findings += [
        one for name, found in measured for one in measured_findings(name, found, rules, held)
    ]
    findings += [
        not_comparable("row", row, "", "rows", f"no record of the row {row}")
        for row in rules.rows
        if row not in {one.label for one in records}
    ]
    findings += _unjudged(records, findings, rules, baseline)
    notes += _noted(records, rules, baseline)
    if (rules.decide == "pooled" or rules.task_weights != "items") and not any(
        one.layer.startswith("pooled") for one in findings
    ):
        notes.append(
            "nothing was pooled: no row has two tasks with paired shares on which its teacher is "
            "above chance, or no answer changed"
        )
    distinct = list({(one.layer, one.row, one.task, one.told): one for one in findings}.values())
    means = passed_means(distinct, rules)
    return Checked(
        findings=tuple(_counted(distinct, rules)),
        notes=tuple(dict.fromkeys(notes)),
        rules=rules,
        passed_means=means,
    )


def _claimed(
    groups: Sequence[Group], records: Sequence[RunRecord], rules: Rules, baseline: "Baseline | None"
) -> list[Finding]:
    """Judge the claims, by task and pooled over each row's tasks."""
    asked = asked_rows(groups, rules, baseline)
    claims, untold = claims_of(asked, records)
    return untold + judged(
        [*claims, *pooled_claims(asked)], rules, baseline.labels if baseline is not None else ()
    )


def _counted(findings: Sequence[Finding], rules: Rules) -> list[Finding]:
    """Mark what is information: a pool that cannot tell; with `decide` pooled also the single tasks
    that a passed pool speaks for.
    """
    settled = {
        (finding.layer.removeprefix("pooled").strip() or "claim", finding.row, task)
        for finding in findings
        if finding.layer.startswith("pooled")
        and finding.verdict is Verdict.passed
        and rules.decide == "pooled"
        for task in finding.speaks_for
    }

    def counts(finding: Finding) -> bool:
        return finding.verdict is not Verdict.cannot_tell or not (
            finding.layer.startswith("pooled")
            or (finding.layer, finding.row, finding.task) in settled
        )

    return [finding if counts(finding) else replace(finding, counts=False) for finding in findings]


def _noted(records: Sequence[RunRecord], rules: Rules, baseline: "Baseline | None") -> list[str]:
    """Return what is to be known of the whole check."""
    notes = []
    fresh = [
        each.label
        for each in records
        if baseline is not None and each.label not in baseline.labels and not each.is_control
    ]
    if fresh:
        notes.append(
            f"not in the baseline: {', '.join(dict.fromkeys(fresh))} (freeze them: harness "
            "baseline update)"
        )
    if any(record.conditions.limited and is_judged(record, rules) for record in records):
        notes.append("a trial: these rows were scored on a sample of the items (--limit)")
    return notes


def _broken(
    record: RunRecord, rules: Rules, baseline: "Baseline | None", notes: list[str]
) -> list[Finding]:
    """A row that failed is not comparable: a check never passes over it. A skipped one where it was
    named or frozen.
    """
    if record.status == "failed":
        return [not_comparable("row", record.label, "", "status", f"failed: {record.reason}")]
    if record.status == "skipped" and (
        record.label in rules.rows or (baseline is not None and record.label in baseline.labels)
    ):
        return [not_comparable("row", record.label, "", "status", f"skipped: {record.reason}")]
    if record.status == "skipped":
        notes.append(f"{record.label} was skipped: {record.reason}")
    return []


def _unjudged(
    records: Sequence[RunRecord],
    findings: Sequence[Finding],
    rules: Rules,
    baseline: "Baseline | None",
) -> list[Finding]:
    """Say of every row and seed that neither its claim nor its frozen items judged that nothing is
    known of it.
    """
    claimed = {one.row for one in findings if one.layer == "claim"}
    told = {one.row for one in findings if one.layer in ("row", "frozen")}
    known = {(row.label, row.seed) for row in baseline.rows} if baseline is not None else set()
    found = []
    for record in records:
        named = f"{record.label}{f' (seed {record.seed})' if record.seed is not None else ''}"
        judged = (
            record.label in claimed
            or (record.label in told and (record.label, record.seed) in known)
            or record.status != "success"
        )
        if (
            not judged
            and is_judged(record, rules)
            and (baseline is not None or rules.faster is None)
        ):
            why = (
                f"{named} is not in the baseline and there is no --margin: nothing says what it "
                "must keep"
            )
            found.append(
                Finding(layer="row", row=record.label, verdict=Verdict.cannot_tell, told=why)
            )
    return found
