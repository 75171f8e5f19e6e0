"""Claims about families of methods, what others published, and what was measured. No torch.

The claims are those that comparisons of compression methods keep repeating. The published figures
and their sources stand in `harness/reporting/assets/published.json`. The column `measured` comes
from records alone.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

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


class Range(NamedTuple):
    """The low and the high end of what is claimed."""

    low: float
    high: float


@dataclass(frozen=True)
class FamilyClaim:
    """What is claimed of one family of methods."""

    name: str
    families: tuple[str, ...]  # of the records' rows
    published_families: tuple[str, ...]  # of the published records
    retention: Range  # per cent
    speed: Range  # times the teacher's
    memory: Range  # times smaller than the teacher
    cost: str


CLAIMS = (
    FamilyClaim(
        "Quantization",
        ("quantization",),
        ("quantization",),
        retention=Range(95, 99),
        speed=Range(2, 4),
        memory=Range(2, 4),
        cost="low",
    ),
    FamilyClaim(
        "Pruning",
        ("pruning",),
        ("pruning",),
        retention=Range(90, 98),
        speed=Range(2, 5),
        memory=Range(2, 5),
        cost="medium",
    ),
    FamilyClaim(
        "Low-rank",
        ("low-rank",),
        ("low_rank",),
        retention=Range(85, 95),
        speed=Range(2, 3),
        memory=Range(2, 3),
        cost="medium",
    ),
    FamilyClaim(
        "Distillation",
        ("distillation",),
        ("distillation",),
        retention=Range(80, 95),
        speed=Range(3, 10),
        memory=Range(3, 10),
        cost="high",
    ),
)
CHAIN_FAMILIES = ("chain",)
_PUBLISHED_CHAINS = ("combo", "prune+distil")
LEAST_RETENTION = {
    family: claim.retention.low / 100 for claim in CLAIMS for family in claim.families
}
# what a chain must keep to count: the least that is claimed of any family
LEAST_RETENTION |= dict.fromkeys(CHAIN_FAMILIES, min(LEAST_RETENTION.values()))
_COMPRESSION_FAMILIES = ("quantization", "pruning", "low-rank")
_COST_LEVELS = ("low", "medium", "high")

# True: shown to be so. False: shown not to be so. None: not shown either way.
_Decision = bool | None


# --- what the rows of this study measure


@dataclass(frozen=True)
class RowFigures:
    """What one row measures of the claimed quantities; None where it was not measured."""

    label: str
    retentions: tuple[Interval, ...]  # by task
    speed: Interval
    memory: float | None
    seconds: float | None
    # of "it keeps less than the low end of its family's range on some task"
    p_noninferior: float | None = None
    p_inferior: float | None = None  # of "it keeps at least the low end on every task"

    @property
    def lowest_retention(self) -> float | None:
        """The retention on its worst task, per cent."""
        values = [interval.value for interval in self.retentions if interval.value is not None]
        return 100 * min(values) if values and len(values) == len(self.retentions) else None


def row_figures(group: Group, row: ResultRow) -> RowFigures:
    """Return a row's retention by task, decode speedup, memory reduction and seconds of making."""
    teacher, family = group.teacher, row.first.family
    tasks = [
        task
        for task in group.tasks
        if _has_retention(row, task) and retention_is_meaningful(group, task)
    ]
    retentions = tuple(compare(row, teacher, task, ratio=True) for task in tasks) if teacher else ()
    tests = (
        [retention_test(row, teacher, task, LEAST_RETENTION[family]) for task in tasks]
        if teacher and family in LEAST_RETENTION
        else []
    )
    row_bytes, teacher_bytes = _bytes_on_disk(row), _bytes_on_disk(teacher)
    seconds = [record.cost.seconds for record in row.succeeded if record.cost.seconds]
    return RowFigures(
        row.label,
        retentions,
        speed_ratio(row, columns.DECODE_X.key),
        teacher_bytes / row_bytes if row_bytes and teacher_bytes else None,
        fmean(seconds) if seconds else None,
        # all tasks must keep it, so the largest p counts; one task is enough for the opposite
        max((test.p_noninferior for test in tests), default=None),
        min(1.0, len(tests) * min(test.p_inferior for test in tests)) if tests else None,
    )


def _has_retention(row: ResultRow, task: str) -> bool:
    scores = row.scores(task)
    return bool(scores) and scores[0].retains


def _bytes_on_disk(row: ResultRow | None) -> float | None:
    sizes = [
        size.value
        for record in (row.succeeded if row else ())
        if (size := record.measurement(columns.DISK.key)) is not None
    ]
    return fmean(sizes) if sizes else None


