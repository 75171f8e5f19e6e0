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
    Row,
    by_chance,
    compare,
    keeps,
    means_something,
    ordered,
)
from harness.records import columns
from harness.records.columns import DASH, Quantity
from harness.records.record import TEACHER, RunRecord
from harness.reporting.costs import speed_ratio
from harness.reporting.table import Cells, Line, Table, table_of, without_dashes
from harness.statistics.intervals import Interval
from harness.statistics.stats import holm

_FIRST_HAND = ("read: first-party document", "read: copy of the first-party text")
PUBLISHED = Path(__file__).parent / "assets" / "published.json"


@dataclass(frozen=True)
class Claim:
    """One line of the claims: ranges as low and high ends."""

    name: str
    families: tuple[str, ...]  # of the records' rows
    published: tuple[str, ...]  # families of the published records
    retention: tuple[float, float]  # per cent
    speed: tuple[float, float]  # times the teacher's
    memory: tuple[float, float]  # times less
    cost: str


CLAIMS = (
    Claim("Quantization", ("quantization",), ("quantization",), (95, 99), (2, 4), (2, 4), "low"),
    Claim("Pruning", ("pruning",), ("pruning",), (90, 98), (2, 5), (2, 5), "medium"),
    Claim("Low-rank", ("low-rank",), ("low_rank",), (85, 95), (2, 3), (2, 3), "medium"),
    Claim("Distillation", ("distillation",), ("distillation",), (80, 95), (3, 10), (3, 10), "high"),
)
CHAINS = ("chain",)
KEPT = {family: claim.retention[0] / 100 for claim in CLAIMS for family in claim.families}
# what a chain must keep to count: the least that is claimed of any family
KEPT |= dict.fromkeys(CHAINS, min(KEPT.values()))
_COMPRESSED = ("quantization", "pruning", "low-rank")
_COSTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Shown:
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


def shown(found: Group, row: Row) -> Shown:
    """Read a row: retention task by task, decode speed against the teacher, bytes on disk, seconds
    of making.
    """
    judged = [task for task in found.tasks if _scored(row, task) and means_something(found, task)]
    kept = (
        tuple(compare(row, found.teacher, task, ratio=True) for task in judged)
        if found.teacher
        else ()
    )
    tests = (
        [keeps(row, found.teacher, task, KEPT[row.first.family]) for task in judged]
        if found.teacher and row.first.family in KEPT
        else []
    )
    own, base = _bytes(row), _bytes(found.teacher)
    seconds = [record.cost.seconds for record in row.done if record.cost.seconds]
    return Shown(
        row.label,
        kept,
        speed_ratio(row, columns.DECODE_X.key),
        base / own if own and base else None,
        fmean(seconds) if seconds else None,
        max((p for p, _ in tests), default=None),
        min(1.0, len(tests) * min(p for _, p in tests)) if tests else None,
    )


def _scored(row: Row, task: str) -> bool:
    scores = row.scores(task)
    return bool(scores) and scores[0].retains


def _bytes(row: Row | None) -> float | None:
    found = [
        one.value
        for record in (row.done if row else ())
        if (one := record.measured(columns.DISK.key)) is not None
    ]
    return fmean(found) if found else None


def rows_of(found: Group, families: Sequence[str]) -> list[Shown]:
    """Return what the rows of some families show, controls and simulated ones left out."""
    return [
        shown(found, row)
        for row in found.rows
        if row.done
        and row.label != TEACHER
        and row.first.family in families
        and not row.first.is_control
        and _bytes(row) is not None
    ]


def at_chance(found: Group) -> bool:
    """Tell whether the teacher is at chance on every task with a right answer: then no retention
    means anything.
    """
    asked = [task for task in found.tasks if found.teacher and _scored(found.teacher, task)]
    return bool(asked) and not any(means_something(found, task) for task in asked)


@lru_cache(maxsize=1)
def _published() -> tuple[dict[str, object], ...]:
    return tuple(json.loads(PUBLISHED.read_text(encoding="utf-8"))["records"])


def published(families: Sequence[str], field: str, quantity: Quantity) -> str:
    """Return the ranges of a field over the published records of methods that were read first-hand,
    and the sizes of their models.

    Sizes are the students' where a record names both. Retentions (of kind `retention` alone) stand
    apart by benchmark: MMLU and GSM8K part company under every method.
    """
    by: dict[str, list[float]] = {"MMLU": [], "GSM8K": [], "other": []}
    sizes: list[float] = []
    for one in _published():
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
        f"{name} {_span(values, quantity)}" if apart else _span(values, quantity)
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


