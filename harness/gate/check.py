"""The check behind `harness check`, a pure function of records and a baseline. No torch.

Does every row keep what it claims, and what it once had? There are three layers, each with its own
conditions:

- *Identity*: a row whose answers are all the frozen ones passes.
- *Claim*: a row keeps at least the margin of what its teacher has above chance, on the same items
  (non-inferiority).
- *Frozen*: compared with its own frozen outcomes, a row lost no more items than it won (exact
  one-sided McNemar), or lost less than the tolerance.

Beside the decisions by task there is one pooled over a row's tasks. P values are adjusted by Holm
over all rows, tasks and pools of a layer. A row that nothing judged is never a pass. Bytes are
compared exactly. Speed is compared only by ratios of two models timed alternately in one job, never
by stored seconds.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.analysis.comparison import Group, group_records
from harness.errors import HarnessError
from harness.gate.claim import claimed_rows, claims_of, judge_claims
from harness.gate.frozen import frozen_findings, frozen_notes
from harness.gate.passed import meaning_of_passed
from harness.gate.pooled import pooled_claims, validate_rules
from harness.gate.rules import (
    EXIT_CODES,
    CheckResult,
    Difference,
    Finding,
    Rules,
    Verdict,
    is_judged,
    not_comparable,
)
from harness.gate.speed import measured_findings, speed_findings
from harness.records.record import Measurement, RunRecord
from harness.records.store import duplicate_row

if TYPE_CHECKING:
    from harness.records.baseline import Baseline

__all__ = [
    "EXIT_CODES",
    "CheckResult",
    "Finding",
    "Rules",
    "Verdict",
    "check",
    "with_information_marked",
]


def check(
    records: Sequence[RunRecord],
    rules: Rules,
    baseline: "Baseline | None" = None,
    *,
    measured: Sequence[tuple[str, Sequence[Measurement]]] = (),
) -> CheckResult:
    """Check one run's records by the rules, and against a baseline if there is one.

    `measured` holds the speed ratios of models that were timed in one job, by the model's name.
    Raises `HarnessError` if a row and seed has two records, and for rules that cannot be met: a
    margin above 1, a weight for a task that no record has.
    """
    if duplicate := duplicate_row(records):
        raise HarnessError(f"two records of {duplicate}: a check judges one run; name its file")
    validate_rules(rules, {score.task for record in records for score in record.scores})
    groups = group_records(records)
    findings = [
        *_unsuccessful_findings(records, rules, baseline),
        *_claim_findings(groups, records, rules, baseline),
    ]
    if baseline is not None:
        findings += frozen_findings(records, baseline, rules)
    findings += _speed_findings(groups, measured, rules, baseline)
    findings += [
        not_comparable("row", row, "", Difference("rows", f"no record of the row {row}"))
        for row in rules.rows
        if row not in {record.label for record in records}
    ]
    findings += _unjudged_findings(records, findings, rules, baseline)
    distinct = list(
        {
            (finding.layer, finding.row, finding.task, finding.told): finding
            for finding in findings
        }.values()
    )
    return CheckResult(
        findings=tuple(with_information_marked(distinct, rules)),
        notes=tuple(dict.fromkeys(_notes(records, findings, rules, baseline))),
        rules=rules,
        passed_means=meaning_of_passed(distinct, rules),
    )


def _claim_findings(
    groups: Sequence[Group], records: Sequence[RunRecord], rules: Rules, baseline: "Baseline | None"
) -> list[Finding]:
    """Judge the claims, by task and pooled over each row's tasks."""
    rows = claimed_rows(groups, rules, baseline)
    claims, untestable = claims_of(rows, records)
    frozen_labels = baseline.labels if baseline is not None else frozenset()
    return untestable + judge_claims([*claims, *pooled_claims(rows)], rules, frozen_labels)


