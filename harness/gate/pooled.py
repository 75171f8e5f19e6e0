"""Decisions pooled over a row's tasks: together they may show what each is too small for. No torch.

A claim pools the tasks with paired shares as items, more being better, on which the teacher is
above chance; an item counts by its value above its task's chance. Frozen items are pooled without
that: McNemar's test over all of them. A finding states the weights of the tasks (`--task-weights`).
The pooled tests belong to one Holm family with the tests of the single tasks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import NormalDist
from typing import NamedTuple

from harness.analysis.comparison import ResultRow
from harness.errors import HarnessError, unknown
from harness.gate.claim import (
    ClaimedRow,
    Numbers,
    RetentionClaim,
    figure_text,
    margin_numbers,
    teacher_at_chance_reason,
)
from harness.gate.frozen_items import BeforeAfter, FrozenPair
from harness.gate.rules import Finding, Rules, Verdict, items_needed_among, task_items
from harness.records.record import TaskScore
from harness.statistics import means, stats

ItemsByRun = list[tuple[float, ...]]  # a run's items, task after task


def validate_rules(rules: Rules, tasks: Collection[str]) -> None:
    """Raise `HarnessError` for rules out of range and for weights of other tasks than `tasks`."""
    if rules.margin is not None and not 0 < rules.margin < 1:
        raise HarnessError(
            f"a margin of {rules.margin:g}: give the share that must be kept, between 0 and 1, or "
            "what may be lost (2points)"
        )
    for name, share in (("alpha", rules.alpha), ("frozen_alpha", rules.frozen_alpha)):
        if not 0 < share < 0.5:
            raise HarnessError(f"{name} {share:g}: give a share between 0 and 0.5, such as 0.05")
    if not 0 < rules.detect <= 1 or not 0 <= rules.tolerance <= 1:
        raise HarnessError(
            f"detect {rules.detect:g}, tolerance {rules.tolerance:g}: give shares of the items, "
            "such as 0.05 and 0.02"
        )
    if rules.decide not in ("tasks", "pooled"):
        raise unknown("way to decide", rules.decide, ("tasks", "pooled"))
    if isinstance(rules.task_weights, str):
        if rules.task_weights not in ("items", "tasks"):
            raise unknown("task weights", rules.task_weights, ("items", "tasks"))
        return
    for name, _ in rules.task_weights:
        if name not in tasks:
            raise unknown("task in --task-weights", name, sorted(tasks))
    if len(rules.task_weights) < 2:
        raise HarnessError(
            "--task-weights: one task is no pool; give two or more (mmlu=2,gsm8k=1), or `items` or "
            "`tasks`"
        )


def _weights_of_tasks(rules: Rules, items: Mapping[str, int]) -> dict[str, float]:
    """Return the weight of each pooled task, summing to 1; `items` is their number by task.

    Tasks to which the user gave no weight are left out.
    """
    weighting = rules.task_weights
    raw = {task: 1.0 if weighting == "tasks" else float(count) for task, count in items.items()}
    if not isinstance(weighting, str):
        weight_of = dict(weighting)
        raw = {task: weight_of[task] for task in items if task in weight_of}
    largest = max(raw.values(), default=1.0)
    # scaled first, so that no sum overflows
    scaled = {task: weight / largest for task, weight in raw.items()}
    return {task: weight / sum(scaled.values()) for task, weight in scaled.items()}


def _weights_text(rules: Rules, weights: Mapping[str, float]) -> str:
    """Return in words how the tasks count."""
    if rules.task_weights == "items":
        return "every item alike"
    if rules.task_weights == "tasks":
        return "every task alike"
    return ", ".join(f"{task} {100 * weight:.3g} %" for task, weight in weights.items())


def _strata(
    weights: Mapping[str, float], scores: Mapping[str, TaskScore]
) -> list[tuple[int, float]]:
    """Return the strata of a pool, (items, weight of each): its tasks, or the parts of a task."""
    strata: list[tuple[int, float]] = []
    for task, weight in weights.items():
        score = scores[task]
        if score.parts:
            strata += [(items, weight * part_weight) for items, part_weight in score.parts]
        else:
            strata.append((score.n, weight / score.n))
    return strata


def _available_items(scores: Sequence[TaskScore], *, limited: Sequence[bool]) -> int | None:
    """Return how many items these tasks have together, None if that is not known of all."""
    counts = [
        task_items(score, limited=of_sample)
        for score, of_sample in zip(scores, limited, strict=True)
    ]
    return sum(count or 0 for count in counts) if all(counts) else None


# The claim


def pooled_claims(rows: Sequence[ClaimedRow]) -> list[RetentionClaim]:
    """Test each row's claim over the items of all its tasks that can be pooled, two at least."""
    claims: dict[str, RetentionClaim] = {}
    for claimed in rows:
        if claimed.row.label not in claims and (claim := _test_pooled_claim(claimed)) is not None:
            claims[claimed.row.label] = claim
    return list(claims.values())


