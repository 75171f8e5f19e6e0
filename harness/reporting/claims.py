"""What is claimed of each family of methods, what others published, and what the rows of a table
show. No torch.

The claims are those that comparisons of compression methods keep repeating; the published figures
stand in `harness/reporting/assets/published.json` with their sources. A measured column is filled
by records alone.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

from harness.analysis.comparison import (
    ALPHA,
    Group,
    ResultRow,
    compare,
    ordered_rows,
    retention_is_meaningful,
    retention_test,
    teacher_at_chance,
)
from harness.records import columns
from harness.records.columns import DASH, Quantity
from harness.records.record import TEACHER, RunRecord
from harness.reporting.costs import speed_ratio
from harness.reporting.table import RowBuilder, RowCells, Table, build_table, without_empty_columns
from harness.statistics.intervals import Interval
from harness.statistics.stats import holm

_FIRST_HAND = ("read: first-party document", "read: copy of the first-party text")
PUBLISHED = Path(__file__).parent / "assets" / "published.json"


@dataclass(frozen=True)
class FamilyClaim:
    """One line of the claims: ranges as low and high ends."""

    name: str
    families: tuple[str, ...]  # of the records' rows
    published: tuple[str, ...]  # families of the published records
    retention: tuple[float, float]  # per cent
    speed: tuple[float, float]  # times the teacher's
    memory: tuple[float, float]  # times less
    cost: str


CLAIMS = (
    FamilyClaim(
        "Quantization", ("quantization",), ("quantization",), (95, 99), (2, 4), (2, 4), "low"
    ),
    FamilyClaim("Pruning", ("pruning",), ("pruning",), (90, 98), (2, 5), (2, 5), "medium"),
    FamilyClaim("Low-rank", ("low-rank",), ("low_rank",), (85, 95), (2, 3), (2, 3), "medium"),
    FamilyClaim(
        "Distillation", ("distillation",), ("distillation",), (80, 95), (3, 10), (3, 10), "high"
    ),
)
CHAIN_FAMILIES = ("chain",)
LEAST_RETENTION = {
    family: claim.retention[0] / 100 for claim in CLAIMS for family in claim.families
}
# what a chain must keep to count: the least that is claimed of any family
LEAST_RETENTION |= dict.fromkeys(CHAIN_FAMILIES, min(LEAST_RETENTION.values()))
_COMPRESSION_FAMILIES = ("quantization", "pruning", "low-rank")
_COST_LEVELS = ("low", "medium", "high")


@dataclass(frozen=True)
class RowFigures:
    """What one row of a table shows of a claim; None where it was not measured."""

    label: str
    retentions: tuple[Interval, ...]  # by task
    speed: Interval
    memory: float | None
    seconds: float | None
    # p of "it does not keep the low end of its family's range on every task"
    unkept: float | None = None
    keeps: float | None = None  # p of "it does"

    @property
    def lowest(self) -> float | None:
        """The retention of its worst task, per cent."""
        values = [one.value for one in self.retentions if one.value is not None]
        return 100 * min(values) if values and len(values) == len(self.retentions) else None


def row_figures(group: Group, row: ResultRow) -> RowFigures:
    """Read a row: retention task by task, decode speed against the teacher, bytes on disk, seconds
    of making.
    """
    judged = [
        task
        for task in group.tasks
        if _has_retention(row, task) and retention_is_meaningful(group, task)
    ]
    kept = (
        tuple(compare(row, group.teacher, task, ratio=True) for task in judged)
        if group.teacher
        else ()
    )
    tests = (
        [
            retention_test(row, group.teacher, task, LEAST_RETENTION[row.first.family])
            for task in judged
        ]
        if group.teacher and row.first.family in LEAST_RETENTION
        else []
    )
    own, base = _bytes_on_disk(row), _bytes_on_disk(group.teacher)
    seconds = [record.cost.seconds for record in row.succeeded if record.cost.seconds]
    return RowFigures(
        row.label,
        kept,
        speed_ratio(row, columns.DECODE_X.key),
        base / own if own and base else None,
        fmean(seconds) if seconds else None,
        max((p for p, _ in tests), default=None),
        min(1.0, len(tests) * min(p for _, p in tests)) if tests else None,
    )


def _has_retention(row: ResultRow, task: str) -> bool:
    scores = row.scores(task)
    return bool(scores) and scores[0].retains


def _bytes_on_disk(row: ResultRow | None) -> float | None:
    found = [
        one.value
        for record in (row.succeeded if row else ())
        if (one := record.measured(columns.DISK.key)) is not None
    ]
    return fmean(found) if found else None


def figures_of_families(group: Group, families: Sequence[str]) -> list[RowFigures]:
    """Return what the rows of some families show, controls and simulated ones left out."""
    return [
        row_figures(group, row)
        for row in group.rows
        if row.succeeded
        and row.label != TEACHER
        and row.first.family in families
        and not row.first.is_control
        and _bytes_on_disk(row) is not None
    ]


def teacher_at_chance_everywhere(group: Group) -> bool:
    """Tell whether the teacher is at chance on every task with a right answer: then no retention
    means anything.
    """
    asked = [task for task in group.tasks if group.teacher and _has_retention(group.teacher, task)]
    return bool(asked) and not any(retention_is_meaningful(group, task) for task in asked)


@lru_cache(maxsize=1)
def _published_records() -> tuple[dict[str, object], ...]:
    return tuple(json.loads(PUBLISHED.read_text(encoding="utf-8"))["records"])


def published_range(families: Sequence[str], field: str, quantity: Quantity) -> str:
    """Return the ranges of a field over the published records of methods that were read first-hand,
    and the sizes of their models.

    Sizes are the students' where a record names both. Retentions (of kind `retention` alone) stand
    apart by benchmark: MMLU and GSM8K part company under every method.
    """
    by: dict[str, list[float]] = {"MMLU": [], "GSM8K": [], "other": []}
    sizes: list[float] = []
    for one in _published_records():
        asked = (
            one["family"] in families
            and one["role"] == "method"
            and one["status"] in _FIRST_HAND
            and one[field] is not None
        )
        if not asked or (field == "retention_pct" and one["kind"] != "retention"):
            continue
        name = (
            next((name for name in ("MMLU", "GSM8K") if name in str(one["metric"])), "other")
            if field == "retention_pct"
            else "other"
        )
        by[name].append(float(str(one[field])))
        sizes += [
            float(size)
            for size in re.findall(
                r"(\d+(?:\.\d+)?)B\b(?! tokens)", str(one["model"]).rpartition("->")[2]
            )
        ]
    if not any(by.values()):
        return DASH
    apart = sum(map(bool, by.values())) > 1
    told = ", ".join(
        f"{name} {_range_text(values, quantity)}" if apart else _range_text(values, quantity)
        for name, values in by.items()
        if values
    )
    if sizes:
        told += (
            f" ({min(sizes):g}B)"
            if min(sizes) == max(sizes)
            else f" ({min(sizes):g}B to {max(sizes):g}B)"
        )
    return told


def measured_values(rows: Sequence[RowFigures]) -> Iterator[tuple[str, list[float]]]:
    """Yield each measured quantity with its values over rows (retention: over tasks too)."""
    yield (
        "retention",
        [100 * one.value for row in rows for one in row.retentions if one.value is not None],
    )
    yield "speed", [row.speed.value for row in rows if row.speed.value is not None]
    yield "memory", [row.memory for row in rows if row.memory is not None]
    yield "cost", [row.seconds for row in rows if row.seconds is not None]


def verdicts(claim: FamilyClaim, rows: Sequence[RowFigures], *, chance: bool) -> dict[str, str]:
    """Judge a claim column by column, and all at once: *holds here* names a row that was shown to
    reach the low end of the claimed range.

    Retention by the test of the gate (alpha .05, Holm over the family's rows; every task must keep
    it), speed by its interval, memory exactly. What neither one row shows nor every row contradicts
    is *cannot tell*.
    """
    unkept, keeping = (
        _holm_adjusted([getattr(row, name) for row in rows]) for name in ("unkept", "keeps")
    )
    kept = [_retention_decision(no, yes) for no, yes in zip(unkept, keeping, strict=True)]
    fast = [_ratio_decision(row.speed, claim.speed[0]) for row in rows]
    small = [None if row.memory is None else row.memory >= claim.memory[0] for row in rows]
    testable = {
        "retention": not chance and any(row.lowest is not None for row in rows),
        "speed": any(row.speed.value is not None for row in rows),
        "memory": any(row.memory is not None for row in rows),
    }
    judged = {"retention": kept, "speed": fast, "memory": small}
    labels = [row.label for row in rows]
    told = {
        name: _verdict_words(labels, reached, testable[name]) for name, reached in judged.items()
    }
    together = [_all_of(three) for three in zip(kept, fast, small, strict=True)]
    return {
        **told,
        columns.ALL_AT_ONCE.header: _verdict_words(labels, together, all(testable.values())),
    }


_Decision = bool | None  # shown, shown not to be, or neither


def _holm_adjusted(values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values of those that were tested."""
    adjusted = iter(holm([p for p in values if p is not None]))
    return [None if p is None else next(adjusted) for p in values]


