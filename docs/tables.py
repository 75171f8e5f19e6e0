"""Copies the generated tables into README.md and docs/.

They stand between `<!-- table: FILE -->` or `<!-- figures: PROGRAM -->` and `<!-- end -->`.

`<!-- figures: PROGRAM WORD -->` takes those figures whose name holds the word; `<!-- methods:
FAMILY FAMILY -->` lists the methods of the registry that are of these families, by what they
declare; `<!-- summary: STUDY TASK -->` is a study's rows in seven columns.

    python docs/tables.py

A test holds the pages to what this writes.
"""

import csv
import json
import re
import textwrap
from pathlib import Path

from harness.contract import Method
from harness.models.shape import Shape
from harness.registry import Registry
from methods import METHODS

ROOT = Path(__file__).parents[1]
MARGIN = " " * 15  # of a line of modules in the tree
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("statistics", "ci", "decisions", "methods", "measured", "tree")
    ),
)


def filled(page: str) -> str:
    """Return a page with each table from its file (without headings) and each figure from JSON."""

    def table(match: re.Match[str]) -> str:
        lines = (ROOT / match[1]).read_text(encoding="utf-8").splitlines()
        text = "\n".join(
            line for line in lines if not line.startswith("#") and not line.startswith("Generated")
        ).strip()
        return f"<!-- table: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    def figures(match: re.Match[str]) -> str:
        document = json.loads(
            (ROOT / "results" / "benchmarks" / f"{match[1]}.json").read_text(encoding="utf-8")
        )
        lines = ["| figure | value | target |", "|:--|--:|--:|"]
        entries = document if isinstance(document, list) else [document]
        for entry in (
            entry for entry in entries if not match[2] or match[2].strip() in entry["name"]
        ):
            # A name that goes on from another's is a rival of that figure: the target is not its
            # own.
            ours = not any(entry["name"].startswith(f"{other['name']}:") for other in entries)
            aim = (
                f"{'>=' if entry['better'] == 'higher' else '<='} {entry['target']:g}"
                if entry["target"] is not None
                else ""
            )
            target = aim if ours else ""
            lines.append(f"| `{entry['name']}` | {entry['value']:.4g} {entry['unit']} | {target} |")
            if entry["peer"] and ours:
                lines.append(f"| beside it | {entry['peer']} | |")
        return (
            f"<!-- figures: {match[1]}{match[2] or ''} -->\n\n"
            + "\n".join(lines)
            + "\n\n<!-- end -->"
        )

    page = re.sub(r"(?<=# The tree\n).*?```\n.*?\n```", tree, page, flags=re.S)
    page = re.sub(r"<!-- methods: ([\w -]+) -->.*?<!-- end -->", methods, page, flags=re.S)
    page = re.sub(r"<!-- summary: (\S+) (\S+) -->.*?<!-- end -->", summary, page, flags=re.S)
    page = re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", table, page, flags=re.S)
    return re.sub(r"<!-- figures: (\S+)( \S+)? -->.*?<!-- end -->", figures, page, flags=re.S)


def summary(match: re.Match[str]) -> str:
    """Return what a study's CSV files say of each row: retention, speed, bytes, training.

    Rows stand in the order of the quality table; a dash was not measured.
    """
    tables = {}
    for name in ("quality", "speed", "memory", "training"):
        path = ROOT / match[1] / "tables" / f"{name}.csv"
        with path.open(encoding="utf-8", newline="") as lines:
            tables[name] = {line["row"]: line for line in csv.DictReader(lines)}

    def figure(name: str, row: str, column: str, form: str, *, ends: bool = False) -> str:
        cells = tables[name].get(row, {})
        values = [cells.get(f"{column}{end}", "") for end in ("", " low", " high")]
        if not all(values[: 3 if ends else 1]):
            return "-"
        texts = [form.format(float(value)) for value in values if value]
        return f"{texts[0]} [{texts[1]}, {texts[2]}]" if ends else texts[0]

    lines = [
        "| row | seeds | retention % | keeps 95 % | decode x | disk x | train s |",
        "|:--|--:|--:|:--|--:|--:|--:|",
    ]
    for row, cells in tables["quality"].items():
        is_control = " (control)" if cells["control"] == "True" else ""
        percent = {f"{match[2]} retention{end}" for end in ("", " low", " high")}
        for column in percent & {name for name, value in cells.items() if value}:
            cells[column] = str(100 * float(cells[column]))
        columns = (
            cells["seeds"],
            figure("quality", row, f"{match[2]} retention", "{:.1f}", ends=True),
            tables["speed"].get(row, {}).get("keeps 95 %", "") or "-",
            figure("speed", row, "decode x", "{:.2f}", ends=True),
            figure("memory", row, "disk x", "{:.2f}"),
            figure("training", row, "train s", "{:.1f}"),
        )
        lines.append(f"| {row}{is_control} | {' | '.join(columns)} |")
    return f"<!-- summary: {match[1]} {match[2]} -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->"


