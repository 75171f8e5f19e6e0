"""Compare a frozen score with the current one, item by item. No torch.

Are the answers and their outcomes the same? If not, did the score fall?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from harness.analysis.comparison import ItemValues, tests_of, values_of
from harness.gate.rules import Difference, Finding, Rules, Verdict, items_needed
from harness.records.record import RunRecord, TaskScore
from harness.statistics import stats

if TYPE_CHECKING:
    from harness.records.baseline import Baseline, FrozenRow, FrozenScore

Numbers = dict[str, float | int | None]
T = TypeVar("T")


class BeforeAfter(NamedTuple, Generic[T]):
    """One thing as it was frozen, and as it is now."""

    before: T
    after: T


class Judgement(NamedTuple):
    """A verdict, and what it adds to the finding's line."""

    verdict: Verdict
    remark: str = ""


@dataclass(frozen=True)
class FrozenPair:
    """A frozen score and the current one of the same row, seed and task."""

    row: "FrozenRow"
    frozen: "FrozenScore"
    record: RunRecord
    current: TaskScore

    @property
    def same_answers(self) -> bool:
        """Tell whether not one answer differs; choices are compared by their positions."""
        return self.current.answers_digest == self.frozen.answers_digest

    @property
    def retrained(self) -> bool:
        """Tell whether the student comes from another training than the frozen one."""
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
class ChangedScore:
    """A row and task with changed answers, to be judged by a test of its seeds."""

    label: str
    task: str
    seeds: Sequence[FrozenPair]
    p: float  # of "nothing was lost", adjusted by Holm
    tests: int  # how many tests share the error rate
    rules: Rules

    @property
    def significant(self) -> bool:
        """Tell whether it fell by more than chance explains."""
        return self.p < self.rules.frozen_alpha

    @property
    def must_be_equal(self) -> bool:
        """Tell whether `--exact` forbids any change: machine and versions are the frozen ones."""
        return self.rules.exact and all(pair.same_machine for pair in self.seeds)

    def finding(
        self,
        verdict: Verdict,
        line: str,
        numbers: Numbers,
        *,
        differs: str = "",
        warning: bool = False,
        items: tuple[int, ...] = (),
    ) -> Finding:
        """Return the finding on this row and task."""
        return Finding(
            layer="frozen",
            row=self.label,
            task=self.task,
            verdict=verdict,
            told=line,
            differs=differs,
            numbers=numbers,
            warning=warning,
            items=items,
        )

    def judge_loss(self, changes: Sequence[float]) -> Judgement:
        """Judge a significant loss. If the row was trained anew, its seeds must agree.

        `changes` holds each seed's own change, below zero where it is worse (Student's t).
        """
        if not any(pair.retrained for pair in self.seeds):
            return Judgement(Verdict.regressed)
        if len(self.seeds) == 1:
            return Judgement(
                Verdict.regressed,
                "; trained anew: one seed may be an unlucky training, freeze three",
            )
        if stats.negative_mean_test(changes) < self.rules.alpha:
            return Judgement(Verdict.regressed)
        return Judgement(
            Verdict.cannot_tell,
            f"; trained anew, and the {len(self.seeds)} seeds do not agree; more would decide",
        )


def rules_for_row(baseline: "Baseline | None", label: str, rules: Rules) -> Rules:
    """Return the rules for a row's claim: with its own margin, if the baseline has one."""
    for row in baseline.rows if baseline else ():
        if row.label == label and row.margin is not None:
            return replace(rules, margin=row.margin, points=row.points)
    return rules


def figure_difference(frozen: "FrozenScore", current: TaskScore) -> str:
    """Return how two scores of the same answers differ, "" if they do not.

    Outcomes, values, documents, weights and the figure itself are compared.
    """
    before: Sequence[object] = frozen.statistics or frozen.numbers
    after: Sequence[object] = current.statistics or current.numbers
    unit = "outcomes" if frozen.packed and current.hit_or_miss else "values"
    if frozen.kind == "perplexity":
        before, after, unit = frozen.totals, current.totals, "documents"
    if before and after:  # an old baseline may lack the values of its items
        if len(before) != len(after):
            return f"{len(before):,} {unit} then, {len(after):,} now"
        if differing := sum(old != new for old, new in zip(before, after, strict=True)):
            return f"{differing:,} {unit} differ"
        if frozen.parts != current.parts:
            return "the items have other weights"
    if math.isclose(frozen.value, current.value, rel_tol=1e-9, abs_tol=1e-12):
        return ""
    return f"the figure is another one ({frozen.value:.4g} -> {current.value:.4g})"


