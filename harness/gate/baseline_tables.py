"""The tables of `harness baseline`: what is frozen, what changed, what can be shown. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from harness.contract import Task
from harness.gate.rules import Rules
from harness.records import columns
from harness.records.baseline import ITEM_FIELDS, Baseline, FrozenRow, FrozenScore
from harness.records.columns import DASH
from harness.records.record import TEACHER, RunRecord
from harness.statistics import stats
from harness.statistics.stats import count_pairs

Line = dict[str, str]  # a line of a table: header -> cell
UNKNOWN_FLIPS = 0.05  # share of items, where no study has shown how many flip


class ScoreOfRow(NamedTuple):
    """A frozen score, with the row to which it belongs."""

    row: FrozenRow
    score: FrozenScore


class ScoreKey(NamedTuple):
    """What names a frozen score in a baseline."""

    label: str
    seed: int | None
    task: str


def _scores_by_key(baseline: Baseline | None) -> dict[ScoreKey, ScoreOfRow]:
    """Return all scores of a baseline, none without one."""
    return {
        ScoreKey(row.label, row.seed, score.task): ScoreOfRow(row, score)
        for row in (baseline.rows if baseline else ())
        for score in row.scores
    }


def baseline_lines(baseline: Baseline) -> list[Line]:
    """Return the table of `harness baseline show`, a line for each row and task.

    The first accepted value is shown only if it is another one.
    """
    lines: list[Line] = []
    for row in baseline.rows:
        speedup = row.decode_speedup[0] if row.decode_speedup else None
        for score in row.scores:
            lines.append(
                {
                    columns.ROW.header: row.label,
                    columns.SEED.header: _seed_text(row.seed),
                    columns.TASK.header: f"{score.task}@{score.version}",
                    columns.N.header: columns.N.text(score.n),
                    columns.SCORE.header: score.format_value(),
                    columns.FIRST_ACCEPTED.header: _first_accepted_text(score),
                    columns.OWN_MARGIN.header: margin_text(row),
                    columns.BYTES.header: columns.BYTES.text(row.weight_bytes),
                    columns.DECODE_X.header: columns.DECODE_X.text(speedup),
                }
            )
    return lines


def _seed_text(seed: int | None) -> str:
    return DASH if seed is None else str(seed)


def _first_accepted_text(score: FrozenScore) -> str:
    """Return the first accepted value with its date and reason, a dash if it is the score's own."""
    if score.origin is None or score.first == score:
        return DASH
    value = score.format_value(score.origin.value)
    return f"{value} ({score.origin.date[:10]}: {score.origin.reason})"


def margin_text(margined: FrozenRow | Baseline) -> str:
    """Return the margin of a row or a baseline in words."""
    if margined.margin is None:
        return DASH
    meaning = "points may be lost" if margined.points else "% must be kept"
    return f"{100 * margined.margin:g} {meaning}"


def change_lines(old: Baseline | None, new: Baseline) -> list[Line]:
    """Return the table of what changed between two baselines, a line for each row and task."""
    before, after = _scores_by_key(old), _scores_by_key(new)
    keys = sorted(
        {**before, **after},
        key=lambda key: (key.label != TEACHER, key.label, key.seed or 0, key.task),
    )
    return [
        {
            columns.ROW.header: key.label,
            columns.SEED.header: _seed_text(key.seed),
            columns.TASK.header: key.task,
            **_change_cells(before.get(key), after.get(key)),
        }
        for key in keys
    ]


