"""The frozen layer of `harness check`: has a row lost more items than it won against its own frozen outcomes (McNemar)? No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from harness import means, stats
from harness.findings import Finding, Rules, Verdict, is_judged, not_comparable, short
from harness.gate_pooled import frozen_pools, judged_pools
from harness.groups import TEACHER, of_documents
from harness.record import RunRecord, TaskScore

if TYPE_CHECKING:
    from harness.baseline import Baseline, FrozenRow, FrozenScore


@dataclass(frozen=True)
class _Pair:
    """A frozen score and the one that stands against it."""

    row: "FrozenRow"
    then: "FrozenScore"
    record: RunRecord
    now: TaskScore


def frozen_findings(records: Sequence[RunRecord], baseline: "Baseline", rules: Rules) -> list[Finding]:
    """Judge every frozen row by its own outcomes of then; seeds of a row are judged together, item by item. Controls only when named."""
    found: list[Finding] = []
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    for row in baseline.rows:
        if (row.label not in rules.rows) if rules.rows and row.label != TEACHER else (row.control and row.label not in rules.rows):
            continue
        record = next((one for one in records if (one.label, one.seed) == (row.label, row.seed)), None)
        seed = f" (seed {row.seed})" if row.seed is not None else ""
        if record is None or record.status != "success":
            if record is None or not is_judged(record, rules):  # a judged row that failed is told by `_broken`
                told = f"the baseline's row {row.label}{seed} has no record" + (f" that succeeded: {record.reason}" if record else "")
                found.append(not_comparable("frozen", row.label, "", "rows" if record is None else "status", told))
            continue
        unlike = _conditions(row, record)
        if unlike:
            found.append(not_comparable("frozen", row.label, "", *unlike))
            continue
        found += _bytes(row, record)
        for then in row.scores:
            now = record.score(then.task)
            wrong = _scores_unlike(then, now)
            if wrong or now is None:
                found.append(not_comparable("frozen", row.label, then.task, *(wrong or ("items", "missing"))))
            else:
                pairs.setdefault((row.label, then.task), []).append(_Pair(row, then, record, now))
    return found + _regressions(pairs, rules)


def _conditions(row: "FrozenRow", record: RunRecord) -> tuple[str, str] | None:
    """Return the first condition that differs, with both its values; None where the two may be compared."""
    now = row.conditions_of(record)
    for name, then in row.conditions.items():
        if now.get(name) != then:
            return name, f"{name} differs: {short(then)} in the baseline, {short(now.get(name))} now"
    return None


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
    """Judge what changed: Holm over rows and tasks together, perplexities and pooled tests among them."""
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
            p = stats.ratio_keeps(of_documents([now], [then], alike[0].now), 1 + rules.perplexity)[1]
            tested.append((label, task, alike, p))
        elif not _hits(alike):
            before, after = _numbers(alike)
            lower = alike[0].now.lower_is_better
            tested.append((label, task, alike, means.worse(after, before, alike[0].now.parts, lower=lower)))
        else:
            tested.append((label, task, alike, stats.net_loss(*_runs(alike))[1]))
    pools = frozen_pools(pairs, rules)
    adjusted = stats.holm([*(p for *_, p in tested), *(pool.p for pool in pools)])
    tests = len(adjusted)
    for (label, task, alike, _), p in zip(tested, adjusted[: len(tested)], strict=True):
        judge = _against_frozen if _hits(alike) else _means_against_frozen
        judge = _perplexity_against_frozen if alike[0].now.kind == "perplexity" else judge
        found.append(judge(label, task, alike, p, tests, rules))
    return found + judged_pools(pools, adjusted[len(tested) :], tests, rules)


def _hits(alike: Sequence[_Pair]) -> bool:
    return all(one.now.hit_or_miss and one.then.packed and not one.then.parts for one in alike)


def _numbers(alike: Sequence[_Pair]) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Return the items' numbers of then and now, run by run."""
    return [one.then.numbers for one in alike], [one.now.numbers for one in alike]


def _means_against_frozen(label: str, task: str, alike: Sequence[_Pair], p: float, tests: int, rules: Rules) -> Finding:
    """Judge items that carry numbers: tolerance and detectable drop are shares of 1, or of the frozen figure where it is no share."""
    before, after = _numbers(alike)
    score, n = alike[0].now, len(after[0])
    figures = [fmean(means.weighted(run, score.parts) for run in side) for side in (before, after)]
    drop = (figures[0] - figures[1]) * (-1 if score.lower_is_better else 1)
    unit = 1.0 if score.unit == "share" else abs(figures[0])
    error = means.error_of_difference(after, before, score.parts)
    reach = (NormalDist().inv_cdf(1 - rules.frozen_alpha / tests) + NormalDist().inv_cdf(0.8)) * error
    sign = -1 if score.lower_is_better else 1
    items = tuple(at for at in range(n) if sign * sum(now[at] - then[at] for now, then in zip(after, before, strict=True)) < 0)
    told = f"{score.shown(figures[0])} -> {score.shown(figures[1])}, {len(items)} of {n:,} items worse, p {p:.2g}"
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
    found, limit = of_documents([now], [then], alike[0].now), 1 + rules.perplexity
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
