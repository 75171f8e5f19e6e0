"""One table: header cells, rows of text, the exact numbers behind them, and which cells are the best. No torch."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.checkpoint import keep_file
from harness.escape import clean, csv_cell, markdown_cell
from harness.groups import Row, block_of
from harness.stats import Interval

if TYPE_CHECKING:
    import pandas

DASH = "-"
MIB = 2**20
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
_LESS_IS_BETTER = re.compile(
    r"perplexity|bits per byte|\berror$|against teacher|\bKL$|MiB$|(?<!/)\bm?s$|s/problem|s/correct|invalid|lost/won|FLOPs|energy|seen|"
    r"trained|money"
)


class Best(str):
    """A cell of a row that is the best one, or not significantly worse than it; forms show it in bold."""


@dataclass(frozen=True)
class Table:
    """One table: header cells, rows of text (`Best` where bold), the block of each row, and the same numbers unrounded."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]  # of each row: teacher, its family, control; "" in tables that are not ordered by them
    exact: tuple[dict[str, object], ...]

    @property
    def frame(self) -> "pandas.DataFrame":
        """The unrounded numbers as a frame."""
        import pandas

        return pandas.DataFrame(list(self.exact))

    def to_csv(self, path: Path) -> None:
        """Write the unrounded numbers as CSV: no text in it is a formula to a spreadsheet, or tells a terminal anything."""
        frame = self.frame
        frame = frame.map(csv_cell).rename(columns=csv_cell)
        keep_file(path, lambda fresh: frame.to_csv(fresh, index=False, float_format="%.6g", lineterminator="\n"))

    def ordered_by(self, column: str) -> "Table":
        """Return the table with each block's rows in the order of a column's numbers, best first (`-column`: worst first).

        Blocks stay together, in the order of their first row; the teacher stays first and the controls stay last. A table without
        that column, or in which a row fills several lines, comes back as it is.
        """
        name, reverse = (column[1:], True) if column.startswith("-") else (column, False)
        if name not in self.columns or not any(self.blocks) or len({row[0] for row in self.rows}) < len(self.rows):
            return self
        at, sign = self.columns.index(name), (1 if less_is_better(name) else -1) * (-1 if reverse else 1)

        def key(line: int) -> tuple[bool, float]:
            found = number_in(self.rows[line][at])
            return found is None, 0.0 if found is None else sign * found

        first = {block: min((key(line) for line, own in enumerate(self.blocks) if own == block)) for block in self.blocks}
        place = {block: {"teacher": -1, "control": 1}.get(block, 0) for block in self.blocks}
        lines = sorted(
            range(len(self.rows)),
            key=lambda line: (place[self.blocks[line]], first[self.blocks[line]], self.blocks[line], key(line), line),
        )
        return replace(
            self, rows=tuple(self.rows[line] for line in lines), blocks=tuple(self.blocks[line] for line in lines),
            exact=tuple(self.exact[line] for line in lines),
        )  # fmt: skip


def mebibytes(value: float) -> str:
    """Write a number of MiB with two decimals; less than a hundredth keeps two digits, since 0.00 reads as none."""
    return f"{value:.2g}" if 0 < value < 0.005 else f"{value:,.2f}"


def finite(value: Any) -> Any:
    """Return JSON-like data with what is no finite number as null: NaN and infinity are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def cell_of(text: str) -> str:
    """Return a text that may stand in a cell of a Markdown table: on one line, and no bar that would end the cell."""
    return markdown_cell(text)


def less_is_better(column: str) -> bool:
    """Tell whether a column's smaller numbers are the better ones."""
    return bool(_LESS_IS_BETTER.search(column))


def number_in(text: str) -> float | None:
    """Return the first number of a cell, None where there is none."""
    found = _NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else None


def percent(found: Interval, *, digits: int = 1) -> str:
    """Show a share in per cent, with its interval."""
    if found.value is None:
        return DASH
    text = f"{100 * found.value:.{digits}f} %"
    return text if found.low is None or found.high is None else f"{text} [{100 * found.low:.{digits}f}, {100 * found.high:.{digits}f}]"


def points(found: Interval) -> str:
    """Show a difference in points, signed, with its interval."""
    if found.value is None:
        return DASH
    text = f"{100 * found.value:+.1f}"
    return text if found.low is None or found.high is None else f"{text} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def plain(found: Interval) -> str:
    """Show a difference of figures that are no shares, signed, with its interval."""
    if found.value is None:
        return DASH
    text = f"{found.value:+.3f}"
    return text if found.low is None or found.high is None else f"{text} [{found.low:+.3f}, {found.high:+.3f}]"


def status_of(row: Row) -> str:
    """Return what is wrong with a row's records, the first that is; "" of none."""
    broken = [record for record in row.records if record.status != "success"]
    return "" if not broken else clean(f"{broken[0].status}: {broken[0].reason}")


def shown_name(row: Row) -> str:
    """Return a row's label; a control says that it is one."""
    return clean(f"{row.label} (control)" if row.first.is_control else row.label)


def table_of(name: str, title: str, rows: Sequence[tuple[dict[str, str], dict[str, object]]]) -> Table:
    """Build a table from (shown, exact) pairs of rows; `family` among the exact values names a row's block."""
    columns = tuple(dict.fromkeys(column for shown, _ in rows for column in shown))
    texts = tuple(tuple(shown.get(column, DASH) for column in columns) for shown, _ in rows)
    return Table(name, title, columns, texts, tuple(str(exact.get("family", "")) for _, exact in rows), tuple(exact for _, exact in rows))


class Line:
    """One row of a table in the making: what is shown, and the exact values beside it."""

    def __init__(self, row: Row) -> None:
        self.shown: dict[str, str] = {"row": shown_name(row)}
        self.exact: dict[str, object] = {"row": row.label, "family": block_of(row)}

    def add(self, column: str, value: float | None, form: Callable[[float], str]) -> None:
        """Add a number; a dash where it was not measured."""
        self.shown[column] = DASH if value is None else form(value)
        self.exact[column] = value

    def add_ratio(self, column: str, found: Interval, verdict: str) -> None:
        """Add a speed ratio, which counts only beside a verdict on quality: none without one, in brackets where quality is lost."""
        shown = DASH
        if found.value is not None and verdict != DASH:
            shown = f"{found.value:.2f}"
            if found.low is not None and found.high is not None:
                shown += f" [{found.low:.2f}, {found.high:.2f}]"
            shown = f"({shown})" if verdict == "no" else shown
        self.shown[column] = shown
        self.exact |= {column: found.value, f"{column} low": found.low, f"{column} high": found.high}


def without_dashes(rows: list[tuple[dict[str, str], dict[str, object]]]) -> list[tuple[dict[str, str], dict[str, object]]]:
    """Leave out the columns that no row has a value for."""
    filled = {column for shown, _ in rows for column, text in shown.items() if text != DASH}
    empty = {column for shown, _ in rows for column in shown} - filled

    def kept(line: Mapping[str, Any]) -> dict[str, Any]:
        return {column: value for column, value in line.items() if column not in empty}

    return [(kept(shown), kept(exact)) for shown, exact in rows]


def mean_of(row: Row | None, name: str) -> float | None:
    """Return a measurement's mean over a row's seeds, None where it was not made."""
    found = [one.value for record in (row.done if row else ()) if (one := record.measured(name)) is not None]
    return fmean(found) if found else None