def _change_cells(before: ScoreOfRow | None, after: ScoreOfRow | None) -> Line:
    """Return the cells that say how one score changed; one of the two is given at least."""
    present = after or before
    assert present is not None
    change = "new" if before is None else "gone"
    score = f"{present.score.value:.4f}"
    flips = first_accepted = sizes = DASH
    margin = margin_text(present.row)
    if before is not None and after is not None:
        change = _change_word(before.score, after.score)
        score = f"{before.score.value:.4f} -> {after.score.value:.4f}"
        flips = _flips_text(before.score, after.score)
        first_accepted = _first_accepted_text(after.score if after.score.origin else before.score)
        old_margin = margin_text(before.row)
        margin = old_margin if old_margin == margin else f"{old_margin} -> {margin}"
        old_size = columns.BYTES.text(before.row.weight_bytes)
        size = columns.BYTES.text(after.row.weight_bytes)
        sizes = "same" if old_size == size else f"{old_size} -> {size}"
    return {
        columns.CHANGE.header: change,
        columns.SCORE.header: score,
        columns.LOSSES_WINS.header: flips,
        columns.FIRST_ACCEPTED.header: first_accepted,
        columns.OWN_MARGIN.header: margin,
        columns.BYTES.header: sizes,
    }


def _flips_text(before: FrozenScore, after: FrozenScore) -> str:
    """Return how many items were lost and won, a dash where they cannot be paired."""
    if before.items_digest != after.items_digest or not before.packed or not after.packed:
        return DASH
    counts = count_pairs(after.outcomes, before.outcomes)
    return f"{counts.teacher_only}/{counts.student_only}"


def _change_word(before: FrozenScore, after: FrozenScore) -> str:
    """Return in a word what changed: the items, the answers, the scoring or nothing."""
    if before.items_digest != after.items_digest:
        return "other items"
    if before.answers_digest != after.answers_digest:
        return "answers"
    same = all(getattr(before, name) == getattr(after, name) for name in (*ITEM_FIELDS, "value"))
    return "none" if same else "scoring"


# shares of items that flip without a cause: as between dtypes, light and heavy compression
_FLIPS = (0.02, 0.05, 0.1)


@dataclass(frozen=True)
class DetectableDrop:
    """What a check can show of a row and task."""

    row: str
    task: str
    n: int
    flips: float  # share of items that flip without a cause
    source: str  # from where that share is known
    drop: float | None  # the smallest true drop that is called a regression; None: there is none
    fewest_items: int  # with fewer items only equal answers pass


def judged_scores(baseline: Baseline) -> dict[tuple[str, str], list[ScoreOfRow]]:
    """Return what a check judges of a baseline: the seeds of each row and task."""
    judged: dict[tuple[str, str], list[ScoreOfRow]] = {}
    for row in baseline.rows:
        for score in row.scores if not row.control else ():
            judged.setdefault((row.label, score.task), []).append(ScoreOfRow(row, score))
    return judged


def holm_family_size(baseline: Baseline) -> int:
    """Return over how many tests Holm's adjustment goes at most.

    Every row and task is one test, and so is the pool of each row with two tasks of shares.
    """
    judged = judged_scores(baseline)
    labels_of_shares = [
        label
        for (label, _), seeds in judged.items()
        if seeds[0].score.unit == "share" and seeds[0].score.numbers
    ]
    pools = sum(labels_of_shares.count(label) > 1 for label in set(labels_of_shares))
    return len(judged) + pools


def detectable_drops(
    new: Baseline, old: Baseline | None, records: Sequence[RunRecord], rules: Rules
) -> list[DetectableDrop]:
    """Return what a check of a new baseline can show of items that are right or wrong.

    The power is 0.8, with Holm's adjustment over all that the check judges.
    """
    alpha = rules.frozen_alpha / max(1, holm_family_size(new))
    before = _scores_by_key(old)
    drops = []
    for (label, task), seeds in judged_scores(new).items():
        score = seeds[0].score
        if score.packed and not score.parts and not score.unpaired:
            flips = _expected_flips(seeds, before, records)
            drops.append(
                DetectableDrop(
                    row=label,
                    task=task,
                    n=score.n,
                    flips=flips.share,
                    source=flips.source,
                    drop=_smallest_regression(score.n, flips.share, alpha, rules),
                    fewest_items=stats.items_to_detect(0.0, rules.detect, alpha=alpha),
                )
            )
    return drops


