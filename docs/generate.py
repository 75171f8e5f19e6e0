"""Writes what the docs take from code: the renames in compatibility.md, record.schema.json.

Type: python docs/generate.py [--check]. A test compares both files with what this writes.
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
    "argument": "argument in Python",
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


def main(arguments: list[str]) -> int:
    """Write both files; with `--check` write nothing, and name those that are not current."""
    texts = {PAGE: page(PAGE.read_text(encoding="utf-8")), SCHEMA_FILE: schema()}
    stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        if arguments == ["--check"]:
            print(f"{path.relative_to(ROOT)} is not current: type python docs/generate.py")
        else:
            path.write_text(texts[path], encoding="utf-8")
    return int(bool(stale) and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