def unchanged_finding(label: str, task: str, seeds: Sequence[FrozenPair], rules: Rules) -> Finding:
    """Return the finding that not one answer differs, nor its outcome.

    The line mentions other log-probabilities, which rounding on another machine may cause. With
    `--exact` and on the frozen machine they are a regression.
    """
    n = seeds[0].frozen.n
    digests = [
        BeforeAfter(pair.frozen.likelihoods_digest, pair.current.likelihoods_digest)
        for pair in seeds
    ]
    comparable = all(pair.before and pair.after for pair in digests)
    equal = all(pair.before == pair.after for pair in digests)
    line = f"not one of {n:,} answers differs"
    if comparable:
        line += (
            ", and log-probabilities are equal to the last bit"
            if equal
            else "; log-probabilities are not equal to the last bit"
        )
    verdict = Verdict.passed
    if rules.exact and comparable and not equal and all(pair.same_machine for pair in seeds):
        verdict = Verdict.regressed
        line += "; --exact: none may change on the same machine and versions"
    numbers: Numbers = {
        "n": n,
        "lost": 0,
        "won": 0,
        "drop": 0.0,
        "likelihoods_equal": int(equal) if comparable else None,
    }
    return Finding(
        layer="frozen", row=label, task=task, verdict=verdict, told=line, numbers=numbers
    )


def are_hits(seeds: Sequence[FrozenPair]) -> bool:
    """Tell whether every item was and is right or wrong, and all items count alike."""
    return all(
        pair.current.hit_or_miss and pair.frozen.packed and not pair.frozen.parts for pair in seeds
    )


def outcomes_by_run(seeds: Sequence[FrozenPair]) -> BeforeAfter[list[str]]:
    """Return the outcomes of each run: a string of "0" and "1" per item."""
    return BeforeAfter(
        [pair.frozen.outcomes for pair in seeds],
        [pair.current.outcomes[pair.current.primary] for pair in seeds],
    )


def item_values_by_run(seeds: Sequence[FrozenPair]) -> BeforeAfter[list[ItemValues]]:
    """Return the values of each run's items, or what each item adds to the figure."""
    return BeforeAfter(
        [values_of(pair.frozen) for pair in seeds], [values_of(pair.current) for pair in seeds]
    )


def judge_hits(changed: ChangedScore) -> Finding:
    """Judge right and wrong answers: each item by its net change over the seeds."""
    rules, runs = changed.rules, outcomes_by_run(changed.seeds)
    n, seeds = len(runs.after[0]), len(runs.after)
    net = stats.net_change_test(runs.after, runs.before).items
    lost = tuple(position for position, change in enumerate(net) if change < 0)
    won = sum(change > 0 for change in net)
    hits = BeforeAfter(*(sum(run.count("1") for run in side) for side in runs))
    drop = (hits.before - hits.after) / (n * seeds)
    flips = sum(change * change for change in net) / (n * seeds**2)
    needed = stats.items_to_detect(flips, rules.detect, alpha=rules.frozen_alpha / changed.tests)
    numbers: Numbers = {
        "n": n,
        "seeds": seeds,
        "lost": len(lost),
        "won": won,
        "drop": drop,
        "p_holm": changed.p,
        "flips": flips,
        "needed": needed,
    }
    shares = " -> ".join(f"{100 * count / (n * seeds):.1f} %" for count in hits)
    over_seeds = f" (net over {seeds} seeds)" if seeds > 1 else ""
    line = f"{shares}, {len(lost)} lost and {won} won of {n:,}{over_seeds}, p {changed.p:.2g}"
    changes = [after.count("1") - before.count("1") for before, after in zip(*runs, strict=True)]
    evidence = _Evidence(line, numbers, lost)
    if finding := _finding_of_a_change(
        changed,
        evidence,
        differs=runs.before != runs.after,
        is_loss=drop > rules.tolerance,
        changes=changes,
        word="flip",
    ):
        return finding
    judgement = _judge_hits_without_loss(changed, numbers, needed, drop, flips)
    warning = judgement.verdict is Verdict.passed and changed.significant
    return changed.finding(
        judgement.verdict, line + judgement.remark, numbers, warning=warning, items=lost
    )


class _Evidence(NamedTuple):
    """What a finding says of a change: its line, its numbers, and the items that got worse."""

    line: str
    numbers: Numbers
    items: tuple[int, ...]


def _finding_of_a_change(
    changed: ChangedScore,
    evidence: _Evidence,
    *,
    differs: bool,
    is_loss: bool,
    changes: Sequence[float],
    word: str,
) -> Finding | None:
    """Return the finding where the change itself decides; None where it is small, or chance.

    It decides where nothing may change (`--exact`), where the score fell by more than the tolerance
    (`changes` by seed, negative where it fell), and where the answers have another form now.
    """
    line, numbers, items = evidence
    if changed.must_be_equal and differs:
        line += f"; --exact: no item may {word} on the same machine and versions"
        return changed.finding(Verdict.regressed, line, numbers, items=items)
    if changed.significant and is_loss:
        judgement = changed.judge_loss(changes)
        return changed.finding(judgement.verdict, line + judgement.remark, numbers, items=items)
    difference = answer_form_difference(changed.seeds, changed.rules)
    if difference is None:
        return None
    return changed.finding(
        Verdict.not_comparable,
        f"{line}; {difference.text}",
        numbers,
        differs=difference.condition,
        items=items,
    )