def _speed_findings(
    groups: Sequence[Group],
    measured: Sequence[tuple[str, Sequence[Measurement]]],
    rules: Rules,
    baseline: "Baseline | None",
) -> list[Finding]:
    """Judge the speed of rows beside their teacher, and of models measured beside another one."""
    frozen_labels = baseline.labels if baseline is not None else frozenset()
    findings: list[Finding] = []
    if rules.faster is not None:
        for table in groups:
            findings += speed_findings(table, rules, rules.faster, frozen_labels)
    for name, measurements in measured:
        findings += measured_findings(name, measurements, rules, frozen_labels)
    return findings


def with_information_marked(findings: Sequence[Finding], rules: Rules) -> list[Finding]:
    """Mark the findings that do not count towards the check's verdict.

    These are pools that cannot tell and, with `decide` pooled, single tasks that cannot tell but
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


def _notes(
    records: Sequence[RunRecord],
    findings: Sequence[Finding],
    rules: Rules,
    baseline: "Baseline | None",
) -> list[str]:
    """Return what people should know about the whole check."""
    notes = [
        f"{record.label} was skipped: {record.reason}"
        for record in records
        if is_judged(record, rules)
        and record.status == "skipped"
        and not _must_succeed(record, rules, baseline)
    ]
    if baseline is not None:
        notes += frozen_notes(records, baseline)
        new_labels = dict.fromkeys(
            record.label
            for record in records
            if record.label not in baseline.labels and not record.is_control
        )
        if new_labels:
            notes.append(
                f"not in the baseline: {', '.join(new_labels)} (freeze them: harness baseline "
                "update)"
            )
    if any(record.conditions.limited and is_judged(record, rules) for record in records):
        notes.append("a trial: these rows were scored on a sample of the items (--limit)")
    subsets = {record.conditions.subset for record in records if is_judged(record, rules)} - {""}
    notes += [f"these rows were scored on the frozen subset {name}" for name in sorted(subsets)]
    wants_pool = rules.decide == "pooled" or rules.task_weights != "items"
    if wants_pool and not any(finding.layer.startswith("pooled") for finding in findings):
        notes.append(
            "nothing was pooled: no row has two tasks with paired shares on which its teacher is "
            "above chance, or no answer changed"
        )
    return notes


def _unsuccessful_findings(
    records: Sequence[RunRecord], rules: Rules, baseline: "Baseline | None"
) -> list[Finding]:
    """Return a finding for each judged row that failed, or was skipped though it must succeed."""
    return [
        not_comparable(
            "row", record.label, "", Difference("status", f"{record.status}: {record.reason}")
        )
        for record in records
        if is_judged(record, rules)
        and (
            record.status == "failed"
            or (record.status == "skipped" and _must_succeed(record, rules, baseline))
        )
    ]


def _must_succeed(record: RunRecord, rules: Rules, baseline: "Baseline | None") -> bool:
    """Tell whether a row may not be skipped: the rules name it or the baseline has it."""
    return record.label in rules.rows or (baseline is not None and record.label in baseline.labels)


def _unjudged_findings(
    records: Sequence[RunRecord],
    findings: Sequence[Finding],
    rules: Rules,
    baseline: "Baseline | None",
) -> list[Finding]:
    """Return a finding for each row and seed that neither its claim nor frozen items judged."""
    if baseline is None and rules.faster is not None:
        return []
    claimed = {finding.row for finding in findings if finding.layer == "claim"}
    reported = {finding.row for finding in findings if finding.layer in ("row", "frozen")}
    frozen = {(row.label, row.seed) for row in baseline.rows} if baseline is not None else set()
    unjudged = []
    for record in records:
        is_covered = (
            record.label in claimed
            or (record.label in reported and (record.label, record.seed) in frozen)
            or record.status != "success"
        )
        if not is_covered and is_judged(record, rules):
            seed = f" (seed {record.seed})" if record.seed is not None else ""
            line = (
                f"{record.label}{seed} is not in the baseline and there is no --margin: nothing "
                "says what it must keep"
            )
            unjudged.append(
                Finding(layer="row", row=record.label, verdict=Verdict.cannot_tell, told=line)
            )
    return unjudged
