"""Tables written down: Markdown, CSV, LaTeX and JSON; the same tables give the same bytes anywhere.
No torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.analysis.comparison import Group
from harness.escape import clean_all, latex_comment, latex_text, markdown_cell, markdown_text
from harness.files.writing import nonfinite_as_null, write_atomically
from harness.reporting.notes import mixed_conditions
from harness.reporting.table import BestCell, Table


@dataclass(frozen=True)
class ReportSection:
    """Everything that is said of one group of records."""

    group: Group
    heading: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def as_markdown(made: Sequence[ReportSection]) -> str:
    """Return tables as one Markdown page."""
    from tabulate import tabulate

    parts = (
        [_markdown_list(lines)] if (lines := mixed_conditions([one.group for one in made])) else []
    )
    for one in made:
        parts.append(f"## {markdown_text(one.heading)}\n")
        for table in one.tables:
            alignment = ["left" if column.quantity.words else "right" for column in table.columns]
            rows = [
                [
                    f"**{markdown_cell(cell)}**"
                    if isinstance(cell, BestCell)
                    else markdown_cell(cell)
                    for cell in row
                ]
                for row in table.rows
            ]
            headers = [*map(markdown_cell, table.columns)]
            text = tabulate(
                rows, headers=headers, tablefmt="pipe", colalign=alignment, disable_numparse=True
            )
            parts.append(f"**{markdown_text(table.title)}**\n\n{text}\n")
        parts.append(_markdown_list(one.notes))
    return "\n".join(parts)


def _markdown_list(lines: Sequence[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {markdown_text(line)}" for line in lines) + "\n"


def as_latex(made: Sequence[ReportSection]) -> str:
    """Return tables as LaTeX (booktabs): a rule between families, bold where the others are
    bold.
    """
    parts = ["% \\usepackage{booktabs}; made by harness report\n"]
    for one in made:
        for table in one.tables:
            layout = "".join("l" if column.quantity.words else "r" for column in table.columns)
            lines = [
                rf"\begin{{tabular}}{{{layout}}}",
                r"\toprule",
                " & ".join(map(latex_text, table.columns)) + r" \\",
                r"\midrule",
            ]
            for at, row in enumerate(table.rows):
                if at and table.blocks[at] != table.blocks[at - 1]:
                    lines.append(r"\midrule")
                lines.append(
                    " & ".join(
                        rf"\textbf{{{latex_text(cell)}}}"
                        if isinstance(cell, BestCell)
                        else latex_text(cell)
                        for cell in row
                    )
                    + r" \\"
                )
            lines += [r"\bottomrule", r"\end{tabular}"]
            parts.append(
                f"% {latex_comment(f'{one.heading}: {table.title}')}\n" + "\n".join(lines) + "\n"
            )
    return "\n".join(parts)


def as_json(made: Sequence[ReportSection]) -> str:
    """Return tables as JSON: what is shown, the exact values behind it, conditions and notes."""
    told = [
        {
            "heading": one.heading,
            "shared": dict(one.group.shared),
            "notes": one.notes,
            "tables": [
                {
                    "name": table.name,
                    "title": table.title,
                    "columns": table.columns,
                    "rows": table.rows,
                    "blocks": table.blocks,
                    "best": [[isinstance(cell, BestCell) for cell in row] for row in table.rows],
                    "exact": table.exact,
                }
                for table in one.tables
            ],
        }
        for one in made
    ]
    whole = nonfinite_as_null(
        {"schema": 1, "mixed": mixed_conditions([one.group for one in made]), "groups": told}
    )
    return (
        json.dumps(clean_all(whole), indent=1, ensure_ascii=False, default=str, allow_nan=False)
        + "\n"
    )


FORMS = ("md", "csv", "tex", "json")


def write_sections(
    made: Sequence[ReportSection], folder: Path, *, forms: Sequence[str] = FORMS
) -> list[Path]:
    """Write tables that were built, in the forms asked for; return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for form, name, make in (
        ("md", "table.md", as_markdown),
        ("tex", "tables.tex", as_latex),
        ("json", "tables.json", as_json),
    ):
        if form in forms:
            written.append(folder / name)
            write_atomically(written[-1], make(made))
    for number, one in enumerate(made if "csv" in forms else (), 1):
        for table in one.tables:
            path = folder / (
                f"{table.name}.csv" if len(made) == 1 else f"{table.name}-{number}.csv"
            )
            table.to_csv(path)
            written.append(path)
    return written