def figures_of_families(group: Group, families: Sequence[str]) -> list[RowFigures]:
    """Return the figures of some families' rows, without controls and simulated rows."""
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
    """Tell whether the teacher is at chance on every task with right answers.

    Then no retention means anything.
    """
    tasks = [task for task in group.tasks if group.teacher and _has_retention(group.teacher, task)]
    return bool(tasks) and not any(retention_is_meaningful(group, task) for task in tasks)


def measured_values(rows: Sequence[RowFigures]) -> Iterator[tuple[str, list[float]]]:
    """Yield each quantity's name and its values over rows (retention: over tasks too)."""
    retentions = [interval.value for row in rows for interval in row.retentions]
    yield "retention", [100 * value for value in retentions if value is not None]
    yield "speed", [row.speed.value for row in rows if row.speed.value is not None]
    yield "memory", [row.memory for row in rows if row.memory is not None]
    yield "cost", [row.seconds for row in rows if row.seconds is not None]


# --- what others published


@lru_cache(maxsize=1)
def _published_records() -> tuple[dict[str, object], ...]:
    return tuple(json.loads(PUBLISHED.read_text(encoding="utf-8"))["records"])


def published_range(families: Sequence[str], field: str, quantity: Quantity) -> str:
    """Return the range of a field over published records, and the sizes of their models.

    Only methods count whose source was read first-hand. Sizes are the students' where a record
    names both models. Retentions (only those of kind `retention`) are given by benchmark, because
    MMLU and GSM8K differ under every method.
    """
    values_by_benchmark: dict[str, list[float]] = {"MMLU": [], "GSM8K": [], "other": []}
    sizes: list[float] = []
    is_retention = field == "retention_pct"
    for record in _published_records():
        counts = (
            record["family"] in families
            and record["role"] == "method"
            and record["status"] in _FIRST_HAND
            and record[field] is not None
        )
        if not counts or (is_retention and record["kind"] != "retention"):
            continue
        names = [name for name in ("MMLU", "GSM8K") if name in str(record["metric"])]
        benchmark = names[0] if is_retention and names else "other"
        values_by_benchmark[benchmark].append(float(str(record[field])))
        student = str(record["model"]).rpartition("->")[2]
        sizes += map(float, re.findall(r"(\d+(?:\.\d+)?)B\b(?! tokens)", student))
    filled = {name: values for name, values in values_by_benchmark.items() if values}
    if not filled:
        return DASH
    ranges = [
        f"{name} {_range_text(values, quantity)}"
        if len(filled) > 1
        else _range_text(values, quantity)
        for name, values in filled.items()
    ]
    return ", ".join(ranges) + _sizes_text(sizes)


def _sizes_text(sizes: Sequence[float]) -> str:
    """Write the sizes of published models, in billions of parameters, behind their range."""
    if not sizes:
        return ""
    low, high = min(sizes), max(sizes)
    return f" ({low:g}B)" if low == high else f" ({low:g}B to {high:g}B)"


# --- verdicts


def verdicts(claim: FamilyClaim, rows: Sequence[RowFigures], *, chance: bool) -> dict[str, str]:
    """Return the verdict on each claimed quantity, and on all of them at once.

    *holds here* names a row that was shown to reach the low end of the claimed range. Retention is
    decided by the test of `harness check` (alpha .05, Holm over the family's rows; every task must
    keep it), speed by its interval, memory exactly. *cannot tell* stands where no row shows it and
    not every row contradicts it. `chance` tells that the teacher is at chance everywhere.
    """
    decisions = {
        "retention": _retention_decisions(rows),
        "speed": [_ratio_decision(row.speed, claim.speed.low) for row in rows],
        "memory": [None if row.memory is None else row.memory >= claim.memory.low for row in rows],
    }
    testable = {
        "retention": not chance and any(row.lowest_retention is not None for row in rows),
        "speed": any(row.speed.value is not None for row in rows),
        "memory": any(row.memory is not None for row in rows),
    }
    labels = [row.label for row in rows]
    words = {
        name: _verdict_words(labels, of_rows, testable[name]) for name, of_rows in decisions.items()
    }
    joint = [_all_of(of_row) for of_row in zip(*decisions.values(), strict=True)]
    return {**words, _ALL_AT_ONCE: _verdict_words(labels, joint, all(testable.values()))}


