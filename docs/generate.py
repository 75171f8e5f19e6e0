"""Writes what the docs take from the code: the table of renames in compatibility.md, and
record.schema.json.

Type: python docs/generate.py. A test compares both files with what this writes.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from harness.records.json_schema import record_schema  # noqa: E402
from harness.renames.notice import Rename, all_renames  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
SCHEMA_FILE = ROOT / "docs" / "record.schema.json"
BEGIN, END = "<!-- made by docs/generate.py: renames -->", "<!-- end -->"
KINDS = {
    "setting": "setting of a method",
    "trait": "trait of a method",
    "option": "option of `harness run`",
    "module": "module or name to import",
    "column": "column",
}


def line_of(rename: Rename) -> str:
    """Return a rename as a line of the table."""
    sense = "; true is false" if rename.opposite else ""
    having = ", ".join(rename.methods)
    return (
        f"| {KINDS[rename.kind]} | `{rename.old}` | `{rename.new}`{sense} | {rename.version} and "
        f"{rename.date} | {having} |"
    )


def table() -> str:
    """Return the table of renames in Markdown."""
    head = [
        "| what | old name | new name | works until | of these methods |",
        "|:--|:--|:--|:--|:--|",
    ]
    return "\n".join((*head, *map(line_of, all_renames())))


def page(text: str) -> str:
    """Return the page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def schema() -> str:
    """Return the schema's file."""
    return json.dumps(record_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA_FILE.write_text(schema(), encoding="utf-8")
