"""Every table of a set of records: the same records give the same bytes anywhere. No torch.

Records are grouped before anything is compared: rows of one table share teacher, student shape,
budget, device, dtype, scoring path, machine and task versions. What was not measured is a dash, and
a note says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.analysis.comparison import Group, group_records
from harness.records.record import RunRecord
from harness.reporting.claims import chains_table, claims_table
from harness.reporting.costs import memory_table, scenarios_table, speed_table, training_cost_table
from harness.reporting.formats import (
    FORMS,
    ReportSection,
    as_json,
    as_latex,
    as_markdown,
    write_sections,
)
from harness.reporting.measured import measurement_tables
from harness.reporting.notes import group_heading, group_notes, mixed_conditions
from harness.reporting.quality import (
    against_table,
    controls_table,
    diagnostics_table,
    quality_table,
)
from harness.reporting.table import Table

__all__ = [
    "DEFAULT_OPTIONS",
    "FORMS",
    "ReportOptions",
    "ReportSection",
    "as_json",
    "as_latex",
    "as_markdown",
    "build_sections",
    "group_heading",
    "group_notes",
    "group_tables",
    "markdown",
    "measurement_tables",
    "mixed_conditions",
    "sortable_columns",
    "write_sections",
    "write_tables",
]


def group_tables(
    group: Group, price: float | None = None, references: Sequence[str] = ()
) -> list[Table]:
    """All tables of a group of records; `price` is money per device-hour, `references` are rows to
    stand every row against.
    """
    every = (
        quality_table(group),
        controls_table(group),
        chains_table(group),
        speed_table(group),
        scenarios_table(group),
        memory_table(group),
        training_cost_table(group, price),
        claims_table(group),
        diagnostics_table(group),
        *(against_table(group, label) for label in references),
    )
    return [table for table in every if table is not None]


@dataclass(frozen=True)
class ReportOptions:
    """What a reader of tables may ask for."""

    price: float | None = None  # money per device-hour
    references: tuple[str, ...] = ()  # rows to stand every row against
    sort: str | None = None  # a column; best first


DEFAULT_OPTIONS = ReportOptions()


def build_sections(
    records: Sequence[RunRecord], asked: ReportOptions = DEFAULT_OPTIONS
) -> list[ReportSection]:
    """Build every table of these records once, as a reader asked for them; the forms below only
    write them down.
    """
    built = []
    for found in group_records(records):
        every = group_tables(found, asked.price, asked.references)
        every = [table.ordered_by(asked.sort) for table in every] if asked.sort else every
        built.append(
            ReportSection(found, group_heading(found), tuple(every), tuple(group_notes(found)))
        )
    return built


def sortable_columns(made: Sequence[ReportSection]) -> list[str]:
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


def markdown(records: Sequence[RunRecord], asked: ReportOptions = DEFAULT_OPTIONS) -> str:
    """Return every table of these records as one Markdown page."""
    return as_markdown(build_sections(records, asked))


def write_tables(
    records: Sequence[RunRecord],
    folder: Path,
    asked: ReportOptions = DEFAULT_OPTIONS,
    *,
    forms: Sequence[str] = FORMS,
) -> list[Path]:
    """Write `table.md`, `tables.tex`, `tables.json` and one CSV per table; return what was
    written.
    """
    return write_sections(build_sections(records, asked), folder, forms=forms)
