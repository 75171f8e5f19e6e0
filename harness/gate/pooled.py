"""Decisions pooled over a row's tasks: what single tasks are too small to show, all their items
may. Pure, no torch.

A claim is pooled over the tasks whose items are paired shares of which more is better and on which
the teacher is above chance; every item counts by its value above its task's chance. Frozen items
are pooled as they are: McNemar's test over all of them. The weights of the tasks (`--task-weights`)
are stated in the finding, and the tests stand in one Holm family with those of the single tasks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import NormalDist

from harness.analysis.comparison import ResultRow
from harness.errors import HarnessError, unknown
from harness.gate.claim import Asked, Claim, Numbers, asked_of, at_chance, shown
from harness.gate.frozen_items import Pair
from harness.gate.rules import Finding, Rules, Verdict, decides_among, task_items
from harness.records.record import TaskScore
from harness.statistics import means, stats

Outcomes = list[tuple[float, ...]]


def check_rules(rules: Rules, tasks: Collection[str]) -> None:
    """Refuse what no command line would let through, and weights of tasks that are not there;
    `tasks` are those of the records.
    """
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


def _shares(rules: Rules, items: Mapping[str, int]) -> dict[str, float]:
    """Return the weight of each task in the pool, summing to 1; `items` by task. Tasks without a
    weight stay out.
    """
    given = rules.task_weights
    raw: dict[str, float] = {
        task: 1.0 if given == "tasks" else float(count) for task, count in items.items()
    }
    if not isinstance(given, str):
        raw = {task: dict(given)[task] for task in items if task in dict(given)}
    largest = max(raw.values(), default=1.0)
    # first, so that no sum overflows
    scaled = {task: weight / largest for task, weight in raw.items()}
    return {task: weight / sum(scaled.values()) for task, weight in scaled.items()}


def _weighing(rules: Rules, shares: Mapping[str, float]) -> str:
    """Say how the tasks count."""
    if rules.task_weights == "items":
        return "every item alike"
    if rules.task_weights == "tasks":
        return "every task alike"
    return ", ".join(f"{task} {100 * share:.3g} %" for task, share in shares.items())


def _parts(
    shares: Mapping[str, float], scores: Mapping[str, tuple[int, Sequence[tuple[int, float]]]]
) -> list[tuple[int, float]]:
    """Return the strata of a pool, (items, weight of each): tasks, and within them the parts that
    they have themselves.
    """
    strata: list[tuple[int, float]] = []
    for task, share in shares.items():
        count, parts = scores[task]
        strata += (
            [(items, share * weight) for items, weight in parts]
            if parts
            else [(count, share / count)]
        )
    return strata


# The claim


def pooled_claims(asked: Sequence[Asked]) -> list[Claim]:
    """Test every row's claim over the items of all its tasks that can be pooled; a row needs two of
    them.
    """
    tested: dict[str, Claim] = {}
    for candidate in asked:
        if candidate.row.label not in tested and (claim := _pooled_claim(candidate)) is not None:
            tested[candidate.row.label] = claim
    return list(tested.values())


def _pooled_claim(candidate: Asked) -> Claim | None:
    rules = candidate.rules
    scores = {
        score.task: score
        for score in candidate.row.first.scores
        if _may_be_pooled(candidate, score)
    }
    shares = _shares(rules, {task: score.n for task, score in scores.items()})
    if len(shares) < 2 or candidate.teacher is None or rules.margin is None:
        return None
    above = not rules.points and any(scores[task].chance for task in shares)
    chosen = [scores[task] for task in shares]
    ours, theirs = (
        _joined(candidate.row, chosen, above=above),
        _joined(candidate.teacher, chosen, above=above),
    )
    parts = _parts(shares, {task: (scores[task].n, scores[task].parts) for task in shares})
    p, other = means.keeps(ours, theirs, rules.margin, parts, points=rules.points)
    figure = (
        means.difference(ours, theirs, parts) if rules.points else means.ratio(ours, theirs, parts)
    )
    if figure.value is None or figure.low is None:
        return None
    n, chance = (
        sum(scores[task].n for task in shares),
        sum(share * scores[task].chance for task, share in shares.items()),
    )
    left_out = ", ".join(
        score.task for score in candidate.row.first.scores if score.task not in shares
    )
    line = (
        f"{' and '.join(f'{task} ({scores[task].n:,})' for task in shares)}, "
        f"{_weighing(rules, shares)}: "
        f"{shown(figure, rules, above=above)} on {n:,} items; must show that it "
        f"{rules.claim(chance if above else 0.0)}"
        f"{left_out and f'; without {left_out}'}{candidate.trainings}"
    )
    numbers: Numbers = {
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "n": n,
        "seeds": len(candidate.row.records),
        "p_met": p,
        "p_unmet": other,
        **asked_of(rules, chance if above else 0.0),
    }
    there = [
        task_items(scores[task], limited=candidate.row.first.conditions.limited) for task in shares
    ]
    silent = [
        score.task for score in candidate.row.first.scores if at_chance(candidate.group, score)
    ]
    return Claim(
        layer="pooled",
        label=candidate.row.label,
        unmet_if_large=p,
        met_if_large=other,
        told=line,
        numbers=numbers,
        n=n,
        tasks=tuple(shares),
        there=sum(count or 0 for count in there) if all(there) else None,
        speaks_for=(*shares, *silent),
    )


def _may_be_pooled(candidate: Asked, score: TaskScore) -> bool:
    """Tell whether a task's items are paired shares of which more is better, on which the teacher
    is above chance.
    """
    theirs = candidate.teacher.scores(score.task) if candidate.teacher else []
    every = [*theirs, *candidate.row.scores(score.task)]
    paired = all(
        each.retains
        and each.unit == "share"
        and each.numbers
        and each.items_digest == score.items_digest
        for each in every
    )
    whole = len(candidate.row.scores(score.task)) == len(candidate.row.records)
    return (
        bool(theirs) and paired and whole and score.n > 1 and not at_chance(candidate.group, score)
    )


def _joined(row: ResultRow, scores: Sequence[TaskScore], *, above: bool) -> Outcomes:
    """Return a row's items of several tasks in a line, run by run; of choices what lies above
    chance.
    """
    runs: Outcomes = []
    for record in row.records:
        scored = [
            (score, each) for score in scores if (each := record.score(score.task)) is not None
        ]
        runs.append(
            tuple(
                value - (score.chance if above else 0.0)
                for score, each in scored
                for value in each.numbers
            )
        )
    return runs


# The frozen items


@dataclass(frozen=True)
class Pool:
    """A row's frozen tasks together: how they changed, and the p of "nothing was lost"."""

    label: str
    shares: Mapping[str, float]  # weight of each task
    figures: tuple[list[float], list[float]]  # of then and now, a run each
    net: Sequence[float]  # each item's change, summed over the runs
    # standard error of the change; None of hits that all count alike, of which McNemar's test is
    # made
    error: float | None
    there: int | None  # items that these tasks have
    anew: bool  # trained again: its spread between trainings is part of the question
    p: float

    @property
    def n(self) -> int:
        """Items of all tasks."""
        return len(self.net)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.shares)