def tree(match: re.Match[str]) -> str:
    """Return the tree with today's modules under each folder; its words stay."""
    lines: list[str] = []
    top = ""
    for line in match[0].split("\n"):
        if line.startswith(MARGIN):  # modules of the folder above, as they were
            continue
        lines.append(line)
        if folder := re.match(r"( *)(\w+/)", line):
            top = top if folder[1] else folder[2]
            lines += modules_in(ROOT / (top + folder[2] if folder[1] else top))
    return "\n".join(lines)


def modules_in(folder: Path) -> list[str]:
    """Return a package's modules as lines of the tree, or none.

    None: the folder is no package, or has a file for each row.
    """
    if not (folder / "__init__.py").exists() or folder.name in ("methods", "suites"):
        return []
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    return textwrap.wrap(
        ", ".join(names), width=132, initial_indent=MARGIN, subsequent_indent=MARGIN
    )


def methods(match: re.Match[str]) -> str:
    """Return the table of some families' methods in the registry's order, with second names."""
    registry = Registry("method", METHODS)
    lines = ["| row | what it does | teacher, student | its controls |", "|:--|:--|:--|:--|"]
    for name in METHODS:
        method = registry.build(name, {})
        if method.family in match[1].split():
            first = registry.canonical(name)
            does = (
                registry.summary(name).rstrip(".")
                if first == name
                else f"another name of `{first}`"
            )
            controls = ", ".join(f"`{control}`" for control in method.controls if first == name)
            lines.append(
                f"| `{name}` | {does} | {traits_in_words(method) if first == name else ''} | "
                f"{controls} |"
            )
    return f"<!-- methods: {match[1]} -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->"


def traits_in_words(method: Method) -> str:
    """Say what a method asks of the teacher and what it leaves of the model, from its traits."""
    before = Shape.of_folder(ROOT / "harness" / "embedded" / "tiny")
    after = method.resulting_shape(before)
    reads = method.trains and method.needs_same_vocabulary
    holds_by_words = {
        "writes first, kept": method.writes_traces,
        "each read once, kept": method.needs_several_teachers,
        "beside the student": method.reads_teacher_live,
        "read once, kept": reads
        and not method.needs_several_teachers
        and not method.reads_teacher_live,
        f"{method.bits_per_weight} bits a weight": method.bits_per_weight is not None,
        "floats: accuracy only": method.simulated,
        cache_in_words(before, after): after.cache is not None,
        "zeros: no byte saved": method.leaves_zeros,
        "fewer blocks": after.layers < before.layers,
        "narrower blocks": after.intermediate < before.intermediate,
        "factors": not method.keeps_architecture,
        "one row a seed": method.draws_random_numbers,
        "reads text": method.calibrates,
    }
    return ", ".join(word for word, holds in holds_by_words.items() if holds)


def cache_in_words(before: Shape, after: Shape) -> str:
    """Say what a token's keys and values take, beside those of 16-bit floats."""
    full, stored = (shape.kv_bytes(batch=1, tokens=1, item=2) for shape in (before, after))
    return f"{stored / full:.2f} of a bf16 cache's bytes (`tiny`), weights as they are"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