def _retention_decisions(rows: Sequence[RowFigures]) -> list[_Decision]:
    """Decide for each row whether it keeps the low end of its family's range, Holm over rows."""
    noninferior = _holm_adjusted([row.p_noninferior for row in rows])
    inferior = _holm_adjusted([row.p_inferior for row in rows])
    return [_test_decision(*p_values) for p_values in zip(noninferior, inferior, strict=True)]


def _holm_adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values of those that were tested."""
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def _test_decision(p_noninferior: float | None, p_inferior: float | None) -> _Decision:
    if p_noninferior is None or p_inferior is None:
        return None
    return True if p_noninferior <= ALPHA else False if p_inferior <= ALPHA else None


def _ratio_decision(ratio: Interval, minimum: float) -> _Decision:
    """Decide by its interval whether a ratio reaches a value; without an interval: not shown."""
    if ratio.low is None or ratio.high is None:
        return None
    return True if ratio.low >= minimum else False if ratio.high < minimum else None


def _all_of(decisions: Sequence[_Decision]) -> _Decision:
    return False if False in decisions else None if None in decisions else True


def _chain_verdict(group: Group) -> str:
    """Return the verdict on "combining is best": no single method is as small and keeps as much.

    A single method beats a chain where it is as small, is shown to be better on a task, and is
    shown to be worse on none. A chain stands where every single method as small is shown to be
    worse on a task. A chain counts only where it is shown to keep the least that is claimed of any
    family.
    """
    single_families = (*_COMPRESSION_FAMILIES, "distillation")
    singles = [row for row in figures_of_families(group, single_families) if row.memory is not None]
    chains = [
        row
        for row in figures_of_families(group, CHAIN_FAMILIES)
        if row.memory is not None and row.lowest_retention is not None
    ]
    decisions = []
    for chain, keeps_enough in zip(chains, _retention_decisions(chains), strict=True):
        as_small = [single for single in singles if (single.memory or 0) >= (chain.memory or 0)]
        beats = [_beats_on_a_task(group, chain.label, single.label) for single in as_small]
        decisions.append(_all_of([keeps_enough, *beats]))
    testable = bool(chains and singles) and not teacher_at_chance_everywhere(group)
    return _verdict_words([chain.label for chain in chains], decisions, testable)


def _beats_on_a_task(group: Group, label: str, other_label: str) -> _Decision:
    """Decide whether a row is shown to be better than another one on some task.

    False where it is shown to be worse on a task and better on none.
    """
    rows = {row.label: row for row in group.rows}
    row, other_row = rows[label], rows[other_label]
    if row.trained_once or other_row.trained_once:
        return None
    differences = [
        compare(row, other_row, task, ratio=False)
        for task in group.tasks
        if retention_is_meaningful(group, task)
    ]
    if any(interval.low is not None and interval.low > 0 for interval in differences):
        return True
    is_worse = any(interval.high is not None and interval.high < 0 for interval in differences)
    return False if is_worse else None


_NOT_TESTABLE = "not testable here"


def _verdict_words(labels: Sequence[str], decisions: Sequence[_Decision], testable: bool) -> str:
    """Say whether any row reaches a claim: the first one that does, and how many of how many do."""
    if not testable:
        return _NOT_TESTABLE
    reaching = [label for label, decision in zip(labels, decisions, strict=True) if decision]
    if reaching:
        count = f", {len(reaching)} of {len(labels)} rows" if len(labels) > 1 else ""
        return f"holds here ({reaching[0]}{count})"
    return "cannot tell" if None in decisions else "does not"


def cost_verdicts(group: Group) -> dict[str, str]:
    """Return the verdict on each family's place in the claimed order of training costs.

    *holds here* where every row of a family took less time than every row of the families that are
    claimed to be dearer, and more than every row of the cheaper ones. *does not* where the opposite
    holds for all pairs of rows. Otherwise *cannot tell*, since a time has no interval.
    """
    seconds_by_family = {
        claim.name: [
            row.seconds for row in figures_of_families(group, claim.families) if row.seconds
        ]
        for claim in CLAIMS
    }
    levels = {claim.name: _COST_LEVELS.index(claim.cost) for claim in CLAIMS}
    words = {True: "holds here", False: "does not", None: "cannot tell"}
    cost_words = {}
    for name, seconds in seconds_by_family.items():
        if not seconds:
            continue
        decisions = [
            _cheaper_decision(seconds, other_seconds)
            if levels[name] < levels[other_name]
            else _cheaper_decision(other_seconds, seconds)
            for other_name, other_seconds in seconds_by_family.items()
            if other_seconds and levels[other_name] != levels[name]
        ]
        cost_words[name] = words[_all_of(decisions)] if decisions else _NOT_TESTABLE
    return cost_words


def _cheaper_decision(cheap: Sequence[float], dear: Sequence[float]) -> _Decision:
    """Decide whether all of `cheap` took less than all of `dear`; False where all took more."""
    return True if max(cheap) < min(dear) else False if min(cheap) > max(dear) else None


# --- the table of chains


def chains_table(group: Group) -> Table | None:
    """Return every chain stage by stage: the whole chain beside the product of its parts."""
    lines = [
        _stage_cells(group, row, record, number)
        for row in ordered_rows(group)
        if (record := next((record for record in row.succeeded if record.stages), None)) is not None
        for number in range(len(record.stages))
    ]
    if not lines:
        return None
    return build_table("chains", "Chains, stage by stage", without_empty_columns(lines))


def _stage_cells(group: Group, row: ResultRow, record: RunRecord, number: int) -> RowCells:
    """Return the line of one stage; the last one has the product of the chain's parts too."""
    line, stage = RowBuilder(row), record.stages[number]
    is_last = number == len(record.stages) - 1
    line.add_words(columns.STAGE, stage.label)
    row_of_stage = next((row for row in group.rows if row.label == stage.label), None)

    def product_of_parts(ratio: Callable[[ResultRow], float | None]) -> float | None:
        return _product_of_parts(group, record, ratio) if is_last else None

    for task in group.tasks:
        task_name = "" if len(group.tasks) == 1 else task
        retention = _retention(group, row_of_stage, task)
        column = columns.RETENTION.name.of(task_name)
        line.shown[column] = columns.RETENTION.with_interval(retention)
        line.exact[column] = retention.value
        retention_of_parts = product_of_parts(partial(_retention_value, group, task))
        line.add(columns.RETENTION_OF_PARTS, retention_of_parts, task=task_name)
    line.add(columns.SIZE, None if stage.simulated else stage.weight_bytes)
    # the product of two sizes is a size again once it is divided by the teacher's
    teacher_bytes, product_of_sizes = (
        _bytes_on_disk(group.teacher),
        product_of_parts(_bytes_on_disk),
    )
    line.add(
        columns.SIZE_OF_PARTS,
        product_of_sizes / teacher_bytes if teacher_bytes and product_of_sizes else None,
    )
    line.add(columns.DECODE_X, _decode_speedup(row_of_stage))
    line.add(columns.DECODE_X_OF_PARTS, product_of_parts(_decode_speedup))
    line.add(columns.STAGE_SECONDS, stage.cost.seconds or None)
    return line.cells