def _retention_decision(unkept: float | None, keeps: float | None) -> _Decision:
    if unkept is None or keeps is None:
        return None
    return True if unkept <= ALPHA else False if keeps <= ALPHA else None


def _ratio_decision(ratio: Interval, least: float) -> _Decision:
    """Tell by its interval whether a ratio reaches a value; a ratio without an interval shows
    nothing.
    """
    if ratio.low is None or ratio.high is None:
        return None
    return True if ratio.low >= least else False if ratio.high < least else None


def _all_of(three: Sequence[_Decision]) -> _Decision:
    return False if False in three else None if None in three else True


def _chain_verdict(group: Group) -> str:
    """Judge that combining is best: a chain beside which no single method takes as few bytes and
    keeps as much.

    A chain is beaten by a single method that is as small, shown to be better on a task and on none
    shown to be worse; it stands where every single method as small is shown to be worse on a task.
    A chain that is not shown to keep the least that is claimed of any family does not count.
    """
    singles = [
        row
        for row in figures_of_families(group, (*_COMPRESSION_FAMILIES, "distillation"))
        if row.memory is not None
    ]
    chained = [
        row
        for row in figures_of_families(group, CHAIN_FAMILIES)
        if row.memory is not None and row.lowest is not None
    ]
    kept = [
        _retention_decision(*pair)
        for pair in zip(
            _holm_adjusted([row.unkept for row in chained]),
            _holm_adjusted([row.keeps for row in chained]),
            strict=True,
        )
    ]
    stands = [
        _all_of(
            [
                good,
                *(
                    _beats_on_a_task(group, row.label, other.label)
                    for other in singles
                    if (other.memory or 0) >= (row.memory or 0)
                ),
            ]
        )
        for row, good in zip(chained, kept, strict=True)
    ]
    return _verdict_words(
        [row.label for row in chained],
        stands,
        bool(chained and singles) and not teacher_at_chance_everywhere(group),
    )