def _smallest_regression(n: int, flips: float, alpha: float, rules: Rules) -> float | None:
    """Return the smallest true drop that a check calls *regressed* with power 0.8, None for none.

    Such a drop is significant and beyond the tolerance.
    """
    drop = smallest_drop(n, flips, alpha)
    if drop is None:
        return None
    z = NormalDist().inv_cdf(0.8)
    beyond_tolerance = rules.tolerance + z * math.sqrt(max(flips, rules.tolerance) / n)
    return max(drop, beyond_tolerance)


def smallest_drop(n: int, flips: float, alpha: float) -> float | None:
    """Return the smallest true drop that n paired items show with power 0.8, None for none.

    `flips` is the share of items that flip, `alpha` the one-sided level.
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


def power_of_task(task: Task, n: int, rules: Rules) -> str:
    """Say what a check against a baseline of n items of a task would show (power 0.8).

    A perplexity has no points to lose, and how much the documents of a task differ in it is known
    only when they were scored.
    """
    figure = columns.PERPLEXITY.key
    if task.kind == figure or figure in task.primary:
        return (
            "which loss of perplexity they show is known when rows are scored "
            f"(column {columns.ITEMS_NEEDED.header})"
        )
    return power_text(n, rules)


def power_text(n: int, rules: Rules) -> str:
    """Say which drop a check against a baseline of n items would show (power 0.8).

    It depends on how many items flip without a cause, which nobody knows before rows are scored.
    """
    shares_of_drop: dict[str, list[str]] = {}
    for flips in _FLIPS:
        drop = _smallest_regression(n, flips, rules.frozen_alpha, rules)
        if drop is not None:
            shares_of_drop.setdefault(f"{100 * drop:.1f} points", []).append(f"{100 * flips:g} %")
    if not shares_of_drop:
        return "too few items to show any drop"
    parts = [
        f"{drop} where {' or '.join(shares)} of the items flip"
        for drop, shares in shares_of_drop.items()
    ]
    return f"shows a drop from {', '.join(parts)}"


class _ExpectedFlips(NamedTuple):
    """The share of items that flip without a cause, and from where it is known."""

    share: float
    source: str


def _expected_flips(
    seeds: Sequence[ScoreOfRow],
    before: Mapping[ScoreKey, ScoreOfRow],
    records: Sequence[RunRecord],
) -> _ExpectedFlips:
    """Return the share of items that flip without a cause.

    It is what flipped when this row was frozen last, else the teacher's own flips by rounding, else
    a guess.
    """
    shares = []
    for row, score in seeds:
        entry = before.get(ScoreKey(row.label, row.seed, score.task))
        if (
            entry
            and entry.score.packed
            and entry.score.items_digest == score.items_digest
            and entry.score.answers_digest != score.answers_digest
        ):
            counts = count_pairs(score.outcomes, entry.score.outcomes)
            shares.append((counts.teacher_only + counts.student_only) / counts.n)
    if shares:
        return _ExpectedFlips(max(shares), "since the last move")
    name = f"{columns.FLIPS.key}:{seeds[0].score.task}"
    for record in records:
        measurement = record.measurement(name) if record.label == TEACHER else None
        if measurement and not measurement.remark:
            return _ExpectedFlips(measurement.value, "the teacher's, by rounding")
    return _ExpectedFlips(UNKNOWN_FLIPS, "not known")


def detectable_drop_lines(drops: Sequence[DetectableDrop]) -> list[Line]:
    """Return the table of `harness baseline update`: what these items can and cannot show."""
    return [
        {
            columns.ROW.header: drop.row,
            columns.TASK.header: drop.task,
            columns.N.header: columns.N.text(drop.n),
            columns.FLIPS.header: f"{columns.FLIPS.text(drop.flips)} ({drop.source})",
            columns.SEES_FROM.header: "none"
            if drop.drop is None
            else f"{columns.SEES_FROM.text(drop.drop)} {columns.SEES_FROM.unit}",
            columns.EQUAL_ONLY.header: f"below {drop.fewest_items:,} items"
            + (" (here)" if drop.n < drop.fewest_items else ""),
        }
        for drop in drops
    ]