def _retention(group: Group, row: ResultRow | None, task: str) -> Interval:
    """Return a row's retention on a task; empty without a row or where the teacher is at chance."""
    if row is None or group.teacher is None or teacher_at_chance(group, task):
        return Interval(None)
    return compare(row, group.teacher, task, ratio=True)


def _retention_value(group: Group, task: str, row: ResultRow) -> float | None:
    return _retention(group, row, task).value


def _decode_speedup(row: ResultRow | None) -> float | None:
    return None if row is None else speed_ratio(row, columns.DECODE_X.key).value


def _product_of_parts(
    group: Group, record: RunRecord, ratio: Callable[[ResultRow], float | None]
) -> float | None:
    """Return a ratio of the chain without its last stage, times that of the last stage alone.

    None where one of them has no row, and where the last stage trains: alone it would start from
    another student.
    """
    if record.stages[-1].cost.seen_tokens:
        return None
    first_part = record.stages[-2].label
    last_part = record.stages[-1].label.removeprefix(f"{first_part}+")
    first, last = (
        next((ratio(row) for row in group.rows if row.label == part), None)
        for part in (first_part, last_part)
    )
    return None if first is None or last is None else first * last


# --- the table of claims


def claims_table(group: Group) -> Table | None:
    """Return what is claimed, published and measured of each family and of chains."""
    families = (*_COMPRESSION_FAMILIES, *CHAIN_FAMILIES)
    if not any(row.first.family in families for row in group.rows):
        return None
    chance, cost_words = teacher_at_chance_everywhere(group), cost_verdicts(group)
    lines = [
        line
        for claim in CLAIMS
        for line in _family_lines(
            group, claim, cost_words.get(claim.name, _NOT_TESTABLE), chance=chance
        )
    ]
    lines += _chain_lines(group, chance=chance)
    return build_table("claims", "What is claimed, published, and measured here", lines)


@dataclass(frozen=True)
class _ClaimedQuantity:
    """One quantity that is claimed of a family, and where published records hold it."""

    name: str  # as `measured_values` and `verdicts` name it
    quantity: Quantity
    field: str  # of the published records; "" where none holds it