def _test_pooled_claim(claimed: ClaimedRow) -> RetentionClaim | None:
    """Test one row's pooled claim; None where there is nothing to pool or no interval."""
    row, rules = claimed.row, claimed.rules
    poolable = {score.task: score for score in row.first.scores if _can_be_pooled(claimed, score)}
    weights = _weights_of_tasks(rules, {task: score.n for task, score in poolable.items()})
    if len(weights) < 2 or claimed.teacher is None or rules.margin is None:
        return None
    scores = {task: poolable[task] for task in weights}
    above = not rules.points and any(score.chance for score in scores.values())
    student_items = _pooled_items(row, list(scores.values()), above=above)
    teacher_items = _pooled_items(claimed.teacher, list(scores.values()), above=above)
    strata = _strata(weights, scores)
    compare = means.difference_interval if rules.points else means.ratio_interval
    figure = compare(student_items, teacher_items, strata)
    if figure.value is None or figure.low is None:
        return None
    p_met, p_unmet = means.retention_test(
        student_items, teacher_items, rules.margin, strata, points=rules.points
    )
    chance = sum(weight * scores[task].chance for task, weight in weights.items()) if above else 0.0
    n = sum(score.n for score in scores.values())
    limited = not row.first.conditions.has_all_items
    at_chance = [
        score.task for score in row.first.scores if teacher_at_chance_reason(claimed.group, score)
    ]
    return RetentionClaim(
        layer="pooled",
        label=row.label,
        p_met=p_met,
        p_unmet=p_unmet,
        line=_pooled_line(claimed, scores, weights, figure, above=above, chance=chance),
        numbers={
            "value": figure.value,
            "low": figure.low,
            "high": figure.high,
            "n": n,
            "seeds": len(row.records),
            "p_met": p_met,
            "p_unmet": p_unmet,
            **margin_numbers(rules, chance),
        },
        n=n,
        tasks=tuple(scores),
        available_items=_available_items(list(scores.values()), limited=[limited] * len(scores)),
        speaks_for=(*scores, *at_chance),
    )


def _pooled_line(
    claimed: ClaimedRow,
    scores: Mapping[str, TaskScore],
    weights: Mapping[str, float],
    figure: stats.Interval,
    *,
    above: bool,
    chance: float,
) -> str:
    """Return in words what was pooled, the figure, and what it must show."""
    rules = claimed.rules
    tasks = " and ".join(f"{task} ({score.n:,})" for task, score in scores.items())
    n = sum(score.n for score in scores.values())
    unpooled = ", ".join(
        score.task for score in claimed.row.first.scores if score.task not in scores
    )
    return (
        f"{tasks}, {_weights_text(rules, weights)}: {figure_text(figure, rules, above=above)} "
        f"on {n:,} items; must show that it {rules.claim(chance)}"
        f"{unpooled and f'; without {unpooled}'}{claimed.trainings}"
    )


def _can_be_pooled(claimed: ClaimedRow, score: TaskScore) -> bool:
    """Tell whether a task can stand in a pooled claim.

    Its items are paired shares of which more is better, every record has them, and the teacher is
    above chance.
    """
    teacher_scores = claimed.teacher.scores(score.task) if claimed.teacher else []
    row_scores = claimed.row.scores(score.task)
    paired_shares = all(
        candidate.retains
        and candidate.unit == "share"
        and candidate.numbers
        and candidate.items_digest == score.items_digest
        for candidate in (*teacher_scores, *row_scores)
    )
    return (
        bool(teacher_scores)
        and paired_shares
        and len(row_scores) == len(claimed.row.records)
        and score.n > 1
        and not teacher_at_chance_reason(claimed.group, score)
    )


def _pooled_items(row: ResultRow, scores: Sequence[TaskScore], *, above: bool) -> ItemsByRun:
    """Return a row's items, task after task, for each run; `above`: what lies above chance."""
    runs: ItemsByRun = []
    for record in row.records:
        items: list[float] = []
        for score in scores:
            run_score = record.score(score.task)
            if run_score is not None:
                chance = score.chance if above else 0.0
                items += [value - chance for value in run_score.numbers]
        runs.append(tuple(items))
    return runs