def frozen_pools(pairs: Mapping[tuple[str, str], Sequence[Pair]], rules: Rules) -> list[Pool]:
    """Return the tests of the frozen layer over all tasks of a row, where it has two that can be
    pooled and an answer changed.
    """
    by_row: dict[str, dict[str, Sequence[Pair]]] = {}
    for (label, task), alike in pairs.items():
        score, then = alike[0].now, alike[0].then
        # not a figure that only all items have
        itemwise = score.primary in score.outcomes or score.primary in score.values
        if score.retains and score.unit == "share" and itemwise and (then.packed or then.values):
            by_row.setdefault(label, {})[task] = alike
    pools = [_pool(label, tasks, rules) for label, tasks in by_row.items()]
    return [pool for pool in pools if pool is not None and any(pool.net)]


def _pool(label: str, tasks: Mapping[str, Sequence[Pair]], rules: Rules) -> Pool | None:
    shares = _shares(rules, {task: alike[0].now.n for task, alike in tasks.items()})
    kept = {task: {each.record.seed: each for each in tasks[task]} for task in shares}
    seeds = [
        seed
        for seed in next(iter(kept.values()), {})
        if all(seed in each for each in kept.values())
    ]
    if len(shares) < 2 or not seeds:
        return None
    runs = [[kept[task][seed] for task in shares] for seed in seeds]
    hits = rules.task_weights == "items" and all(
        each.now.hit_or_miss and each.then.packed for run in runs for each in run
    )
    parts = _parts(
        shares, {task: (tasks[task][0].now.n, tasks[task][0].now.parts) for task in shares}
    )
    figures, net, error, p = _of_hits(runs) if hits else _of_numbers(runs, parts)
    there = [task_items(each.now, limited=each.record.conditions.limited) for each in runs[0]]
    return Pool(
        label,
        shares,
        figures,
        net,
        error,
        sum(count or 0 for count in there) if all(there) else None,
        any(each.anew for run in runs for each in run),
        p,
    )


# figures, net change of items, error, p
_Change = tuple[tuple[list[float], list[float]], Sequence[float], float | None, float]


