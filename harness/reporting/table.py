"""One table: headers, rows of text, the exact numbers behind them, and the best cells. No torch."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.analysis.comparison import ResultRow, row_block
from harness.analysis.measured_rows import mean_measurement as mean_measurement
from harness.escape import clean, csv_cell
from harness.files.writing import replace_file
from harness.records.columns import DASH, FAMILY, ROW, Header, Quantity, quantity_of
from harness.statistics.intervals import Interval

if TYPE_CHECKING:
    import pandas

_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


class RowCells(NamedTuple):
    """One row by column: the texts that are shown, and the exact values behind them."""

    shown: dict[Header, str]
    exact: dict[Header, object]


class BestCell(str):
    """The text of a cell of the best row, or of one that is not significantly worse: bold."""


@dataclass(frozen=True)
class Table:
    """One table: headers, rows of text (`BestCell` where bold), blocks, and unrounded numbers."""

    name: str
    title: str
    columns: tuple[Header, ...]
    rows: tuple[tuple[str, ...], ...]
    # of each row: teacher, its family, or control; "" in tables that are not ordered by them
    blocks: tuple[str, ...]
    exact: tuple[dict[Header, object], ...]

    @property
    def frame(self) -> "pandas.DataFrame":
        """The unrounded numbers as a frame."""
        import pandas

        return pandas.DataFrame(list(self.exact))

    def to_csv(self, path: Path) -> None:
        """Write the unrounded numbers as CSV.

        No text in it is read as a formula by a spreadsheet or as a command by a terminal.
        """
        frame = self.frame
        frame = frame.map(csv_cell).rename(columns=csv_cell)

        def write(fresh: Path) -> None:
            frame.to_csv(fresh, index=False, float_format="%.6g", lineterminator="\n")

        replace_file(path, write)

    def ordered_by(self, column: str) -> "Table":
        """Return the table with each block's rows sorted by a column, best first.

        `-column` sorts worst first. Blocks stay together, in the order of their first rows; the
        teacher stays first and the controls last. A table without that column, or in which a row
        has several lines, is returned unchanged.
        """
        name, worst_first = column.removeprefix("-"), column.startswith("-")
        has_one_line_a_row = len({row[0] for row in self.rows}) == len(self.rows)
        if name not in self.columns or not any(self.blocks) or not has_one_line_a_row:
            return self
        position = self.columns.index(name)
        sign = (1 if less_is_better(self.columns[position]) else -1) * (-1 if worst_first else 1)

        def line_key(line: int) -> tuple[bool, float]:
            number = first_number(self.rows[line][position])
            return number is None, 0.0 if number is None else sign * number

        first_keys: dict[str, tuple[bool, float]] = {}
        for line, block in enumerate(self.blocks):
            first_keys[block] = min(first_keys.get(block, line_key(line)), line_key(line))
        ends = {"teacher": -1, "control": 1}

        def place(line: int) -> tuple[int, tuple[bool, float], str, tuple[bool, float], int]:
            block = self.blocks[line]
            return ends.get(block, 0), first_keys[block], block, line_key(line), line

        lines = sorted(range(len(self.rows)), key=place)
        return replace(
            self,
            rows=tuple(self.rows[line] for line in lines),
            blocks=tuple(self.blocks[line] for line in lines),
            exact=tuple(self.exact[line] for line in lines),
        )


def less_is_better(column: str) -> bool:
    """Tell whether smaller numbers of a column are the better ones."""
    quantity = quantity_of(column)
    return quantity is not None and quantity.better == "lower"


def first_number(text: str) -> float | None:
    """Return the first number of a cell, None where there is none."""
    match = _NUMBER.search(text)
    return float(match[0].replace(",", "")) if match else None


def failure_of(row: ResultRow) -> str:
    """Return status and reason of a row's first record without success; "" where all succeeded."""
    failed = [record for record in row.records if record.status != "success"]
    return clean(f"{failed[0].status}: {failed[0].reason}") if failed else ""


def row_name(row: ResultRow) -> str:
    """Return a row's label, marked where the row is a control."""
    return clean(f"{row.label} (control)" if row.first.is_control else row.label)


def build_table(name: str, title: str, rows: Sequence[RowCells]) -> Table:
    """Build a table from rows; the exact value of the column `family` is a row's block."""
    columns = tuple(dict.fromkeys(column for cells in rows for column in cells.shown))
    texts = tuple(tuple(cells.shown.get(column, DASH) for column in columns) for cells in rows)
    blocks = tuple(str(cells.exact.get(FAMILY.name, "")) for cells in rows)
    return Table(name, title, columns, texts, blocks, tuple(cells.exact for cells in rows))


class RowBuilder:
    """Builds one row of a table: what is shown, and the exact values behind it."""

    def __init__(self, row: ResultRow) -> None:
        self._row = row
        self.shown: dict[Header, str] = {ROW.name: row_name(row)}
        self.exact: dict[Header, object] = {ROW.name: row.label, FAMILY.name: row_block(row)}

    @property
    def cells(self) -> RowCells:
        """The finished row."""
        return RowCells(self.shown, self.exact)

    def add(
        self, quantity: Quantity, stored: float | None, *, task: str = "", mark: str = ""
    ) -> None:
        """Add a number in the unit of the records, a dash where it is None; `mark` follows it."""
        column, value = quantity.name.of(task), quantity.scaled(stored)
        self.shown[column], self.exact[column] = quantity.text(value) + mark, value

    def add_measured(self, quantity: Quantity) -> None:
        """Add the mean of a measurement over the row's seeds."""
        self.add(quantity, mean_measurement(self._row, quantity.key))

    def add_words(self, quantity: Quantity, text: str) -> None:
        """Add a text."""
        self.shown[quantity.name] = self.exact[quantity.name] = text

    def add_interval(self, quantity: Quantity, interval: Interval) -> None:
        """Add a number in the unit of the column, with its interval where it has one."""
        self.shown[quantity.name] = quantity.with_interval(interval)
        self.exact |= quantity.exact(interval)

    def add_ratio(self, quantity: Quantity, ratio: Interval, verdict: str) -> None:
        """Add a speed ratio beside the verdict on quality, without which it says little.

        It is shown as a dash without a verdict, and in brackets where quality is lost ("no").
        """
        text = quantity.with_interval(ratio) if verdict != DASH else DASH
        self.shown[quantity.name] = f"({text})" if verdict == "no" and text != DASH else text
        self.exact |= quantity.exact(ratio)


def without_empty_columns(
    rows: Sequence[RowCells], among: Collection[Quantity] | None = None
) -> list[RowCells]:
    """Leave out the columns in which every row has a dash; of the quantities `among`, if given."""
    filled = {column for cells in rows for column, text in cells.shown.items() if text != DASH}
    empty = {column for cells in rows for column in cells.shown} - filled
    dropped: set[Quantity] = set()  # with the ends of their intervals
    if among is not None:
        dropped = {column.quantity for column in empty} & set(among)
        empty = set()

    def without_empty(values: Mapping[Header, Any]) -> dict[Header, Any]:
        return {
            column: value
            for column, value in values.items()
            if column not in empty and column.quantity not in dropped
        }

    return [RowCells(without_empty(cells.shown), without_empty(cells.exact)) for cells in rows]
