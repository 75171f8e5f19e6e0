"""One table: header cells, rows of text, the exact numbers behind them, and which cells are the
best. No torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.analysis.comparison import ResultRow, row_block
from harness.escape import clean, csv_cell
from harness.files.writing import replace_file
from harness.records.columns import DASH, FAMILY, ROW, Header, Quantity, quantity_of
from harness.statistics.intervals import Interval

if TYPE_CHECKING:
    import pandas

_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
# of one row, by column: what is shown, and the exact values
RowCells = tuple[dict[Header, str], dict[Header, object]]


class BestCell(str):
    """A cell of a row that is the best one, or not significantly worse than it; forms show it in
    bold.
    """


@dataclass(frozen=True)
class Table:
    """One table: header cells, rows of text (`Best` where bold), the block of each row, and the
    same numbers unrounded.
    """

    name: str
    title: str
    columns: tuple[Header, ...]
    rows: tuple[tuple[str, ...], ...]
    # of each row: teacher, its family, control; "" in tables that are not ordered by them
    blocks: tuple[str, ...]
    exact: tuple[dict[Header, object], ...]

    @property
    def frame(self) -> "pandas.DataFrame":
        """The unrounded numbers as a frame."""
        import pandas

        return pandas.DataFrame(list(self.exact))

    def to_csv(self, path: Path) -> None:
        """Write the unrounded numbers as CSV: no text in it is a formula to a spreadsheet, or tells
        a terminal anything.
        """
        frame = self.frame
        frame = frame.map(csv_cell).rename(columns=csv_cell)
        replace_file(
            path,
            lambda fresh: frame.to_csv(
                fresh, index=False, float_format="%.6g", lineterminator="\n"
            ),
        )

    def ordered_by(self, column: str) -> "Table":
        """Return the table with each block's rows in the order of a column's numbers, best first
        (`-column`: worst first).

        Blocks stay together, in the order of their first row; the teacher stays first and the
        controls stay last. A table without that column, or in which a row fills several lines,
        comes back as it is.
        """
        name, reverse = (column[1:], True) if column.startswith("-") else (column, False)
        if (
            name not in self.columns
            or not any(self.blocks)
            or len({row[0] for row in self.rows}) < len(self.rows)
        ):
            return self
        at = self.columns.index(name)
        sign = (1 if less_is_better(self.columns[at]) else -1) * (-1 if reverse else 1)

        def key(line: int) -> tuple[bool, float]:
            found = first_number(self.rows[line][at])
            return found is None, 0.0 if found is None else sign * found

        first = {
            block: min((key(line) for line, own in enumerate(self.blocks) if own == block))
            for block in self.blocks
        }
        place = {block: {"teacher": -1, "control": 1}.get(block, 0) for block in self.blocks}
        lines = sorted(
            range(len(self.rows)),
            key=lambda line: (
                place[self.blocks[line]],
                first[self.blocks[line]],
                self.blocks[line],
                key(line),
                line,
            ),
        )
        return replace(
            self,
            rows=tuple(self.rows[line] for line in lines),
            blocks=tuple(self.blocks[line] for line in lines),
            exact=tuple(self.exact[line] for line in lines),
        )


def less_is_better(column: str) -> bool:
    """Tell whether a column's smaller numbers are the better ones."""
    quantity = quantity_of(column)
    return quantity is not None and quantity.better == "lower"


def first_number(text: str) -> float | None:
    """Return the first number of a cell, None where there is none."""
    found = _NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else None


def failure_of(row: ResultRow) -> str:
    """Return what is wrong with a row's records, the first that is; "" of none."""
    broken = [record for record in row.records if record.status != "success"]
    return "" if not broken else clean(f"{broken[0].status}: {broken[0].reason}")


def row_name(row: ResultRow) -> str:
    """Return a row's label; a control says that it is one."""
    return clean(f"{row.label} (control)" if row.first.is_control else row.label)


def build_table(name: str, title: str, rows: Sequence[RowCells]) -> Table:
    """Build a table from (shown, exact) pairs of rows; the family among the exact values names a
    row's block.
    """
    columns = tuple(dict.fromkeys(column for shown, _ in rows for column in shown))
    texts = tuple(tuple(shown.get(column, DASH) for column in columns) for shown, _ in rows)
    blocks = tuple(str(exact.get(FAMILY.name, "")) for _, exact in rows)
    return Table(name, title, columns, texts, blocks, tuple(exact for _, exact in rows))


class RowBuilder:
    """One row of a table in the making: what is shown, and the exact values beside it."""

    def __init__(self, row: ResultRow) -> None:
        self._row = row
        self.shown: dict[Header, str] = {ROW.name: row_name(row)}
        self.exact: dict[Header, object] = {ROW.name: row.label, FAMILY.name: row_block(row)}

    @property
    def cells(self) -> RowCells:
        """What is shown, and the exact values."""
        return self.shown, self.exact

    def add(
        self, quantity: Quantity, stored: float | None, *, task: str = "", mark: str = ""
    ) -> None:
        """Add a number as a record holds it, `mark` behind it; a dash where it was not measured."""
        column, value = quantity.name.of(task), quantity.scaled(stored)
        self.shown[column], self.exact[column] = quantity.text(value) + mark, value

    def add_measured(self, quantity: Quantity) -> None:
        """Add the mean of a measurement over the row's seeds."""
        self.add(quantity, mean_measurement(self._row, quantity.key))

    def add_words(self, quantity: Quantity, text: str) -> None:
        """Add a text."""
        self.shown[quantity.name] = self.exact[quantity.name] = text

    def add_ratio(self, quantity: Quantity, found: Interval, verdict: str) -> None:
        """Add a speed ratio, which counts only beside a verdict on quality: none without one, in
        brackets where quality is lost.
        """
        shown = quantity.with_interval(found) if verdict != DASH else DASH
        self.shown[quantity.name] = f"({shown})" if verdict == "no" and shown != DASH else shown
        self.exact |= quantity.exact(found)


def without_empty_columns(rows: Sequence[RowCells]) -> list[RowCells]:
    """Leave out the columns that no row has a value for."""
    filled = {column for shown, _ in rows for column, text in shown.items() if text != DASH}
    empty = {column for shown, _ in rows for column in shown} - filled

    def kept(line: Mapping[Header, Any]) -> dict[Header, Any]:
        return {column: value for column, value in line.items() if column not in empty}

    return [(kept(shown), kept(exact)) for shown, exact in rows]


def mean_measurement(row: ResultRow | None, name: str) -> float | None:
    """Return a measurement's mean over a row's seeds, None where it was not made."""
    found = [
        one.value
        for record in (row.succeeded if row else ())
        if (one := record.measured(name)) is not None
    ]
    return fmean(found) if found else None
