"""Every table of a set of records: the same records give the same bytes anywhere. No torch.

Records are grouped before anything is compared: rows of one table share teacher, student shape,
budget, device, dtype, scoring path, machine and task versions. What was not measured is a dash, and
a note says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.analysis.comparison import Group, group
from harness.records.record import RunRecord
from harness.reporting.claims import chains, claimed
from harness.reporting.costs import memory, scenarios, speed, training
from harness.reporting.formats import FORMS, Made, as_json, as_latex, as_markdown, write_made
from harness.reporting.measured import weighed_tables
from harness.reporting.notes import heading, mixed, notes
from harness.reporting.quality import against, controls, diagnostics, quality
from harness.reporting.table import Table

__all__ = [
    "FORMS",
    "PLAIN",
    "Asked",
    "Made",
    "as_json",
    "as_latex",
    "as_markdown",
    "columns_of",
    "heading",
    "made_of",
    "markdown",
    "mixed",
    "notes",
    "tables",
    "weighed_tables",
    "write_made",
    "write_tables",
]


def tables(found: Group, price: float | None = None, references: Sequence[str] = ()) -> list[Table]:
    """All tables of a group of records; `price` is money per device-hour, `references` are rows to
    stand every row against.
    """
    every = (
        quality(found),
        controls(found),
        chains(found),
        speed(found),
        scenarios(found),
        memory(found),
        training(found, price),
        claimed(found),
        diagnostics(found),
        *(against(found, label) for label in references),
    )
    return [table for table in every if table is not None]


@dataclass(frozen=True)
class Asked:
    """What a reader of tables may ask for."""

    price: float | None = None  # money per device-hour
    references: tuple[str, ...] = ()  # rows to stand every row against
    sort: str | None = None  # a column; best first


PLAIN = Asked()


def made_of(records: Sequence[RunRecord], asked: Asked = PLAIN) -> list[Made]:
    """Build every table of these records once, as a reader asked for them; the forms below only
    write them down.
    """
    built = []
    for found in group(records):
        every = tables(found, asked.price, asked.references)
        every = [table.ordered_by(asked.sort) for table in every] if asked.sort else every
        built.append(Made(found, heading(found), tuple(every), tuple(notes(found))))
    return built


def columns_of(made: Sequence[Made]) -> list[str]:
    """Return the columns that rows can be ordered by: those of tables with blocks."""
    return list(
        dict.fromkeys(
            column
            for one in made
            for table in one.tables
            if any(table.blocks)
            for column in table.columns
        )
    )


def markdown(records: Sequence[RunRecord], asked: Asked = PLAIN) -> str:
    """Return every table of these records as one Markdown page."""
    return as_markdown(made_of(records, asked))


def write_tables(
    records: Sequence[RunRecord],
    folder: Path,
    asked: Asked = PLAIN,
    *,
    forms: Sequence[str] = FORMS,
) -> list[Path]:
    """Write `table.md`, `tables.tex`, `tables.json` and one CSV per table; return what was
    written.
    """
    return write_made(made_of(records, asked), folder, forms=forms)
