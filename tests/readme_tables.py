"""Copies the generated tables into README.md and docs/, between `<!-- table: FILE -->` or `<!-- figures: PROGRAM -->` and `<!-- end -->`.

`<!-- figures: PROGRAM WORD -->` takes those figures whose name holds the word.

    python tests/readme_tables.py

A test holds the pages to what this writes.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "statistics.md", ROOT / "docs" / "ci.md")


def filled(page: str) -> str:
    """Return a page's text with every table taken from its file (headings left out) and every figure from its program's JSON."""

    def table(match: re.Match[str]) -> str:
        lines = (ROOT / match[1]).read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("#") and not line.startswith("Generated")).strip()
        return f"<!-- table: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    def figures(match: re.Match[str]) -> str:
        found = json.loads((ROOT / "results" / "benchmarks" / f"{match[1]}.json").read_text(encoding="utf-8"))
        lines = ["| figure | value | target |", "|:--|--:|--:|"]
        every = found if isinstance(found, list) else [found]
        for one in (one for one in every if not match[2] or match[2].strip() in one["name"]):
            # A name that goes on from another's is a rival of that figure: the target is not its own.
            ours = not any(one["name"].startswith(f"{other['name']}:") for other in every)
            aim = f"{'>=' if one['better'] == 'higher' else '<='} {one['target']:g}" if one["target"] is not None else ""
            target = aim if ours else ""
            lines.append(f"| `{one['name']}` | {one['value']:.4g} {one['unit']} | {target} |")
            if one["peer"] and ours:
                lines.append(f"| beside it | {one['peer']} | |")
        return f"<!-- figures: {match[1]}{match[2] or ''} -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->"

    page = re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", table, page, flags=re.S)
    return re.sub(r"<!-- figures: (\S+)( \S+)? -->.*?<!-- end -->", figures, page, flags=re.S)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
