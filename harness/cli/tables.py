"""What `harness report` does with records: builds their tables and writes files. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import unknown
from harness.records.record import RunRecord
from harness.renames.columns import current_column
from harness.reporting.formats import ReportSection
from harness.reporting.report import (
    FORMS,
    ReportOptions,
    build_sections,
    sortable_columns,
    write_sections,
)


def sections_of(
    records: Sequence[RunRecord], *, price: float | None, against: Sequence[str], sort: str | None
) -> list[ReportSection]:
    """Build the tables of records.

    Raises `HarnessError` for a row or a column that the records do not have.
    """
    labels = {record.label for record in records}
    if missing := [label for label in against if label not in labels]:
        raise unknown("row", missing[0], labels, hint="(in --against)")
    tasks = {score.task for record in records for score in record.scores}
    sort = sort and current_column(sort, tasks, typed_in="--sort")
    sections = build_sections(
        records, ReportOptions(price=price, references=tuple(against), sort=sort)
    )
    if sort is not None and sort.removeprefix("-") not in (columns := sortable_columns(sections)):
        raise unknown("column", sort.removeprefix("-"), columns, hint="(in --sort)")
    return sections


def tables_folder(place: Path, study: Path | None) -> Path:
    """Return the default folder for the tables of a place.

    It lies in the study, else beside the records.
    """
    if study is not None:
        return study / "tables"
    return place.with_suffix("") if place.is_file() else place / "tables"


def forms_to_write(named: Sequence[str] | None) -> list[str]:
    """Return the forms to write, all of them where none is named.

    Raises `HarnessError` for an unknown form.
    """
    if unknown_forms := [form for form in named or () if form not in FORMS]:
        raise unknown("form", unknown_forms[0], FORMS, hint="(in --forms)")
    return list(named or FORMS)


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Which files are written, and where."""

    folder: Path
    forms: Sequence[str]
    page: bool
    pictures: bool

    def write(
        self, sections: Sequence[ReportSection], records: Sequence[RunRecord], place: Path
    ) -> list[Path]:
        """Write tables, pictures and page, and return their paths.

        Answers of single items are looked for beside `place`.
        """
        written = write_sections(sections, self.folder, forms=self.forms)
        if self.pictures:
            from harness.reporting.plots import write_plots

            written += write_plots(records, self.folder)
        if self.page:
            from harness.records.samples import evidence_of
            from harness.reporting.html_page import write_page

            written += write_page(sections, self.folder, evidence=evidence_of(place, records))
        return written
