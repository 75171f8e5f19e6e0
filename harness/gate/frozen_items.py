"""A frozen score and the one that stands against it: are answers and outcomes the same, and if not,
has it fallen? No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from harness.analysis.comparison import ItemValues, tests_of, values_of
from harness.gate.rules import Finding, Rules, Verdict, decides
from harness.records.record import RunRecord, TaskScore
from harness.statistics import stats

if TYPE_CHECKING:
    from harness.records.baseline import Baseline, FrozenRow, FrozenScore

Numbers = dict[str, float | int | None]


@dataclass(frozen=True)
class Pair:
    """A frozen score and the one that stands against it."""

    row: "FrozenRow"
    then: "FrozenScore"
    record: RunRecord
    now: TaskScore

    @property
    def same_answers(self) -> bool:
        """Tell whether not one answer differs; choices by their positions."""
        return self.now.answers_digest == self.then.answers_digest

    @property
    def anew(self) -> bool:
        """Tell whether the student is another training than the frozen one."""
        return bool(
            self.row.trains
            and self.record.student
            and self.record.student.digest != self.row.student_digest
        )

    @property
    def same_machine(self) -> bool:
        """Tell whether processor, threads and versions are the frozen ones."""
        return self.row.machine == self.row.machine_of(self.record)


@dataclass(frozen=True)
class Tested:
    """A row and task whose items changed: its seeds, its p value among so many tests (Holm), and
    what is asked of it.
    """

    label: str
    task: str
    seeds: Sequence[Pair]
    p: float
    tests: int
    rules: Rules

    @property
    def significant(self) -> bool:
        """Tell whether it fell by more than chance explains."""
        return self.p < self.rules.frozen_alpha

    @property
    def changed_where_nothing_may(self) -> bool:
        """Tell whether `--exact` forbids any change here."""
        return self.rules.exact and all(pair.same_machine for pair in self.seeds)

    def finding(
        self,
        verdict: Verdict,
        told: str,
        numbers: Numbers,
        *,
        differs: str = "",
        warning: bool = False,
        items: tuple[int, ...] = (),
    ) -> Finding:
        """Return what came of it."""
        return Finding(
            layer="frozen",
            row=self.label,
            task=self.task,
            verdict=verdict,
            told=told,
            differs=differs,
            numbers=numbers,
            warning=warning,
            items=items,
        )

    def fallen(self, per_seed: Sequence[float]) -> tuple[Verdict, str]:
        """Judge a fall that is no matter of items alone: of rows that were trained anew the seeds
        must agree (Student's t).

        `per_seed`: each seed's own change, below zero where it is worse. Returns the verdict and
        what is to be added to the line.
        """
        if not any(pair.anew for pair in self.seeds):
            return Verdict.regressed, ""
        if len(self.seeds) == 1:
            return (
                Verdict.regressed,
                "; trained anew: one seed may be an unlucky training, freeze three",
            )
        if stats.mean_below(per_seed) < self.rules.alpha:
            return Verdict.regressed, ""
        return (
            Verdict.cannot_tell,
            f"; trained anew, and the {len(self.seeds)} seeds do not agree; more would decide",
        )


def margin_of(baseline: "Baseline | None", label: str, rules: Rules) -> Rules:
    """Return the rules that a row's claim is held to: its own margin where the baseline keeps one,
    else what is asked of all rows.
    """
    own = next(
        (
            row
            for row in (baseline.rows if baseline else ())
            if row.label == label and row.margin is not None
        ),
        None,
    )
    return replace(rules, margin=own.margin, points=own.points) if own else rules


def unlike_figures(then: "FrozenScore", now: TaskScore) -> str:
    """Say in what two scores of the same answers differ: outcomes, values, documents, weights or
    the figure itself; "" where in nothing.
    """
    before: Sequence[object] = then.statistics or then.numbers
    after: Sequence[object] = now.statistics or now.numbers
    what = "outcomes" if then.packed and now.hit_or_miss else "values"
    if then.kind == "perplexity":
        before, after, what = then.totals, now.totals, "documents"
    if before and after:  # a baseline may be older than what its figure's items are known to add
        if len(before) != len(after):
            return f"{len(before):,} {what} then, {len(after):,} now"
        if differing := sum(old != new for old, new in zip(before, after, strict=True)):
            return f"{differing:,} {what} differ"
        if then.parts != now.parts:
            return "the items have other weights"
    same = math.isclose(then.value, now.value, rel_tol=1e-9, abs_tol=1e-12)
    return "" if same else f"the figure is another one ({then.value:.4g} -> {now.value:.4g})"


def unchanged(label: str, task: str, seeds: Sequence[Pair], rules: Rules) -> Finding:
    """Return the finding that not one answer, and nothing that was made of them, differs.

    Log-probabilities are said: rounding on another machine moves them. With `--exact`, on the
    frozen machine, they are judged too.
    """
    n = seeds[0].then.n
    digests = [(pair.then.likelihoods_digest, pair.now.likelihoods_digest) for pair in seeds]
    known = all(then and now for then, now in digests)
    equal = all(then == now for then, now in digests)
    told = f"not one of {n:,} answers differs"
    if known:
        told += (
            ", and log-probabilities are equal to the last bit"
            if equal
            else "; log-probabilities are not equal to the last bit"
        )
    numbers: Numbers = {
        "n": n,
        "lost": 0,
        "won": 0,
        "drop": 0.0,
        "likelihoods_equal": int(equal) if known else None,
    }
    verdict = Verdict.passed
    if rules.exact and known and not equal and all(pair.same_machine for pair in seeds):
        verdict, told = (
            Verdict.regressed,
            f"{told}; --exact: none may move on the same machine and versions",
        )
    return Finding(
        layer="frozen", row=label, task=task, verdict=verdict, told=told, numbers=numbers
    )


def are_hits(seeds: Sequence[Pair]) -> bool:
    """Tell whether every item was and is right or wrong and all count alike."""
    return all(pair.now.hit_or_miss and pair.then.packed and not pair.then.parts for pair in seeds)


def runs_of(seeds: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Return the outcomes of then and now, run by run."""
    return [pair.then.outcomes for pair in seeds], [
        pair.now.outcomes[pair.now.primary] for pair in seeds
    ]


def numbers_of(seeds: Sequence[Pair]) -> tuple[list[ItemValues], list[ItemValues]]:
    """Return the items' numbers of then and now, or what they add to the figure, run by run."""
    return [values_of(pair.then) for pair in seeds], [values_of(pair.now) for pair in seeds]


def hits_against_frozen(one: Tested) -> Finding:
    """Judge right and wrong answers: each item by its net change over the seeds."""
    rules, (then, now) = one.rules, runs_of(one.seeds)
    n, seeds = len(now[0]), len(now)
    net, _ = stats.net_loss(then, now)
    lost, won = (
        tuple(at for at, change in enumerate(net) if change < 0),
        sum(change > 0 for change in net),
    )
    right = [sum(run.count("1") for run in side) for side in (then, now)]
    drop, flips = (
        (right[0] - right[1]) / (n * seeds),
        sum(change * change for change in net) / (n * seeds**2),
    )
    needed = stats.items_for(flips, rules.detect, alpha=rules.frozen_alpha / one.tests)
    numbers: Numbers = {
        "n": n,
        "seeds": seeds,
        "lost": len(lost),
        "won": won,
        "drop": drop,
        "p_holm": one.p,
        "flips": flips,
        "needed": needed,
    }
    net_over = f" (net over {seeds} seeds)" if seeds > 1 else ""
    shown = [f"{100 * count / (n * seeds):.1f} %" for count in right]
    told = (
        f"{shown[0]} -> {shown[1]}, {len(lost)} lost and {won} won of {n:,}{net_over}, p "
        f"{one.p:.2g}"
    )
    if one.changed_where_nothing_may and then != now:
        told += "; --exact: no item may flip on the same machine and versions"
        return one.finding(Verdict.regressed, told, numbers, items=lost)
    if one.significant and drop > rules.tolerance:
        verdict, more = one.fallen(
            [new.count("1") - old.count("1") for new, old in zip(now, then, strict=True)]
        )
        return one.finding(verdict, told + more, numbers, items=lost)
    if unlike := drifted(one.seeds, rules):
        return one.finding(
            Verdict.not_comparable, f"{told}; {unlike[1]}", numbers, differs=unlike[0], items=lost
        )
    verdict, more = _hits_that_did_not_fall(one, numbers, needed, drop, flips)
    return one.finding(
        verdict,
        told + more,
        numbers,
        warning=verdict is Verdict.passed and one.significant,
        items=lost,
    )


def _hits_that_did_not_fall(
    one: Tested, numbers: Numbers, needed: int, drop: float, flips: float
) -> tuple[Verdict, str]:
    """Tell whether these items could have shown a fall; the verdict and what is to be added to the
    line, and to `numbers`.
    """
    detect, score = f"{100 * one.rules.detect:g} points", one.seeds[0].now
    if needed > score.n:
        decided = decides(needed, score, one.seeds[0].record.conditions.limited)
        numbers |= {"needed": decided.needed, "task_items": decided.task_items}
        told = (
            f"; {score.n:,} items cannot show a drop of {detect} at {100 * flips:.1f} % flips; "
            f"{decided.told}"
        )
        return Verdict.cannot_tell, told
    if drop > one.rules.detect:
        return Verdict.cannot_tell, f"; a drop of more than {detect} that the flips both ways hide"
    within = f"; significant, but within the tolerance of {100 * one.rules.tolerance:g} points"
    return Verdict.passed, within if one.significant else ""


def numbers_against_frozen(one: Tested) -> Finding:
    """Judge items that carry numbers: tolerance and detectable drop are shares of 1, or of the
    frozen figure where it is no share.
    """
    rules, (before, after) = one.rules, numbers_of(one.seeds)
    score, n = one.seeds[0].now, one.seeds[0].now.n
    tests = tests_of(score)
    sign = -1 if score.lower_is_better else 1
    by_seed = [[tests.weighted(run, score.parts) for run in side] for side in (before, after)]
    figures = [fmean(side) for side in by_seed]
    drop, unit = (
        sign * (figures[0] - figures[1]),
        1.0 if score.unit == "share" or score.signed else abs(figures[0]),
    )
    error = tests.error_of_difference(after, before, score.parts)
    reach = (
        NormalDist().inv_cdf(1 - rules.frozen_alpha / one.tests) + NormalDist().inv_cdf(0.8)
    ) * error
    # no item alone is worse in such a figure
    runs = [] if score.form else [(pair.now.numbers, pair.then.numbers) for pair in one.seeds]
    items = tuple(at for at in range(n) if sign * sum(now[at] - then[at] for now, then in runs) < 0)
    counted = f"{n:,} items" if score.form else f"{len(items)} of {n:,} items worse"
    told = f"{score.shown(figures[0])} -> {score.shown(figures[1])}, {counted}, p {one.p:.2g}"
    numbers: Numbers = {
        "n": n,
        "seeds": len(after),
        "lost": len(items),
        "drop": drop,
        "p_holm": one.p,
        "reach": reach,
    }
    if one.changed_where_nothing_may and before != after:
        told += "; --exact: no item may change on the same machine and versions"
        return one.finding(Verdict.regressed, told, numbers, items=items)
    if one.significant and drop > rules.tolerance * unit:
        verdict, more = one.fallen(
            [sign * (now - then) for then, now in zip(*by_seed, strict=True)]
        )
        return one.finding(verdict, told + more, numbers, items=items)
    if unlike := drifted(one.seeds, rules):
        return one.finding(
            Verdict.not_comparable, f"{told}; {unlike[1]}", numbers, differs=unlike[0], items=items
        )
    if reach > rules.detect * unit:
        told += (
            f"; {n:,} items show drops from {score.shown(reach)} on, not from "
            f"{score.shown(rules.detect * unit)}"
        )
        return one.finding(Verdict.cannot_tell, told, numbers, items=items)
    told += "; significant, but within the tolerance" if one.significant else ""
    return one.finding(Verdict.passed, told, numbers, warning=one.significant, items=items)


def drifted(seeds: Sequence[Pair], rules: Rules) -> tuple[str, str] | None:
    """Tell whether the form of the answers changed so much that scores stand for something else."""
    for pair in seeds:
        rise = pair.now.invalid_share - pair.then.invalid_share
        if rise > rules.invalid:
            return (
                "invalid share",
                f"{100 * rise:.1f} points more answers than before cannot be read",
            )
        cut = (pair.now.truncated_share or 0.0) - (pair.then.truncated_share or 0.0)
        if cut > rules.invalid:
            return (
                "truncated share",
                f"{100 * cut:.1f} points more answers than before run into the longest length",
            )
        if pair.then.tokens and pair.now.tokens_per_answer:
            ratio = pair.now.tokens_per_answer / pair.then.tokens
            if not rules.length[0] <= ratio <= rules.length[1]:
                return (
                    "answer length",
                    f"answers have {ratio:.2f} times the tokens of then (MLPerf's band: 0.9 to "
                    "1.1)",
                )
    return None