def _judge_hits_without_loss(
    changed: ChangedScore, numbers: Numbers, needed: int, drop: float, flips: float
) -> Judgement:
    """Judge whether these items could have shown a loss; adds to `numbers` how many would."""
    rules, score = changed.rules, changed.seeds[0].current
    detect = f"{100 * rules.detect:g} points"
    if needed > score.n:
        decision = items_needed(needed, score, not changed.seeds[0].record.conditions.has_all_items)
        numbers |= {"needed": decision.needed, "task_items": decision.task_items}
        return Judgement(
            Verdict.cannot_tell,
            f"; {score.n:,} items cannot show a drop of {detect} at {100 * flips:.1f} % flips; "
            f"{decision.text}",
        )
    if drop > rules.detect:
        return Judgement(
            Verdict.cannot_tell,
            f"; a drop of more than {detect}, hidden by flips in both directions",
        )
    if changed.significant:
        tolerance = f"{100 * rules.tolerance:g} points"
        return Judgement(Verdict.passed, f"; significant, but within the tolerance of {tolerance}")
    return Judgement(Verdict.passed)


def judge_values(changed: ChangedScore) -> Finding:
    """Judge items that have values.

    Tolerance and detectable drop are shares of 1, or of the frozen figure if it is no share.
    """
    rules, values = changed.rules, item_values_by_run(changed.seeds)
    score = changed.seeds[0].current
    tests = tests_of(score)
    sign = -1 if score.lower_is_better else 1
    by_seed = BeforeAfter(
        *([tests.run_figure(run, score.parts) for run in side] for side in values)
    )
    figures = BeforeAfter(*(fmean(side) for side in by_seed))
    drop = sign * (figures.before - figures.after)
    scale = 1.0 if score.unit == "share" or score.signed else abs(figures.before)
    error = tests.error_of_difference(values.after, values.before, score.parts)
    z = NormalDist().inv_cdf(1 - rules.frozen_alpha / changed.tests) + NormalDist().inv_cdf(0.8)
    reach = z * error
    items = _worse_items(changed.seeds, score, sign)
    counted = f"{score.n:,} items" if score.form else f"{len(items)} of {score.n:,} items worse"
    line = (
        f"{score.format_value(figures.before)} -> {score.format_value(figures.after)}, {counted}, "
        f"p {changed.p:.2g}"
    )
    numbers: Numbers = {
        "n": score.n,
        "seeds": len(values.after),
        "lost": len(items),
        "drop": drop,
        "p_holm": changed.p,
        "reach": reach,
    }
    if finding := _finding_of_a_change(
        changed,
        _Evidence(line, numbers, items),
        differs=values.before != values.after,
        is_loss=drop > rules.tolerance * scale,
        changes=[sign * (after - before) for before, after in zip(*by_seed, strict=True)],
        word="change",
    ):
        return finding
    if reach > rules.detect * scale:
        line += (
            f"; {score.n:,} items can show drops from {score.format_value(reach)} on, not from "
            f"{score.format_value(rules.detect * scale)}"
        )
        return changed.finding(Verdict.cannot_tell, line, numbers, items=items)
    line += "; significant, but within the tolerance" if changed.significant else ""
    return changed.finding(Verdict.passed, line, numbers, warning=changed.significant, items=items)


def _worse_items(seeds: Sequence[FrozenPair], score: TaskScore, sign: int) -> tuple[int, ...]:
    """Return the positions of the items that got worse over the seeds.

    In a figure that only all items together have (`form`), no single item is worse.
    """
    if score.form:
        return ()
    runs = [BeforeAfter(pair.frozen.numbers, pair.current.numbers) for pair in seeds]
    return tuple(
        position
        for position in range(score.n)
        if sign * sum(run.after[position] - run.before[position] for run in runs) < 0
    )


def answer_form_difference(seeds: Sequence[FrozenPair], rules: Rules) -> Difference | None:
    """Return how the form of the answers changed too much for a comparison, None if it did not."""
    for pair in seeds:
        frozen, current = pair.frozen, pair.current
        rise = current.invalid_share - frozen.invalid_share
        if rise > rules.invalid:
            return Difference(
                "invalid share", f"{100 * rise:.1f} points more answers than before cannot be read"
            )
        rise = (current.truncated_share or 0.0) - (frozen.truncated_share or 0.0)
        if rise > rules.invalid:
            return Difference(
                "truncated share",
                f"{100 * rise:.1f} points more answers than before are cut at the longest length",
            )
        if frozen.tokens and current.tokens_per_answer:
            ratio = current.tokens_per_answer / frozen.tokens
            if not rules.length[0] <= ratio <= rules.length[1]:
                return Difference(
                    "answer length",
                    f"answers have {ratio:.2f} times as many tokens as before (MLPerf's band: "
                    "0.9 to 1.1)",
                )
    return None
