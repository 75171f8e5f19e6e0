"""Tables as Markdown, CSV, LaTeX and JSON. Equal tables give equal bytes anywhere. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.analysis.comparison import Group
from harness.escape import clean_all, latex_comment, latex_text, markdown_cell, markdown_text
from harness.files.writing import nonfinite_as_null, write_atomically
from harness.reporting.notes import mixed_conditions
from harness.reporting.table import BestCell, Table


@dataclass(frozen=True)
class ReportSection:
    """The tables of one group of records, with their heading and the notes below them."""

    group: Group
    heading: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def as_markdown(sections: Sequence[ReportSection]) -> str:
    """Return sections as one Markdown page."""
    mixed = mixed_conditions([section.group for section in sections])
    parts = [_markdown_list(mixed)] if mixed else []
    for section in sections:
        parts.append(f"## {markdown_text(section.heading)}\n")
        for table in section.tables:
            parts.append(f"**{markdown_text(table.title)}**\n\n{_markdown_table(table)}\n")
        parts.append(_markdown_list(section.notes))
    return "\n".join(parts)


def _markdown_table(table: Table) -> str:
    from tabulate import tabulate

    def text(cell: str) -> str:
        return f"**{markdown_cell(cell)}**" if isinstance(cell, BestCell) else markdown_cell(cell)

    return tabulate(
        [list(map(text, row)) for row in table.rows],
        headers=list(map(markdown_cell, table.columns)),
        tablefmt="pipe",
        colalign=["left" if column.quantity.words else "right" for column in table.columns],
        disable_numparse=True,
    )


def _markdown_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(line)}" for line in lines) + "\n"


def as_latex(sections: Sequence[ReportSection]) -> str:
    """Return tables as LaTeX with booktabs: a rule between families, the best cells in bold."""
    parts = ["% \\usepackage{booktabs}; made by harness report\n"]
    for section in sections:
        for table in section.tables:
            comment = latex_comment(f"{section.heading}: {table.title}")
            parts.append(f"% {comment}\n{_latex_table(table)}\n")
    return "\n".join(parts)


def _latex_table(table: Table) -> str:
    def text(cell: str) -> str:
        return rf"\textbf{{{latex_text(cell)}}}" if isinstance(cell, BestCell) else latex_text(cell)

    layout = "".join("l" if column.quantity.words else "r" for column in table.columns)
    headers = " & ".join(map(latex_text, table.columns))
    lines = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", headers + r" \\", r"\midrule"]
    for number, row in enumerate(table.rows):
        if number and table.blocks[number] != table.blocks[number - 1]:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(text, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def as_json(sections: Sequence[ReportSection]) -> str:
    """Return tables as JSON: what is shown, the exact values behind it, conditions and notes."""
    groups = [
        {
            "heading": section.heading,
            "shared": dict(section.group.shared),
            "notes": section.notes,
            "tables": [{**table_data(table), "exact": table.exact} for table in section.tables],
        }
        for section in sections
    ]
    mixed = mixed_conditions([section.group for section in sections])
    data = clean_all(nonfinite_as_null({"schema": 1, "mixed": mixed, "groups": groups}))
    return json.dumps(data, indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n"


def table_data(table: Table) -> dict[str, Any]:
    """Return what a table shows as JSON-like data; `best` tells which cells are in bold."""
    return {
        "name": table.name,
        "title": table.title,
        "columns": table.columns,
        "rows": table.rows,
        "blocks": table.blocks,
        "best": [[isinstance(cell, BestCell) for cell in row] for row in table.rows],
    }


FORMS = ("md", "csv", "tex", "json")


def write_sections(
    sections: Sequence[ReportSection], folder: Path, *, forms: Sequence[str] = FORMS
) -> list[Path]:
    """Write sections in the given forms, and return the paths that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for form, name, text_of in (
        ("md", "table.md", as_markdown),
        ("tex", "tables.tex", as_latex),
        ("json", "tables.json", as_json),
    ):
        if form in forms:
            written.append(folder / name)
            write_atomically(written[-1], text_of(sections))
    for number, section in enumerate(sections if "csv" in forms else (), 1):
        suffix = "" if len(sections) == 1 else f"-{number}"
        for table in section.tables:
            written.append(folder / f"{table.name}{suffix}.csv")
            table.to_csv(written[-1])
    return written
