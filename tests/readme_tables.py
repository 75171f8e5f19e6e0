"""Copies the generated tables into README.md, between `<!-- table: FILE -->` and `<!-- end -->`.

    python tests/readme_tables.py

A test holds README to what this writes.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def filled(readme: str) -> str:
    """Return README's text with every table taken from its file, headings of that file left out."""

    def table(match: re.Match[str]) -> str:
        lines = (ROOT / match[1]).read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("#") and not line.startswith("Generated")).strip()
        return f"<!-- table: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", table, readme, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