def _beats_on_a_task(group: Group, label: str, other: str) -> _Decision:
    """Tell whether a row is shown to be better than another on a task; False where it is shown to
    be worse on one and better on none.
    """
    rows = {row.label: row for row in group.rows}
    if rows[label].trained_once or rows[other].trained_once:
        return None
    gaps = [
        compare(rows[label], rows[other], task, ratio=False)
        for task in group.tasks
        if retention_is_meaningful(group, task)
    ]
    better = any(gap.low is not None and gap.low > 0 for gap in gaps)
    worse = any(gap.high is not None and gap.high < 0 for gap in gaps)
    return True if better else False if worse else None


def _verdict_words(labels: Sequence[str], reached: Sequence[_Decision], testable: bool) -> str:
    """Say of rows whether one of them reaches what is claimed; how many were tried stands beside
    the one that is named.
    """
    if not testable:
        return "not testable here"
    good = [label for label, one in zip(labels, reached, strict=True) if one]
    if good:
        return (
            "holds here "
            f"({good[0]}{f', {len(good)} of {len(labels)} rows' if len(labels) > 1 else ''})"
        )
    return "cannot tell" if None in reached else "does not"


def cost_verdicts(group: Group) -> dict[str, str]:
    """Judge the claimed order of costs: *holds here* where every row of a family took less than
    every row of those claimed dearer.

    *Does not* where the order is the other way round for every pair of rows, else *cannot tell*: a
    median has no interval.
    """
    taken = {
        claim.name: [
            row.seconds for row in figures_of_families(group, claim.families) if row.seconds
        ]
        for claim in CLAIMS
    }
    ranks = {claim.name: _COST_LEVELS.index(claim.cost) for claim in CLAIMS}
    told = {}
    for name, seconds in taken.items():
        others = {
            other: values
            for other, values in taken.items()
            if values and ranks[other] != ranks[name]
        }
        if seconds:
            ordered = [
                _cheaper_decision(seconds, values)
                if ranks[name] < ranks[other]
                else _cheaper_decision(values, seconds)
                for other, values in others.items()
            ]
            told[name] = (
                "not testable here"
                if not others
                else {True: "holds here", False: "does not", None: "cannot tell"}[_all_of(ordered)]
            )
    return told


