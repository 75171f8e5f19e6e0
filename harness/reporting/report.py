"""Every table of a set of records. Equal records give equal bytes anywhere. No torch.

Records are grouped before anything is compared: the rows of one table share teacher, student shape,
budget, device, dtype, scoring path, machine and task versions. A figure that was not measured is a
dash, and a note says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.analysis.comparison import Group, group_records
from harness.records.record import RunRecord
from harness.reporting.claims import chains_table, claims_table
from harness.reporting.costs import memory_table, scenarios_table, speed_table, training_cost_table
from harness.reporting.distances import prompt_length_table, text_distance_table
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
    """Return all tables of a group of records.

    `price` is money per device-hour. Every row is compared with each row named in `references`.
    """
    tables = (
        quality_table(group),
        controls_table(group),
        chains_table(group),
        speed_table(group),
        scenarios_table(group),
        memory_table(group),
        training_cost_table(group, price),
        claims_table(group),
        text_distance_table(group),
        prompt_length_table(group),
        diagnostics_table(group),
        *(against_table(group, label) for label in references),
    )
    return [table for table in tables if table is not None]


@dataclass(frozen=True)
class ReportOptions:
    """What a reader may choose in a report."""

    price: float | None = None  # money per device-hour
    references: tuple[str, ...] = ()  # rows that every row is compared with
    sort: str | None = None  # a column, best first; with a leading "-" worst first


DEFAULT_OPTIONS = ReportOptions()


def build_sections(
    records: Sequence[RunRecord], options: ReportOptions = DEFAULT_OPTIONS
) -> list[ReportSection]:
    """Build the tables and notes of records, one section for each group of comparable records."""
    sections = []
    for group in group_records(records):
        tables = group_tables(group, options.price, options.references)
        if options.sort:
            tables = [table.ordered_by(options.sort) for table in tables]
        heading, notes = group_heading(group), group_notes(group)
        sections.append(ReportSection(group, heading, tuple(tables), tuple(notes)))
    return sections


def sortable_columns(sections: Sequence[ReportSection]) -> list[str]:
    """Return the columns that rows can be sorted by: those of tables with blocks."""
    tables = [table for section in sections for table in section.tables if any(table.blocks)]
    return list(dict.fromkeys(column for table in tables for column in table.columns))


def markdown(records: Sequence[RunRecord], options: ReportOptions = DEFAULT_OPTIONS) -> str:
    """Return every table of records as one Markdown page."""
    return as_markdown(build_sections(records, options))


def write_tables(
    records: Sequence[RunRecord],
    folder: Path,
    options: ReportOptions = DEFAULT_OPTIONS,
    *,
    forms: Sequence[str] = FORMS,
) -> list[Path]:
    """Write `table.md`, `tables.tex`, `tables.json` and a CSV for each table; return the paths."""
    return write_sections(build_sections(records, options), folder, forms=forms)
