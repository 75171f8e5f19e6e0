"""The type of a quantity: how its column is headed, and its numbers scaled, rounded and written.

No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.statistics.intervals import Interval

DASH = "-"
MIB, GIB = 2**20, 2**30
LOW_END, HIGH_END = "low", "high"  # how columns of an interval's ends are headed


class Header(str):
    """The text of a column's header, which knows its quantity."""

    quantity: "Quantity"

    def __new__(cls, text: str, quantity: "Quantity") -> "Header":  # noqa: D102
        header = super().__new__(cls, text)
        header.quantity = quantity
        return header

    def __getnewargs__(self) -> tuple[str, "Quantity"]:  # type: ignore[override]  # a copy knows it too
        return str(self), self.quantity

    def of(self, task: str) -> "Header":
        """Return the header of this column for one of several tasks; "" leaves it as it is."""
        parts = (self, task) if self.quantity.task_last else (task, self)
        return Header(" ".join(part for part in parts if part), self.quantity)


@dataclass(frozen=True)
class Quantity:
    """One thing that a column can hold."""

    key: str  # its name in code; of what a record holds, the record's own name for it
    header: str
    help: str  # what it means, to a reader of tables
    unit: str = ""  # of a cell's number; "" of words, counts and figures in a task's own unit
    stored: str = ""  # unit of the number that a record holds, where it is a record's
    scale: float = 1.0  # a column's number = a record's number x scale; CSV files hold it
    format: str | Callable[[float], str] = ""  # specification of a number, or what picks it by size
    share: bool = False  # a column's number is a share of 1; a cell shows it times 100
    prefix: str = ""  # written before a number
    better: Literal["higher", "lower", "none"] = "none"  # none: a sort puts the largest first
    words: bool = False  # a cell is text: left-aligned, ordered by letters
    leads: bool = False  # the cells of the best rows stand in bold
    task_last: bool = False  # of several tasks, the task's name stands behind the header
    term: str | None = None  # the glossary's word for it: None the header, "" no line there
    axis: str = ""  # what a picture's axis is called

    @property
    def name(self) -> Header:
        """The header as a table's column."""
        return Header(self.header, self)

    @property
    def low(self) -> Header:
        """The column of its interval's lower end."""
        return Header(f"{self.header} {LOW_END}", self)

    @property
    def high(self) -> Header:
        """The column of its interval's upper end."""
        return Header(f"{self.header} {HIGH_END}", self)

    def part(self, which: str) -> Header:
        """Return the column of one part of it: a choice's letter, an error."""
        return Header(f"{self.header} {which}", self)

    def scaled(self, stored: float | None) -> float | None:
        """Return a record's number in the unit of the column."""
        return stored if stored is None or self.scale == 1 else stored * self.scale

    def text(self, value: float | None) -> str:
        """Write a column's number as a cell; a dash where there is none."""
        if value is None:
            return DASH
        unit = " %" if self.unit == "%" and not self.words else ""
        return f"{self.prefix}{self.digits(value)}{unit}"

    def with_interval(self, interval: Interval) -> str:
        """Write a number with its interval, where it has one: 97.1 % [95.0, 99.2]."""
        text = self.text(interval.value)
        if interval.value is None or interval.low is None or interval.high is None:
            return text
        low, high = (self.digits(end, like=interval.value) for end in (interval.low, interval.high))
        return f"{text} [{low}, {high}]"

    def exact(self, interval: Interval) -> dict[Header, object]:
        """Return a number and its interval's ends unrounded, by column."""
        return {self.name: interval.value, self.low: interval.low, self.high: interval.high}

    def digits(self, value: float, *, like: float | None = None) -> str:
        """Write a column's number without unit, in the form that `like` has where size decides."""
        form = (
            self.format
            if isinstance(self.format, str)
            else self.format(value if like is None else like)
        )
        return format(100 * value if self.share else value, form)


def mebibytes_format(value: float) -> str:
    """Return the format of MiB; less than a hundredth has two digits, since 0.00 reads as none."""
    return ".2g" if 0 < value < 0.005 else ",.2f"


def ratio_format(value: float) -> str:
    """Return the format of ratios; very large and very small ones are powers of ten."""
    return ".3f" if 0.01 <= value < 1_000 else ".2g"
