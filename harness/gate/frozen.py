"""The frozen layer of `harness check`: is a row what it was when it was frozen, item by item, under
the same conditions? No torch.

Nothing changed where answers *and* what was made of them are the frozen ones. The same answers with
other outcomes are another scoring, which is not comparable. What changed is tested (exact McNemar,
paired means, documents), Holm over rows and tasks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.analysis.comparison import tests_of
from harness.gate.frozen_documents import documents_against_frozen, rise_of
from harness.gate.frozen_items import (
    Numbers,
    Pair,
    Tested,
    are_hits,
    hits_against_frozen,
    margin_of,
    numbers_against_frozen,
    numbers_of,
    runs_of,
    unchanged,
    unlike_figures,
)
from harness.gate.pooled import frozen_pools, judged_pools
from harness.gate.rules import Finding, Rules, Verdict, is_judged, not_comparable, short
from harness.records.baseline import LM_EVAL
from harness.records.record import TEACHER, RunRecord, TaskScore
from harness.statistics import stats

if TYPE_CHECKING:
    from harness.records.baseline import Baseline, FrozenRow, FrozenScore


__all__ = ["frozen_findings", "frozen_notes", "margin_of", "unlike_conditions", "unlike_scores"]


def frozen_findings(
    records: Sequence[RunRecord], baseline: "Baseline", rules: Rules
) -> list[Finding]:
    """Judge every frozen row by its own outcomes of then; seeds of a row are judged together, item
    by item. Controls only when named.
    """
    findings: list[Finding] = []
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for row in baseline.rows:
        if not _asked(row, rules):
            continue
        record = next(
            (known for known in records if (known.label, known.seed) == (row.label, row.seed)), None
        )
        if record is None or record.status != "success":
            findings += _without_record(row, record, rules)
            continue
        if unlike := unlike_conditions(row, record):
            findings.append(not_comparable("frozen", row.label, "", *unlike))
            continue
        findings += _bytes(row, record)
        for then in row.scores:
            now = record.score(then.task)
            unlike = unlike_scores(then, now)
            if unlike or now is None:
                findings.append(
                    not_comparable(
                        "frozen", row.label, then.task, *(unlike or ("items", "missing"))
                    )
                )
            else:
                pairs.setdefault((row.label, then.task), []).append(Pair(row, then, record, now))
    return findings + _judged(pairs, rules)


def frozen_notes(records: Sequence[RunRecord], baseline: "Baseline") -> list[str]:
    """Say which conditions a baseline is too old to know: they are not compared."""
    known = {
        (record.label, record.seed): record for record in records if record.status == "success"
    }
    pairs = [
        (row, known[row.label, row.seed]) for row in baseline.rows if (row.label, row.seed) in known
    ]
    silent = dict.fromkeys(
        row.label
        for row, record in pairs
        if LM_EVAL in row.conditions_of(record) and LM_EVAL not in row.conditions
    )
    if not silent:
        return []
    return [
        f"the baseline does not say which lm-eval scored {', '.join(silent)}: its version is not "
        "compared until they are frozen anew"
    ]


def _asked(row: "FrozenRow", rules: Rules) -> bool:
    """Tell whether a frozen row is judged: the rows named and the teacher's, else every row that is
    no control.
    """
    if rules.rows and row.label != TEACHER:
        return row.label in rules.rows
    return not row.control or row.label in rules.rows


def _without_record(row: "FrozenRow", record: RunRecord | None, rules: Rules) -> list[Finding]:
    """Say that a frozen row has no record that succeeded; a judged one that failed is told as a
    row.
    """
    if record is not None and is_judged(record, rules):
        return []
    seed = f" (seed {row.seed})" if row.seed is not None else ""
    told = f"the baseline's row {row.label}{seed} has no record" + (
        f" that succeeded: {record.reason}" if record else ""
    )
    return [not_comparable("frozen", row.label, "", "rows" if record is None else "status", told)]


def unlike_conditions(row: "FrozenRow", record: RunRecord) -> tuple[str, str] | None:
    """Return the first condition that differs, with both its values; None where the two may be
    compared.
    """
    now = row.conditions_of(record)
    # not at its default now, as it was then
    late = [name for name in now if name not in row.conditions and name != LM_EVAL]
    for name in (*row.conditions, *late):
        if now.get(name) != (then := row.conditions.get(name)):
            return (
                name,
                f"{name} differs: {short(then)} in the baseline, {short(now.get(name))} now",
            )
    return None


def unlike_scores(then: "FrozenScore", now: TaskScore | None) -> tuple[str, str] | None:
    """Return in what a score cannot be compared with the frozen one: task, items, or the scoring;
    None where it can.
    """
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
    return _unlike_scoring(then, now)


def _unlike_scoring(then: "FrozenScore", now: TaskScore) -> tuple[str, str] | None:
    """Return where answers are judged otherwise than in the baseline; seen for sure where not one
    of them differs.
    """
    if then.metric and now.metric and now.metric != then.metric:
        return "metric", f"{then.metric} in the baseline, {now.metric} now"
    if now.answers_digest == then.answers_digest and (unlike := unlike_figures(then, now)):
        return "scoring", f"the scoring changed: the same answers, {unlike}"
    if now.parts != then.parts and not (now.unpaired or then.unpaired):
        return "weights", "items count with other weights than in the baseline"
    return None


def _judged(pairs: Mapping[tuple[str, str], Sequence[Pair]], rules: Rules) -> list[Finding]:
    """Judge what may be compared: what changed is tested, Holm over rows, tasks and pools together,
    perplexities among them.
    """
    findings: list[Finding] = []
    changed: list[tuple[str, str, Sequence[Pair]]] = []
    for (label, task), seeds in pairs.items():
        if all(pair.same_answers for pair in seeds):
            findings.append(unchanged(label, task, seeds, rules))
        elif why := seeds[0].now.unpaired or seeds[0].then.unpaired:
            told = f"{seeds[0].then.value:.4g} -> {seeds[0].now.value:.4g}; {why}"
            findings.append(
                Finding(
                    layer="frozen", row=label, task=task, verdict=Verdict.cannot_tell, told=told
                )
            )
        else:
            changed.append((label, task, seeds))
    pools = frozen_pools(pairs, rules)
    adjusted = stats.holm(
        [*(_p_of_fall(seeds, rules) for *_, seeds in changed), *(pool.p for pool in pools)]
    )
    alone, together = adjusted[: len(changed)], adjusted[len(changed) :]
    findings += [
        _verdict(Tested(label, task, seeds, p, len(adjusted), rules))
        for (label, task, seeds), p in zip(changed, alone, strict=True)
    ]
    return findings + judged_pools(pools, together, len(adjusted), rules)


def _p_of_fall(seeds: Sequence[Pair], rules: Rules) -> float:
    """Return the one-sided p of "nothing was lost"."""
    score = seeds[0].now
    if score.kind == "perplexity":
        return rise_of(seeds).keeps(1 + rules.perplexity)[1]
    if are_hits(seeds):
        frozen, current = runs_of(seeds)
        return stats.net_change_test(current, frozen).p
    before, after = numbers_of(seeds)
    p: float = tests_of(score).inferiority_test(
        after, before, score.parts, lower=score.lower_is_better
    )
    return p


def _verdict(one: Tested) -> Finding:
    if one.seeds[0].now.kind == "perplexity":
        return documents_against_frozen(one)
    return hits_against_frozen(one) if are_hits(one.seeds) else numbers_against_frozen(one)


def _bytes(row: "FrozenRow", record: RunRecord) -> list[Finding]:
    """Compare weight bytes exactly: fewer are said, more are a regression."""
    now = record.student.weight_bytes if record.student else None
    if row.weight_bytes is None or now is None:
        return []
    told = f"{now:,} bytes of weights" + (
        "" if now == row.weight_bytes else f", {row.weight_bytes:,} in the baseline"
    )
    verdict = Verdict.regressed if now > row.weight_bytes else Verdict.passed
    numbers: Numbers = {"bytes": now, "before": row.weight_bytes}
    return [
        Finding(
            layer="bytes",
            row=row.label,
            verdict=verdict,
            told=told,
            numbers=numbers,
            warning=now < row.weight_bytes,
        )
    ]