# The frozen items


class _PoolChange(NamedTuple):
    """How the items of a pool changed between the frozen runs and the current ones."""

    figures: BeforeAfter[list[float]]  # the pool's figure of each run
    net: Sequence[float]  # each item's change, summed over the runs
    # of the change of the figure; None of hits that all count alike (McNemar's test needs none)
    standard_error: float | None
    p: float  # of "nothing was lost"


@dataclass(frozen=True)
class FrozenPool:
    """A row's frozen tasks together, and how they changed."""

    label: str
    weights: Mapping[str, float]  # of each task
    change: _PoolChange
    available_items: int | None  # how many items these tasks have, if known
    retrained: bool  # the spread between trainings then matters too

    @property
    def n(self) -> int:
        """Number of items of all tasks."""
        return len(self.change.net)

    @property
    def p(self) -> float:
        """The p value of "nothing was lost"."""
        return self.change.p

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.weights)


def frozen_pools(
    pairs: Mapping[tuple[str, str], Sequence[FrozenPair]], rules: Rules
) -> list[FrozenPool]:
    """Return the tests over all tasks of a row against its frozen items.

    A row has one if it has two tasks that can be pooled and an answer changed. `pairs` holds the
    seeds of each row and task.
    """
    by_row: dict[str, dict[str, Sequence[FrozenPair]]] = {}
    for (label, task), seeds in pairs.items():
        score, frozen = seeds[0].current, seeds[0].frozen
        # a figure of single items, not one that only all items together have
        itemwise = score.primary in score.outcomes or score.primary in score.values
        has_items = bool(frozen.packed or frozen.values)
        if score.retains and score.unit == "share" and itemwise and has_items:
            by_row.setdefault(label, {})[task] = seeds
    pools = [_pool(label, tasks, rules) for label, tasks in by_row.items()]
    return [pool for pool in pools if pool is not None and any(pool.change.net)]


def _pool(label: str, tasks: Mapping[str, Sequence[FrozenPair]], rules: Rules) -> FrozenPool | None:
    """Pool the seeds that every weighted task has; None below two tasks or without such a seed."""
    weights = _weights_of_tasks(rules, {task: seeds[0].current.n for task, seeds in tasks.items()})
    by_seed = {task: {pair.record.seed: pair for pair in tasks[task]} for task in weights}
    common_seeds = [
        seed
        for seed in next(iter(by_seed.values()), {})
        if all(seed in pairs for pairs in by_seed.values())
    ]
    if len(weights) < 2 or not common_seeds:
        return None
    runs = [[by_seed[task][seed] for task in weights] for seed in common_seeds]
    hits_alike = rules.task_weights == "items" and all(
        pair.current.hit_or_miss and pair.frozen.packed for run in runs for pair in run
    )
    strata = _strata(weights, {task: tasks[task][0].current for task in weights})
    return FrozenPool(
        label,
        weights,
        _hit_changes(runs) if hits_alike else _value_changes(runs, strata),
        _available_items(
            [pair.current for pair in runs[0]],
            limited=[not pair.record.conditions.has_all_items for pair in runs[0]],
        ),
        any(pair.retrained for run in runs for pair in run),
    )


def _hit_changes(runs: Sequence[Sequence[FrozenPair]]) -> _PoolChange:
    """Compare right and wrong answers over all items (McNemar's test)."""
    frozen = ["".join(pair.frozen.outcomes for pair in run) for run in runs]
    current = ["".join(pair.current.outcomes[pair.current.primary] for pair in run) for run in runs]
    net, p = stats.net_change_test(current, frozen)
    figures = BeforeAfter(
        [run.count("1") / len(run) for run in frozen],
        [run.count("1") / len(run) for run in current],
    )
    return _PoolChange(figures, net, None, p)


def _value_changes(
    runs: Sequence[Sequence[FrozenPair]], strata: Sequence[tuple[int, float]]
) -> _PoolChange:
    """Compare weighted values over all items (Student's t)."""
    frozen = [tuple(chain.from_iterable(pair.frozen.numbers for pair in run)) for run in runs]
    current = [tuple(chain.from_iterable(pair.current.numbers for pair in run)) for run in runs]
    net = [
        sum(after) - sum(before)
        for before, after in zip(zip(*frozen, strict=True), zip(*current, strict=True), strict=True)
    ]
    figures = BeforeAfter(
        [means.run_figure(run, strata) for run in frozen],
        [means.run_figure(run, strata) for run in current],
    )
    error = means.error_of_difference(current, frozen, strata)
    return _PoolChange(figures, net, error, means.inferiority_test(current, frozen, strata))