def _cheaper_decision(ours: Sequence[float], theirs: Sequence[float]) -> _Decision:
    """Tell whether all of ours took less than all of theirs; False where all took more."""
    return True if max(ours) < min(theirs) else False if min(ours) > max(theirs) else None


def chains_table(group: Group) -> Table | None:
    """Every chain stage by stage, and the product of its parts beside the measured whole."""
    lines = [
        _stage_cells(group, row, record, at)
        for row in ordered_rows(group)
        if (record := next((one for one in row.succeeded if one.stages), None)) is not None
        for at in range(len(record.stages))
    ]
    return (
        build_table("chains", "Chains, stage by stage", without_empty_columns(lines))
        if lines
        else None
    )


def _stage_cells(group: Group, row: ResultRow, record: RunRecord, at: int) -> RowCells:
    """Return one stage of a chain; the last one stands beside the product of its parts."""
    line, stage, last, base = (
        RowBuilder(row),
        record.stages[at],
        at == len(record.stages) - 1,
        _bytes_on_disk(group.teacher),
    )
    line.add_words(columns.STAGE, stage.label)
    own = next((other for other in group.rows if other.label == stage.label), None)

    def product(of: Callable[[ResultRow], float | None]) -> float | None:
        return _product_of_parts(group, record, of) if last else None

    for task in group.tasks:
        beside, kept_here = "" if len(group.tasks) == 1 else task, _retention(group, own, task)
        column = columns.RETENTION.name.of(beside)
        line.shown[column], line.exact[column] = (
            columns.RETENTION.with_interval(kept_here),
            kept_here.value,
        )
        line.add(
            columns.RETENTION_OF_PARTS,
            product(partial(_retention_value, group, task)),
            task=beside,
        )
    line.add(columns.SIZE, None if stage.simulated else stage.weight_bytes)
    size = product(_bytes_on_disk)  # of two sizes: over the teacher's, a size again
    line.add(columns.SIZE_OF_PARTS, size / base if base and size else None)
    line.add(columns.DECODE_X, _decode_speedup(own))
    line.add(columns.DECODE_X_OF_PARTS, product(_decode_speedup))
    line.add(columns.STAGE_SECONDS, stage.cost.seconds or None)
    return line.cells


def _retention(group: Group, row: ResultRow | None, task: str) -> Interval:
    """Return a row's retention on a task; none where there is no row, or where the teacher is at
    chance.
    """
    known = row is not None and group.teacher is not None and not teacher_at_chance(group, task)
    return compare(row, group.teacher, task, ratio=True) if known else Interval(None)  # type: ignore[arg-type]


def _retention_value(group: Group, task: str, row: ResultRow) -> float | None:
    return _retention(group, row, task).value


def _decode_speedup(row: ResultRow | None) -> float | None:
    return None if row is None else speed_ratio(row, columns.DECODE_X.key).value


def _product_of_parts(
    group: Group, record: RunRecord, of: Callable[[ResultRow], float | None]
) -> float | None:
    """Return a ratio of the chain without its last stage times that of the last stage alone, where
    both have rows.

    None where the last stage trains: alone it would start from another student.
    """
    if record.stages[-1].cost.seen_tokens:
        return None
    parts = (
        record.stages[-2].label,
        record.stages[-1].label.removeprefix(record.stages[-2].label + "+"),
    )
    first, last = (
        next((of(row) for row in group.rows if row.label == part), None) for part in parts
    )
    return None if first is None or last is None else first * last


def claims_table(group: Group) -> Table | None:
    """The table that comparisons of methods begin with, measured: per family and for chains, beside
    what is claimed and published.
    """
    if not any(row.first.family in (*_COMPRESSION_FAMILIES, *CHAIN_FAMILIES) for row in group.rows):
        return None
    chance, order = teacher_at_chance_everywhere(group), cost_verdicts(group)
    rows = [line for claim in CLAIMS for line in _family_lines(group, claim, order, chance=chance)]
    return build_table(
        "claims",
        "What is claimed, published, and measured here",
        [*rows, *_chain_lines(group, chance=chance)],
    )


@dataclass(frozen=True)
class _ClaimedQuantity:
    """One quantity that is claimed of a family: what the records show of it, and where others'
    figures stand.
    """

    name: str  # as `spans` and `verdicts` name it
    quantity: Quantity
    field: str  # of the published records; "" where none holds it