def _of_hits(runs: Sequence[Sequence[Pair]]) -> _Change:
    """McNemar over all items: lost and won ones."""
    then = ["".join(each.then.outcomes for each in run) for run in runs]
    now = ["".join(each.now.outcomes[each.now.primary] for each in run) for run in runs]
    net, p = stats.net_loss(then, now)
    return (
        ([run.count("1") / len(run) for run in then], [run.count("1") / len(run) for run in now]),
        net,
        None,
        p,
    )


def _of_numbers(runs: Sequence[Sequence[Pair]], parts: Sequence[tuple[int, float]]) -> _Change:
    """Student's t of the weighted change."""
    then = [tuple(chain.from_iterable(each.then.numbers for each in run)) for run in runs]
    now = [tuple(chain.from_iterable(each.now.numbers for each in run)) for run in runs]
    net = [
        sum(new) - sum(old)
        for old, new in zip(zip(*then, strict=True), zip(*now, strict=True), strict=True)
    ]
    figures = (
        [means.weighted(run, parts) for run in then],
        [means.weighted(run, parts) for run in now],
    )
    return figures, net, means.error_of_difference(now, then, parts), means.worse(now, then, parts)


def judged_pools(
    pools: Sequence[Pool], adjusted: Sequence[float], tests: int, rules: Rules
) -> list[Finding]:
    """Judge the pooled tests by their adjusted p values; `tests` is the size of the family that
    they stand in.
    """
    return [_judged_pool(pool, p, tests, rules) for pool, p in zip(pools, adjusted, strict=True)]


def _judged_pool(pool: Pool, p: float, tests: int, rules: Rules) -> Finding:
    then, now = (sum(side) / len(side) for side in pool.figures)
    drop, seeds = then - now, len(pool.figures[0])
    lost, won = sum(change < 0 for change in pool.net), sum(change > 0 for change in pool.net)
    line = (
        f"{' and '.join(pool.tasks)}, {_weighing(rules, pool.shares)}: {100 * then:.1f} % -> "
        f"{100 * now:.1f} %, {lost} lost and {won} won "
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
    said = Finding(
        layer="pooled frozen",
        row=pool.label,
        verdict=Verdict.passed,
        told=line,
        numbers=numbers,
        speaks_for=pool.tasks,
    )
    if p < rules.frozen_alpha and drop > rules.tolerance:
        return _fallen(
            pool, said, [after - before for before, after in zip(*pool.figures, strict=True)], rules
        )
    flips = sum(change * change for change in pool.net) / (pool.n * seeds**2)
    if why := _hidden(pool, flips, drop, tests, rules, numbers):
        return replace(said, verdict=Verdict.cannot_tell, told=f"{line}; {why}")
    if p < rules.frozen_alpha:
        return replace(
            said,
            told=f"{line}; significant, but within the tolerance of {100 * rules.tolerance:g} "
            "points",
            warning=True,
        )
    return said


def _fallen(pool: Pool, said: Finding, changes: Sequence[float], rules: Rules) -> Finding:
    """A significant loss: regressed, unless the row was trained anew and its seeds do not agree."""
    if not pool.anew:
        return replace(said, verdict=Verdict.regressed)
    if len(changes) == 1:
        line = f"{said.told}; trained anew: one seed may be an unlucky training, freeze three"
        return replace(said, verdict=Verdict.regressed, told=line)
    if stats.mean_below(changes) < rules.alpha:
        return replace(said, verdict=Verdict.regressed)
    line = (
        f"{said.told}; trained anew, and the {len(changes)} seeds do not agree; more would decide"
    )
    return replace(said, verdict=Verdict.cannot_tell, told=line)


def _hidden(
    pool: Pool, flips: float, drop: float, tests: int, rules: Rules, numbers: Numbers
) -> str:
    """Return why these items cannot show a drop that matters, "" where they can; notes in `numbers`
    how many would.
    """
    asked = f"a drop of {100 * rules.detect:g} points"
    if pool.error is not None:
        reach = (
            NormalDist().inv_cdf(1 - rules.frozen_alpha / tests) + NormalDist().inv_cdf(0.8)
        ) * pool.error
        numbers["reach"] = reach
        return (
            f"{pool.n:,} items cannot show {asked}, only from {100 * reach:.1f} on"
            if reach > rules.detect
            else ""
        )
    needed = stats.items_for(flips, rules.detect, alpha=rules.frozen_alpha / tests)
    numbers |= {"flips": flips, "needed": needed}
    if needed > pool.n:
        decided = decides_among(needed, pool.there, " and ".join(pool.tasks))
        numbers |= {"needed": decided.needed, "task_items": decided.task_items}
        return f"{pool.n:,} items cannot show {asked} at {100 * flips:.1f} % flips; {decided.told}"
    return f"{asked} or more that the flips both ways hide" if drop > rules.detect else ""
