"""The frozen layer of `harness check`: is each row, item by item, what was frozen? No torch.

Only scores under the same conditions are compared. Nothing changed if the answers *and* their
outcomes are the frozen ones. The same answers with other outcomes mean another scoring, which is
not comparable. Changes are tested (exact McNemar, paired means, documents) with Holm's adjustment
over rows and tasks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.analysis.comparison import tests_of
from harness.gate.frozen_documents import judge_documents, rise_of
from harness.gate.frozen_items import (
    ChangedScore,
    FrozenPair,
    Numbers,
    are_hits,
    figure_difference,
    item_values_by_run,
    judge_hits,
    judge_values,
    outcomes_by_run,
    unchanged_finding,
)
from harness.gate.pooled import frozen_pools, judge_pools
from harness.gate.rules import (
    Difference,
    Finding,
    Rules,
    Verdict,
    abbreviated,
    is_judged,
    not_comparable,
)
from harness.records.baseline import LM_EVAL
from harness.records.record import TEACHER, RunRecord, TaskScore
from harness.statistics import stats

if TYPE_CHECKING:
    from harness.records.baseline import Baseline, FrozenRow, FrozenScore


__all__ = [
    "condition_difference",
    "frozen_findings",
    "frozen_notes",
    "judge_pairs",
    "score_difference",
]


def frozen_findings(
    records: Sequence[RunRecord], baseline: "Baseline", rules: Rules
) -> list[Finding]:
    """Judge every frozen row against its frozen outcomes; controls only if the rules name them.

    The seeds of a row are judged together, item by item.
    """
    findings: list[Finding] = []
    pairs: dict[tuple[str, str], list[FrozenPair]] = {}
    for row in baseline.rows:
        if not _is_judged(row, rules):
            continue
        record = next(
            (
                candidate
                for candidate in records
                if (candidate.label, candidate.seed) == (row.label, row.seed)
            ),
            None,
        )
        if record is None or record.status != "success":
            findings += _missing_record_findings(row, record, rules)
            continue
        if difference := condition_difference(row, record):
            findings.append(not_comparable("frozen", row.label, "", difference))
            continue
        findings += _byte_findings(row, record)
        for score in row.scores:
            current = record.score(score.task)
            difference = score_difference(score, current)
            if difference or current is None:
                difference = difference or Difference("items", "missing")
                findings.append(not_comparable("frozen", row.label, score.task, difference))
            else:
                pair = FrozenPair(row, score, record, current)
                pairs.setdefault((row.label, score.task), []).append(pair)
    return findings + judge_pairs(pairs, rules)


def frozen_notes(records: Sequence[RunRecord], baseline: "Baseline") -> list[str]:
    """Return notes on conditions that a baseline is too old to hold: they are not compared."""
    current = {
        (record.label, record.seed): record for record in records if record.status == "success"
    }
    pairs = [
        (row, current[row.label, row.seed])
        for row in baseline.rows
        if (row.label, row.seed) in current
    ]
    without_lm_eval = dict.fromkeys(
        row.label
        for row, record in pairs
        if LM_EVAL in row.conditions_of(record) and LM_EVAL not in row.conditions
    )
    if not without_lm_eval:
        return []
    return [
        f"the baseline does not say which lm-eval scored {', '.join(without_lm_eval)}: its version "
        "is not compared until they are frozen again"
    ]


def _is_judged(row: "FrozenRow", rules: Rules) -> bool:
    """Tell whether a frozen row is judged: rows named and the teacher, else all but controls."""
    if rules.rows and row.label != TEACHER:
        return row.label in rules.rows
    return not row.control or row.label in rules.rows


def _missing_record_findings(
    row: "FrozenRow", record: RunRecord | None, rules: Rules
) -> list[Finding]:
    """Return the finding that a frozen row has no record that succeeded.

    There is none if the check itself judges the record: it reports the failure.
    """
    if record is not None and is_judged(record, rules):
        return []
    seed = f" (seed {row.seed})" if row.seed is not None else ""
    text = f"the baseline's row {row.label}{seed} has no record"
    difference = (
        Difference("rows", text)
        if record is None
        else Difference("status", f"{text} that succeeded: {record.reason}")
    )
    return [not_comparable("frozen", row.label, "", difference)]


def condition_difference(row: "FrozenRow", record: RunRecord) -> Difference | None:
    """Return the first condition that differs from the frozen ones, None if all are the same."""
    current = row.conditions_of(record)
    # conditions that had their default value when the row was frozen, and have another one now
    added = [name for name in current if name not in row.conditions and name != LM_EVAL]
    for name in (*row.conditions, *added):
        frozen_value, value = row.conditions.get(name), current.get(name)
        if value != frozen_value:
            before, after = abbreviated(frozen_value), abbreviated(value)
            return Difference(name, f"{name} differs: {before} in the baseline, {after} now")
    return None


def score_difference(frozen: "FrozenScore", current: TaskScore | None) -> Difference | None:
    """Return why a score cannot be compared with the frozen one, None if it can.

    The task, its items or the scoring may differ.
    """
    if current is None:
        return Difference("tasks", f"{frozen.task} was not scored")
    if current.version != frozen.version:
        return Difference(
            "task version",
            f"{frozen.task}@{frozen.version} in the baseline, @{current.version} now",
        )
    if current.n != frozen.n:
        return Difference("n", f"{frozen.n:,} items in the baseline, {current.n:,} now")
    if current.items_digest != frozen.items_digest:
        return Difference("items", "other items, prompts or targets than in the baseline")
    if current.primary != frozen.primary:
        return Difference(
            "extractor", f"scored by {frozen.primary} in the baseline, by {current.primary} now"
        )
    return _scoring_difference(frozen, current)


def _scoring_difference(frozen: "FrozenScore", current: TaskScore) -> Difference | None:
    """Return how answers are scored otherwise than in the baseline, None if no difference is seen.

    Equal answers with another figure prove one.
    """
    if frozen.metric and current.metric and current.metric != frozen.metric:
        return Difference("metric", f"{frozen.metric} in the baseline, {current.metric} now")
    same_answers = current.answers_digest == frozen.answers_digest
    if same_answers and (text := figure_difference(frozen, current)):
        return Difference("scoring", f"the scoring changed: the same answers, {text}")
    if current.parts != frozen.parts and not (current.unpaired or frozen.unpaired):
        return Difference("weights", "items count with other weights than in the baseline")
    return None


def judge_pairs(
    pairs: Mapping[tuple[str, str], Sequence[FrozenPair]], rules: Rules
) -> list[Finding]:
    """Judge all scores that may be compared, by row and task.

    Changed ones are tested, with Holm's adjustment over rows, tasks and pools together.
    """
    findings: list[Finding] = []
    changed: list[tuple[str, str, Sequence[FrozenPair]]] = []
    for (label, task), seeds in pairs.items():
        frozen, current = seeds[0].frozen, seeds[0].current
        if all(pair.same_answers for pair in seeds):
            findings.append(unchanged_finding(label, task, seeds, rules))
        elif reason := current.unpaired or frozen.unpaired:
            findings.append(
                Finding(
                    layer="frozen",
                    row=label,
                    task=task,
                    verdict=Verdict.cannot_tell,
                    told=f"{frozen.value:.4g} -> {current.value:.4g}; {reason}",
                )
            )
        else:
            changed.append((label, task, seeds))
    pools = frozen_pools(pairs, rules)
    adjusted = stats.holm(
        [*(_p_of_loss(seeds, rules) for *_, seeds in changed), *(pool.p for pool in pools)]
    )
    of_scores, of_pools = adjusted[: len(changed)], adjusted[len(changed) :]
    findings += [
        _judge_change(ChangedScore(label, task, seeds, p, len(adjusted), rules))
        for (label, task, seeds), p in zip(changed, of_scores, strict=True)
    ]
    return findings + judge_pools(pools, of_pools, len(adjusted), rules)


def _p_of_loss(seeds: Sequence[FrozenPair], rules: Rules) -> float:
    """Return the one-sided p of "nothing was lost"."""
    score = seeds[0].current
    if score.kind == "perplexity":
        _, p_above = rise_of(seeds).limit_test(1 + rules.perplexity)
        return p_above
    if are_hits(seeds):
        runs = outcomes_by_run(seeds)
        return stats.net_change_test(runs.after, runs.before).p
    values = item_values_by_run(seeds)
    p: float = tests_of(score).inferiority_test(
        values.after, values.before, score.parts, lower=score.lower_is_better
    )
    return p


def _judge_change(changed: ChangedScore) -> Finding:
    """Judge one changed score by the test for its kind of items."""
    if changed.seeds[0].current.kind == "perplexity":
        return judge_documents(changed)
    return judge_hits(changed) if are_hits(changed.seeds) else judge_values(changed)


def _byte_findings(row: "FrozenRow", record: RunRecord) -> list[Finding]:
    """Compare weight bytes exactly: more are a regression, fewer a pass with a warning."""
    frozen = row.weight_bytes
    current = record.student.weight_bytes if record.student else None
    if frozen is None or current is None:
        return []
    line = f"{current:,} bytes of weights"
    if current != frozen:
        line += f", {frozen:,} in the baseline"
    numbers: Numbers = {"bytes": current, "before": frozen}
    return [
        Finding(
            layer="bytes",
            row=row.label,
            verdict=Verdict.regressed if current > frozen else Verdict.passed,
            told=line,
            numbers=numbers,
            warning=current < frozen,
        )
    ]
