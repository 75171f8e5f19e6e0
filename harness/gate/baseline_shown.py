"""What `harness baseline` prints: what is frozen, what changed, and what a check can show with so
many items. No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from harness.gate.rules import Rules
from harness.records import columns
from harness.records.baseline import ITEM_FIELDS, Baseline, FrozenRow, FrozenScore
from harness.records.columns import DASH
from harness.records.record import TEACHER, RunRecord
from harness.statistics import stats
from harness.statistics.stats import count_pairs

Line = dict[str, str]
UNKNOWN_FLIPS = 0.05  # of the items, where no study has shown how many flip


def rows_shown(baseline: Baseline) -> list[Line]:
    """Return what `harness baseline show` prints, a line a row and task; the first accepted value
    only where it is another one.
    """
    lines: list[Line] = []
    for row in baseline.rows:
        for score in row.scores:
            lines.append(
                {
                    columns.ROW.header: row.label,
                    columns.SEED.header: _seed_shown(row.seed),
                    columns.TASK.header: f"{score.task}@{score.version}",
                    columns.N.header: columns.N.text(score.n),
                    columns.SCORE.header: score.shown(),
                    columns.FIRST_ACCEPTED.header: _first_shown(score),
                    columns.OWN_MARGIN.header: margin_shown(row),
                    columns.BYTES.header: columns.BYTES.text(row.weight_bytes),
                    columns.DECODE_X.header: columns.DECODE_X.text(
                        row.decode_speedup[0] if row.decode_speedup else None
                    ),
                }
            )
    return lines


def _seed_shown(seed: int | None) -> str:
    return DASH if seed is None else str(seed)


def _first_shown(score: FrozenScore) -> str:
    if score.origin is None or score.first == score:
        return DASH
    return f"{score.shown(score.origin.value)} ({score.origin.date[:10]}: {score.origin.reason})"


def margin_shown(given: FrozenRow | Baseline) -> str:
    """Write a margin: what must be kept, or what may be lost."""
    if given.margin is None:
        return DASH
    return f"{100 * given.margin:g} {'points may be lost' if given.points else '% must be kept'}"


def difference(old: Baseline | None, new: Baseline) -> list[Line]:
    """Return what changed between two baselines, a line a row and task: scores, items lost and won,
    first accepted values, bytes.
    """
    before = {
        (row.label, row.seed, score.task): (row, score)
        for row in (old.rows if old else ())
        for score in row.scores
    }
    after = {
        (row.label, row.seed, score.task): (row, score) for row in new.rows for score in row.scores
    }
    lines: list[Line] = []
    for key in sorted(
        dict.fromkeys([*before, *after]),
        key=lambda one: (one[0] != TEACHER, one[0], one[1] or 0, one[2]),
    ):
        label, seed, task = key
        line = {
            columns.ROW.header: label,
            columns.SEED.header: _seed_shown(seed),
            columns.TASK.header: task,
        }
        then, now = before.get(key), after.get(key)
        if then is None or now is None:
            there = now or then
            assert there is not None
            cells: tuple[str, ...] = (
                "new" if then is None else "gone",
                f"{there[1].value:.4f}",
                DASH,
                DASH,
                margin_shown(there[0]),
                DASH,
            )
        else:
            cells = _moved(then, now)
        lines.append(line | dict(zip(_MOVED, cells, strict=True)))
    return lines


_MOVED = tuple(
    one.header
    for one in (
        columns.CHANGE,
        columns.SCORE,
        columns.LOSSES_WINS,
        columns.FIRST_ACCEPTED,
        columns.OWN_MARGIN,
        columns.BYTES,
    )
)


def _moved(
    then: tuple[FrozenRow, FrozenScore], now: tuple[FrozenRow, FrozenScore]
) -> tuple[str, ...]:
    """Return what changed in one score of a row, in the order of `_MOVED`."""
    flips = DASH
    if then[1].items_digest == now[1].items_digest and then[1].packed and now[1].packed:
        counts = count_pairs(now[1].outcomes, then[1].outcomes)
        flips = f"{counts.teacher_only}/{counts.student_only}"
    margins = [margin_shown(row) for row, _ in (then, now)]
    sizes = [columns.BYTES.text(row.weight_bytes) for row, _ in (then, now)]
    return (
        _change(then[1], now[1]),
        f"{then[1].value:.4f} -> {now[1].value:.4f}",
        flips,
        _first_shown(now[1] if now[1].origin else then[1]),
        margins[0] if margins[0] == margins[1] else " -> ".join(margins),
        "same" if sizes[0] == sizes[1] else " -> ".join(sizes),
    )


def _change(then: FrozenScore, now: FrozenScore) -> str:
    if then.items_digest != now.items_digest:
        return "other items"
    if then.answers_digest != now.answers_digest:
        return "answers"
    same = all(getattr(then, name) == getattr(now, name) for name in (*ITEM_FIELDS, "value"))
    return "none" if same else "scoring"


@dataclass(frozen=True)
class Reach:
    """What a check can show of a row and task: from which true drop on it is seen, and below how
    many items nothing but equality passes.
    """

    row: str
    task: str
    n: int
    flips: float
    source: str
    drop: float | None
    least: int


def judged_scores(baseline: Baseline) -> dict[tuple[str, str], list[tuple[FrozenRow, FrozenScore]]]:
    """Return what a check judges of a baseline, seed by seed, by row and task."""
    judged: dict[tuple[str, str], list[tuple[FrozenRow, FrozenScore]]] = {}
    for row in baseline.rows:
        for score in row.scores if not row.control else ():
            judged.setdefault((row.label, score.task), []).append((row, score))
    return judged


def family_of(baseline: Baseline) -> int:
    """Return over how many tests Holm's adjustment goes at most: every row and task, and the pool
    of each row with two tasks of shares.
    """
    judged = judged_scores(baseline)
    shares = [
        label
        for (label, _), seeds in judged.items()
        if seeds[0][1].unit == "share" and seeds[0][1].numbers
    ]
    return len(judged) + sum(shares.count(label) > 1 for label in set(shares))


def reach(
    made: Baseline, old: Baseline | None, records: Sequence[RunRecord], rules: Rules
) -> list[Reach]:
    """Return what a check of a baseline can show, with power .8, Holm over all that it judges;
    items that are right or wrong.
    """
    judged = judged_scores(made)
    alpha = rules.frozen_alpha / max(1, family_of(made))
    found = []
    for (label, task), seeds in judged.items():
        score = seeds[0][1]
        if score.packed and not score.parts and not score.unpaired:
            flips, source = _flips(seeds, old, records)
            found.append(
                Reach(
                    label,
                    task,
                    score.n,
                    flips,
                    source,
                    _seen_from(score.n, flips, alpha, rules),
                    stats.items_to_detect(0.0, rules.detect, alpha=alpha),
                )
            )
    return found


def _seen_from(n: int, flips: float, alpha: float, rules: Rules) -> float | None:
    """Return from which true drop on a check says *regressed* with power .8: significant, and
    beyond the tolerance.
    """
    drop = smallest_drop(n, flips, alpha)
    if drop is None:
        return None
    z = NormalDist().inv_cdf(0.8)
    beyond = rules.tolerance + z * math.sqrt(max(flips, rules.tolerance) / n)
    return max(drop, beyond)


def smallest_drop(n: int, flips: float, alpha: float) -> float | None:
    """Return the smallest true drop that n paired items show at a share of flips (power .8); None
    where they show none.
    """
    if n < 1 or stats.items_to_detect(flips, 1.0, alpha=alpha) > n:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        drop = (low + high) / 2
        low, high = (
            (low, drop) if stats.items_to_detect(flips, drop, alpha=alpha) <= n else (drop, high)
        )
    return high


def _flips(
    seeds: Sequence[tuple[FrozenRow, FrozenScore]],
    old: Baseline | None,
    records: Sequence[RunRecord],
) -> tuple[float, str]:
    """Return the share of items that flip without a cause: of this row's last move, else the
    teacher's own by rounding, else a guess.
    """
    before = {
        (row.label, row.seed, score.task): score
        for row in (old.rows if old else ())
        for score in row.scores
    }
    shares = []
    for row, score in seeds:
        then = before.get((row.label, row.seed, score.task))
        if (
            then
            and then.packed
            and then.items_digest == score.items_digest
            and then.answers_digest != score.answers_digest
        ):
            counts = count_pairs(score.outcomes, then.outcomes)
            shares.append((counts.teacher_only + counts.student_only) / counts.n)
    if shares:
        return max(shares), "since the last move"
    name = f"{columns.FLIPS.key}:{seeds[0][1].task}"
    noise = next(
        (
            one
            for record in records
            if record.label == TEACHER and (one := record.measured(name)) and not one.remark
        ),
        None,
    )
    return (noise.value, "the teacher's, by rounding") if noise else (UNKNOWN_FLIPS, "not known")


def reach_shown(lines: Sequence[Reach]) -> list[Line]:
    """Return what `harness baseline update` says of what n can and cannot show."""
    return [
        {
            columns.ROW.header: one.row,
            columns.TASK.header: one.task,
            columns.N.header: columns.N.text(one.n),
            columns.FLIPS.header: f"{columns.FLIPS.text(one.flips)} ({one.source})",
            columns.SEES_FROM.header: "none"
            if one.drop is None
            else f"{columns.SEES_FROM.text(one.drop)} {columns.SEES_FROM.unit}",
            columns.EQUAL_ONLY.header: f"below {one.least:,} items"
            + (" (here)" if one.n < one.least else ""),
        }
        for one in lines
    ]