def spans(rows: Sequence[Shown]) -> Iterator[tuple[str, list[float]]]:
    """Yield each measured quantity with its values over rows (retention: over tasks too)."""
    yield (
        "retention",
        [100 * one.value for row in rows for one in row.retentions if one.value is not None],
    )
    yield "speed", [row.speed.value for row in rows if row.speed.value is not None]
    yield "memory", [row.memory for row in rows if row.memory is not None]
    yield "cost", [row.seconds for row in rows if row.seconds is not None]


def verdicts(claim: Claim, rows: Sequence[Shown], *, chance: bool) -> dict[str, str]:
    """Judge a claim column by column, and all at once: *holds here* names a row that was shown to
    reach the low end of the claimed range.

    Retention by the test of the gate (alpha .05, Holm over the family's rows; every task must keep
    it), speed by its interval, memory exactly. What neither one row shows nor every row contradicts
    is *cannot tell*.
    """
    unkept, keeping = (
        _adjusted([getattr(row, name) for row in rows]) for name in ("unkept", "keeps")
    )
    kept = [_shown_by(no, yes) for no, yes in zip(unkept, keeping, strict=True)]
    fast = [_reaches(row.speed, claim.speed[0]) for row in rows]
    small = [None if row.memory is None else row.memory >= claim.memory[0] for row in rows]
    testable = {
        "retention": not chance and any(row.lowest is not None for row in rows),
        "speed": any(row.speed.value is not None for row in rows),
        "memory": any(row.memory is not None for row in rows),
    }
    judged = {"retention": kept, "speed": fast, "memory": small}
    labels = [row.label for row in rows]
    told = {name: _verdict(labels, reached, testable[name]) for name, reached in judged.items()}
    together = [_all(three) for three in zip(kept, fast, small, strict=True)]
    return {**told, columns.ALL_AT_ONCE.header: _verdict(labels, together, all(testable.values()))}


_Reached = bool | None  # shown, shown not to be, or neither