def judge_pools(
    pools: Sequence[FrozenPool], adjusted: Sequence[float], tests: int, rules: Rules
) -> list[Finding]:
    """Judge pools by their adjusted p values; `tests` is the size of their Holm family."""
    return [_judge_pool(pool, p, tests, rules) for pool, p in zip(pools, adjusted, strict=True)]


def _judge_pool(pool: FrozenPool, p: float, tests: int, rules: Rules) -> Finding:
    """Return the verdict on one pool."""
    before, after = (sum(runs) / len(runs) for runs in pool.change.figures)
    drop, seeds, net = before - after, len(pool.change.figures.before), pool.change.net
    lost, won = sum(change < 0 for change in net), sum(change > 0 for change in net)
    line = (
        f"{' and '.join(pool.tasks)}, {_weights_text(rules, pool.weights)}: {100 * before:.1f} % "
        f"-> {100 * after:.1f} %, {lost} lost and {won} won "
        f"of {pool.n:,}{f' (net over {seeds} seeds)' if seeds > 1 else ''}, p {p:.2g}"
    )
    numbers: Numbers = {
        "n": pool.n,
        "seeds": seeds,
        "lost": lost,
        "won": won,
        "drop": drop,
        "p_holm": p,
        "needed": None,
    }
    finding = Finding(
        layer="pooled frozen",
        row=pool.label,
        verdict=Verdict.passed,
        told=line,
        numbers=numbers,
        speaks_for=pool.tasks,
    )
    if p < rules.frozen_alpha and drop > rules.tolerance:
        return _judge_loss(pool, finding, rules)
    flips = sum(change * change for change in net) / (pool.n * seeds**2)
    if reason := _undecided_reason(pool, flips, drop, tests, rules, numbers):
        return replace(finding, verdict=Verdict.cannot_tell, told=f"{line}; {reason}")
    if p < rules.frozen_alpha:
        remark = f"significant, but within the tolerance of {100 * rules.tolerance:g} points"
        return replace(finding, told=f"{line}; {remark}", warning=True)
    return finding


def _judge_loss(pool: FrozenPool, finding: Finding, rules: Rules) -> Finding:
    """Return the verdict on a significant loss.

    It is a regression, unless the row was trained anew and its seeds do not agree.
    """
    if not pool.retrained:
        return replace(finding, verdict=Verdict.regressed)
    figures = pool.change.figures
    changes = [after - before for before, after in zip(figures.before, figures.after, strict=True)]
    if len(changes) == 1:
        line = f"{finding.told}; trained anew: one seed may be an unlucky training, freeze three"
        return replace(finding, verdict=Verdict.regressed, told=line)
    if stats.negative_mean_test(changes) < rules.alpha:
        return replace(finding, verdict=Verdict.regressed)
    line = (
        f"{finding.told}; trained anew, and the {len(changes)} seeds do not agree; more would "
        "decide"
    )
    return replace(finding, verdict=Verdict.cannot_tell, told=line)


def _undecided_reason(
    pool: FrozenPool, flips: float, drop: float, tests: int, rules: Rules, numbers: Numbers
) -> str:
    """Return why these items cannot show a drop that matters, "" where they can.

    Adds to `numbers` how many items would, or from which drop on they can (`reach`).
    """
    drop_text = f"a drop of {100 * rules.detect:g} points"
    alpha = rules.frozen_alpha / tests
    if pool.change.standard_error is not None:
        z = NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(0.8)
        reach = z * pool.change.standard_error
        numbers["reach"] = reach
        if reach <= rules.detect:
            return ""
        return f"{pool.n:,} items cannot show {drop_text}, only one of {100 * reach:.1f} or more"
    needed = stats.items_to_detect(flips, rules.detect, alpha=alpha)
    numbers |= {"flips": flips, "needed": needed}
    if needed > pool.n:
        decision = items_needed_among(needed, pool.available_items, " and ".join(pool.tasks))
        numbers |= {"needed": decision.needed, "task_items": decision.task_items}
        return (
            f"{pool.n:,} items cannot show {drop_text} at {100 * flips:.1f} % flips; "
            f"{decision.text}"
        )
    return f"{drop_text} or more, hidden by flips in both directions" if drop > rules.detect else ""