_CLAIMED_QUANTITIES = (
    _ClaimedQuantity("retention", columns.CLAIMED_RETENTION, "retention_pct"),
    _ClaimedQuantity("speed", columns.CLAIMED_SPEED, "speedup"),
    _ClaimedQuantity("memory", columns.CLAIMED_MEMORY, "memory_ratio"),
    _ClaimedQuantity("cost", columns.CLAIMED_COST, ""),
)
_ALL_AT_ONCE = columns.ALL_AT_ONCE.header
_NOT_TESTABLE = "not testable here"


def _family_lines(
    group: Group, claim: FamilyClaim, order: Mapping[str, str], *, chance: bool
) -> list[RowCells]:
    measured = figures_of_families(group, claim.families)
    told = verdicts(claim, measured, chance=chance) if measured else {}
    told["cost"] = order.get(claim.name, _NOT_TESTABLE)
    values = _values_by_quantity(measured, chance=chance)
    ranges = {"retention": claim.retention, "speed": claim.speed, "memory": claim.memory}
    lines = []
    for asked in _CLAIMED_QUANTITIES:
        ends = ranges.get(asked.name)
        claimed = (
            claim.cost if ends is None else f"{ends[0]:g} to {ends[1]:g} {asked.quantity.unit}"
        )
        verdict = told.get(asked.name, _NOT_TESTABLE)
        lines.append(
            _claim_line(
                group,
                claim.name,
                asked,
                values[asked.name],
                (claimed, _published_text(asked, claim.published), verdict),
            )
        )
    verdict = told.get(_ALL_AT_ONCE, _NOT_TESTABLE)
    return [
        *lines,
        _claim_line(group, claim.name, None, (), ("the low ends together", DASH, verdict)),
    ]


def _chain_lines(group: Group, *, chance: bool) -> list[RowCells]:
    values = _values_by_quantity(figures_of_families(group, CHAIN_FAMILIES), chance=chance)
    lines = [
        _claim_line(
            group,
            "Chains",
            asked,
            values[asked.name],
            (DASH, _published_text(asked, _PUBLISHED_CHAINS), DASH),
        )
        for asked in _CLAIMED_QUANTITIES
    ]
    return [
        *lines,
        _claim_line(
            group,
            "Chains",
            None,
            (),
            ("no single method is as small and keeps as much", DASH, _chain_verdict(group)),
        ),
    ]


_PUBLISHED_CHAINS = ("combo", "prune+distil")


def _values_by_quantity(rows: Sequence[RowFigures], *, chance: bool) -> dict[str, list[float]]:
    """Return the values of each quantity; no retention of a teacher at chance."""
    return {**dict(measured_values(rows)), **({"retention": []} if chance else {})}


def _published_text(asked: _ClaimedQuantity, families: Sequence[str]) -> str:
    return published_range(families, asked.field, asked.quantity) if asked.field else DASH


def _claim_line(
    group: Group,
    method: str,
    asked: _ClaimedQuantity | None,
    values: Sequence[float],
    said: tuple[str, str, str],
) -> RowCells:
    """Return a line of the claims; `said` is what is claimed, what others published, and the
    verdict.
    """
    shown = {
        columns.METHOD.name: method,
        columns.QUANTITY.name: _quantity_name(group, asked) if asked else _ALL_AT_ONCE,
        columns.MEASURED.name: _range_text(values, asked.quantity) if asked else DASH,
        **{
            one.name: text
            for one, text in zip(
                (columns.CLAIMED, columns.PUBLISHED, columns.VERDICT), said, strict=True
            )
        },
    }
    ends = {
        columns.LOW.name: min(values, default=None),
        columns.HIGH.name: max(values, default=None),
    }
    return shown, {**shown, **ends}


def _quantity_name(group: Group, asked: _ClaimedQuantity) -> str:
    """Name a quantity; a speedup with the type in which the teacher ran beside it: packed kernels
    compute in bf16 whatever that is.
    """
    over = f" (over {group.shared['dtype']})" if asked.quantity is columns.CLAIMED_SPEED else ""
    return f"{asked.quantity.header}{over}"


def _range_text(values: Sequence[float], quantity: Quantity) -> str:
    """Write a range in the quantity's unit, one number where both ends read alike."""
    if not values:
        return DASH
    low, high = (quantity.digits(end) for end in (min(values), max(values)))
    return f"{low if low == high else f'{low} to {high}'} {quantity.unit}"