def _adjusted(values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values of those that were tested."""
    adjusted = iter(holm([p for p in values if p is not None]))
    return [None if p is None else next(adjusted) for p in values]


def _shown_by(unkept: float | None, keeps: float | None) -> _Reached:
    if unkept is None or keeps is None:
        return None
    return True if unkept <= ALPHA else False if keeps <= ALPHA else None


def _reaches(ratio: Interval, least: float) -> _Reached:
    """Tell by its interval whether a ratio reaches a value; a ratio without an interval shows
    nothing.
    """
    if ratio.low is None or ratio.high is None:
        return None
    return True if ratio.low >= least else False if ratio.high < least else None


def _all(three: Sequence[_Reached]) -> _Reached:
    return False if False in three else None if None in three else True


def _undominated(found: Group) -> str:
    """Judge that combining is best: a chain beside which no single method takes as few bytes and
    keeps as much.

    A chain is beaten by a single method that is as small, shown to be better on a task and on none
    shown to be worse; it stands where every single method as small is shown to be worse on a task.
    A chain that is not shown to keep the least that is claimed of any family does not count.
    """
    singles = [
        row for row in rows_of(found, (*_COMPRESSED, "distillation")) if row.memory is not None
    ]
    chained = [
        row for row in rows_of(found, CHAINS) if row.memory is not None and row.lowest is not None
    ]
    kept = [
        _shown_by(*pair)
        for pair in zip(
            _adjusted([row.unkept for row in chained]),
            _adjusted([row.keeps for row in chained]),
            strict=True,
        )
    ]
    stands = [
        _all(
            [
                good,
                *(
                    _outdoes(found, row.label, other.label)
                    for other in singles
                    if (other.memory or 0) >= (row.memory or 0)
                ),
            ]
        )
        for row, good in zip(chained, kept, strict=True)
    ]
    return _verdict(
        [row.label for row in chained], stands, bool(chained and singles) and not at_chance(found)
    )


def _outdoes(found: Group, label: str, other: str) -> _Reached:
    """Tell whether a row is shown to be better than another on a task; False where it is shown to
    be worse on one and better on none.
    """
    rows = {row.label: row for row in found.rows}
    if rows[label].trained_once or rows[other].trained_once:
        return None
    gaps = [
        compare(rows[label], rows[other], task, ratio=False)
        for task in found.tasks
        if means_something(found, task)
    ]
    better = any(gap.low is not None and gap.low > 0 for gap in gaps)
    worse = any(gap.high is not None and gap.high < 0 for gap in gaps)
    return True if better else False if worse else None


def _verdict(labels: Sequence[str], reached: Sequence[_Reached], testable: bool) -> str:
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


def cost_order(found: Group) -> dict[str, str]:
    """Judge the claimed order of costs: *holds here* where every row of a family took less than
    every row of those claimed dearer.

    *Does not* where the order is the other way round for every pair of rows, else *cannot tell*: a
    median has no interval.
    """
    taken = {
        claim.name: [row.seconds for row in rows_of(found, claim.families) if row.seconds]
        for claim in CLAIMS
    }
    ranks = {claim.name: _COSTS.index(claim.cost) for claim in CLAIMS}
    told = {}
    for name, seconds in taken.items():
        others = {
            other: values
            for other, values in taken.items()
            if values and ranks[other] != ranks[name]
        }
        if seconds:
            ordered = [
                _cheaper(seconds, values)
                if ranks[name] < ranks[other]
                else _cheaper(values, seconds)
                for other, values in others.items()
            ]
            told[name] = (
                "not testable here"
                if not others
                else {True: "holds here", False: "does not", None: "cannot tell"}[_all(ordered)]
            )
    return told


def _cheaper(ours: Sequence[float], theirs: Sequence[float]) -> _Reached:
    """Tell whether all of ours took less than all of theirs; False where all took more."""
    return True if max(ours) < min(theirs) else False if min(ours) > max(theirs) else None


def chains(found: Group) -> Table | None:
    """Every chain stage by stage, and the product of its parts beside the measured whole."""
    lines = [
        _stage(found, row, record, at)
        for row in ordered(found)
        if (record := next((one for one in row.done if one.stages), None)) is not None
        for at in range(len(record.stages))
    ]
    return table_of("chains", "Chains, stage by stage", without_dashes(lines)) if lines else None


def _stage(found: Group, row: Row, record: RunRecord, at: int) -> Cells:
    """Return one stage of a chain; the last one stands beside the product of its parts."""
    line, stage, last, base = (
        Line(row),
        record.stages[at],
        at == len(record.stages) - 1,
        _bytes(found.teacher),
    )
    line.add_words(columns.STAGE, stage.label)
    own = next((other for other in found.rows if other.label == stage.label), None)

    def product(of: Callable[[Row], float | None]) -> float | None:
        return _product(found, record, of) if last else None

    for task in found.tasks:
        beside, kept_here = "" if len(found.tasks) == 1 else task, _kept(found, own, task)
        column = columns.RETENTION.name.of(beside)
        line.shown[column], line.exact[column] = (
            columns.RETENTION.with_interval(kept_here),
            kept_here.value,
        )
        line.add(
            columns.RETENTION_OF_PARTS,
            product(partial(_kept_value, found, task)),
            task=beside,
        )
    line.add(columns.SIZE, None if stage.simulated else stage.weight_bytes)
    size = product(_bytes)  # of two sizes: over the teacher's, a size again
    line.add(columns.SIZE_OF_PARTS, size / base if base and size else None)
    line.add(columns.DECODE_X, _decode(own))
    line.add(columns.DECODE_X_OF_PARTS, product(_decode))
    line.add(columns.STAGE_SECONDS, stage.cost.seconds or None)
    return line.cells


def _kept(found: Group, row: Row | None, task: str) -> Interval:
    """Return a row's retention on a task; none where there is no row, or where the teacher is at
    chance.
    """
    known = row is not None and found.teacher is not None and not by_chance(found, task)
    return compare(row, found.teacher, task, ratio=True) if known else Interval(None)  # type: ignore[arg-type]


def _kept_value(found: Group, task: str, row: Row) -> float | None:
    return _kept(found, row, task).value


def _decode(row: Row | None) -> float | None:
    return None if row is None else speed_ratio(row, columns.DECODE_X.key).value


def _product(found: Group, record: RunRecord, of: Callable[[Row], float | None]) -> float | None:
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
        next((of(row) for row in found.rows if row.label == part), None) for part in parts
    )
    return None if first is None or last is None else first * last


def claimed(found: Group) -> Table | None:
    """The table that comparisons of methods begin with, measured: per family and for chains, beside
    what is claimed and published.
    """
    if not any(row.first.family in (*_COMPRESSED, *CHAINS) for row in found.rows):
        return None
    chance, order = at_chance(found), cost_order(found)
    rows = [line for claim in CLAIMS for line in _of_family(found, claim, order, chance=chance)]
    return table_of(
        "claims",
        "What is claimed, published, and measured here",
        [*rows, *_of_chains(found, chance=chance)],
    )


@dataclass(frozen=True)
class _Asked:
    """One quantity that is claimed of a family: what the records show of it, and where others'
    figures stand.
    """

    name: str  # as `spans` and `verdicts` name it
    quantity: Quantity
    field: str  # of the published records; "" where none holds it


_ASKED = (
    _Asked("retention", columns.CLAIMED_RETENTION, "retention_pct"),
    _Asked("speed", columns.CLAIMED_SPEED, "speedup"),
    _Asked("memory", columns.CLAIMED_MEMORY, "memory_ratio"),
    _Asked("cost", columns.CLAIMED_COST, ""),
)
_TOGETHER = columns.ALL_AT_ONCE.header
_NOT_TESTABLE = "not testable here"


def _of_family(
    found: Group, claim: Claim, order: Mapping[str, str], *, chance: bool
) -> list[Cells]:
    measured = rows_of(found, claim.families)
    told = verdicts(claim, measured, chance=chance) if measured else {}
    told["cost"] = order.get(claim.name, _NOT_TESTABLE)
    values = _spans(measured, chance=chance)
    ranges = {"retention": claim.retention, "speed": claim.speed, "memory": claim.memory}
    lines = []
    for asked in _ASKED:
        ends = ranges.get(asked.name)
        claimed = (
            claim.cost if ends is None else f"{ends[0]:g} to {ends[1]:g} {asked.quantity.unit}"
        )
        verdict = told.get(asked.name, _NOT_TESTABLE)
        lines.append(
            _line(
                found,
                claim.name,
                asked,
                values[asked.name],
                (claimed, _others(asked, claim.published), verdict),
            )
        )
    verdict = told.get(_TOGETHER, _NOT_TESTABLE)
    return [*lines, _line(found, claim.name, None, (), ("the low ends together", DASH, verdict))]


def _of_chains(found: Group, *, chance: bool) -> list[Cells]:
    values = _spans(rows_of(found, CHAINS), chance=chance)
    lines = [
        _line(found, "Chains", asked, values[asked.name], (DASH, _others(asked, _COMBINED), DASH))
        for asked in _ASKED
    ]
    return [
        *lines,
        _line(
            found,
            "Chains",
            None,
            (),
            ("no single method is as small and keeps as much", DASH, _undominated(found)),
        ),
    ]


_COMBINED = ("combo", "prune+distil")


def _spans(rows: Sequence[Shown], *, chance: bool) -> dict[str, list[float]]:
    """Return the values of each quantity; no retention of a teacher at chance."""
    return {**dict(spans(rows)), **({"retention": []} if chance else {})}


def _others(asked: _Asked, families: Sequence[str]) -> str:
    return published(families, asked.field, asked.quantity) if asked.field else DASH


def _line(
    found: Group,
    method: str,
    asked: _Asked | None,
    values: Sequence[float],
    said: tuple[str, str, str],
) -> Cells:
    """Return a line of the claims; `said` is what is claimed, what others published, and the
    verdict.
    """
    shown = {
        columns.METHOD.name: method,
        columns.QUANTITY.name: _quantity(found, asked) if asked else _TOGETHER,
        columns.MEASURED.name: _span(values, asked.quantity) if asked else DASH,
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


def _quantity(found: Group, asked: _Asked) -> str:
    """Name a quantity; a speedup with the type in which the teacher ran beside it: packed kernels
    compute in bf16 whatever that is.
    """
    over = f" (over {found.shared['dtype']})" if asked.quantity is columns.CLAIMED_SPEED else ""
    return f"{asked.quantity.header}{over}"


def _span(values: Sequence[float], quantity: Quantity) -> str:
    """Write a range in the quantity's unit, one number where both ends read alike."""
    if not values:
        return DASH
    low, high = (quantity.digits(end) for end in (min(values), max(values)))
    return f"{low if low == high else f'{low} to {high}'} {quantity.unit}"