_CLAIMED_QUANTITIES = (
    _ClaimedQuantity("retention", columns.CLAIMED_RETENTION, "retention_pct"),
    _ClaimedQuantity("speed", columns.CLAIMED_SPEED, "speedup"),
    _ClaimedQuantity("memory", columns.CLAIMED_MEMORY, "memory_ratio"),
    _ClaimedQuantity("cost", columns.CLAIMED_COST, ""),
)
_ALL_AT_ONCE = columns.ALL_AT_ONCE.header


class _ClaimTexts(NamedTuple):
    """The texts of one line: what is claimed, what others published, and the verdict."""

    claimed: str
    published: str
    verdict: str


def _family_lines(
    group: Group, claim: FamilyClaim, cost_words: str, *, chance: bool
) -> list[RowCells]:
    rows = figures_of_families(group, claim.families)
    words = verdicts(claim, rows, chance=chance) if rows else {}
    words["cost"] = cost_words
    values = _values_by_quantity(rows, chance=chance)
    ranges = {"retention": claim.retention, "speed": claim.speed, "memory": claim.memory}
    lines = []
    for claimed in _CLAIMED_QUANTITIES:
        name, span = claimed.name, ranges.get(claimed.name)
        texts = _ClaimTexts(
            f"{span.low:g} to {span.high:g} {claimed.quantity.unit}" if span else claim.cost,
            _published_text(claimed, claim.published_families),
            words.get(name, _NOT_TESTABLE),
        )
        lines.append(_claim_line(group, claim.name, claimed, values[name], texts))
    verdict = words.get(_ALL_AT_ONCE, _NOT_TESTABLE)
    texts = _ClaimTexts("the low ends together", DASH, verdict)
    return [*lines, _claim_line(group, claim.name, None, (), texts)]


def _chain_lines(group: Group, *, chance: bool) -> list[RowCells]:
    values = _values_by_quantity(figures_of_families(group, CHAIN_FAMILIES), chance=chance)
    lines = []
    for claimed in _CLAIMED_QUANTITIES:
        texts = _ClaimTexts(DASH, _published_text(claimed, _PUBLISHED_CHAINS), DASH)
        lines.append(_claim_line(group, "Chains", claimed, values[claimed.name], texts))
    claim_text = "no single method is as small and keeps as much"
    texts = _ClaimTexts(claim_text, DASH, _chain_verdict(group))
    return [*lines, _claim_line(group, "Chains", None, (), texts)]


def _values_by_quantity(rows: Sequence[RowFigures], *, chance: bool) -> dict[str, list[float]]:
    """Return the values of each quantity; no retention where the teacher is at chance."""
    return {**dict(measured_values(rows)), **({"retention": []} if chance else {})}


def _published_text(claimed: _ClaimedQuantity, families: Sequence[str]) -> str:
    return published_range(families, claimed.field, claimed.quantity) if claimed.field else DASH


def _claim_line(
    group: Group,
    method: str,
    claimed: _ClaimedQuantity | None,
    values: Sequence[float],
    texts: _ClaimTexts,
) -> RowCells:
    """Return a line of the table; `claimed` is None in the line of all quantities at once."""
    shown = {
        columns.METHOD.name: method,
        columns.QUANTITY.name: _quantity_name(group, claimed) if claimed else _ALL_AT_ONCE,
        columns.MEASURED.name: _range_text(values, claimed.quantity) if claimed else DASH,
        columns.CLAIMED.name: texts.claimed,
        columns.PUBLISHED.name: texts.published,
        columns.VERDICT.name: texts.verdict,
    }
    ends = {
        columns.LOW.name: min(values, default=None),
        columns.HIGH.name: max(values, default=None),
    }
    return RowCells(shown, {**shown, **ends})


def _quantity_name(group: Group, claimed: _ClaimedQuantity) -> str:
    """Return a quantity's header; a speedup's also names the teacher's type.

    Packed kernels compute in bf16 whatever that type is.
    """
    over = f" (over {group.shared['dtype']})" if claimed.quantity is columns.CLAIMED_SPEED else ""
    return f"{claimed.quantity.header}{over}"


def _range_text(values: Sequence[float], quantity: Quantity) -> str:
    """Write a range in the quantity's unit, or one number where both ends read the same."""
    if not values:
        return DASH
    low, high = (quantity.digits(end) for end in (min(values), max(values)))
    return f"{low if low == high else f'{low} to {high}'} {quantity.unit}"
