"""Which methods work on which architectures: tiny random models of all families x methods.

Each student is made, opened again and run. A cell *works* (its student passed all checks that are
always on: the cut against the bypassed or masked model, the saved file against memory), works
*with* the setting that its refusal gave to paste, is *refused* by the line that a user would read,
or *breaks* with anything else, which is a fault and makes the program fail.

All families; writes results/architectures.json and docs/architectures.md:

    python tests/benchmarks/architectures.py

These families alone, with the earlier outcomes of all others:

    python tests/benchmarks/architectures.py "Gemma 3" Falcon
"""

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from families import FAMILIES, saved_family  # noqa: E402

RESULTS = ROOT / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
TEXT = {"num_calibration_samples": 4, "max_seq_length": 48}
# column -> (method, its settings, the student's recipe or "" for the model itself)
COLUMNS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "depth:0.5": ("untouched", {}, "depth:0.5"),
    "width:0.5": ("untouched", {}, "width:0.5"),
    "prune-depth": ("prune-depth", {**TEXT, "ratio": 0.25}, ""),
    "prune-width": ("prune-width", {**TEXT, "ratio": 0.5, "multiple": 8}, ""),
    "int8": ("int8", {}, ""),
    "int4": ("int4", {"group_size": 32}, ""),
    "int4-calibrated": ("int4-calibrated", {**TEXT, "group_size": 32}, ""),
    "lowrank": ("lowrank", {**TEXT, "keep": 0.6}, ""),
    "prune-wanda": ("prune-wanda", TEXT, ""),
    "sft": ("sft", {"batch_size": 2, "validation_rows": 2, "learning_rate": 1e-3}, ""),
}


def try_cell(base: Any, column: str, folder: Path, more: Mapping[str, Any] | None = None) -> str:
    """Return "works", "with: SETTING", "refused: LINE" or "breaks: WHAT" for one cell.

    SETTING is what the refusal gave to paste.
    """
    import torch

    import methods
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData
    from harness.errors import CellFailed, HarnessError
    from harness.models.blocks import probe_ids
    from harness.models.language_model import open_model
    from harness.planning.spec import parse_set
    from harness.registry import Registry

    name, settings, recipe = COLUMNS[column]
    settings = {**settings, **(more or {})}
    folder.mkdir()
    job = Job(
        teachers=(base,),
        student=recipe or str(base.path),
        student_base=base,
        tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=500, rows=12),
        seed=1,
        workdir=folder,
        cache=folder / "cache",
    )
    try:
        student = Registry("method", methods.METHODS).build(name, settings).compress(job)
        model = open_model(student).model
        with torch.no_grad():
            finite = bool(
                model(input_ids=probe_ids(model), use_cache=False).logits.isfinite().all()
            )
        return "works" if finite else "breaks: the student's logits are not finite"
    except (CellFailed, HarnessError) as problem:
        pasted = re.search(r"--set (\S+|'[^']*')$", str(problem))
        if pasted is None or more is not None:
            return f"refused: {problem}"
        [setting] = shlex.split(pasted[1])
        again = try_cell(
            base, column, folder.with_name(f"{folder.name}-pasted"), parse_set([setting])[name]
        )
        return f"with: --set {pasted[1]}" if again == "works" else f"{again} (after {problem})"
    except Exception as problem:  # noqa: BLE001  what this program is there to find
        return f"breaks: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def outcomes_by_family(families: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each family's outcomes."""
    with tempfile.TemporaryDirectory() as place:
        for number, family in enumerate(families):
            folder = Path(place) / str(number)
            folder.mkdir()
            base = saved_family(family, folder / "model")
            yield (
                family,
                {
                    column: try_cell(base, column, folder / str(at))
                    for at, column in enumerate(COLUMNS)
                },
            )


def page(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page: a table of marks, and every line of refusal once."""
    lines: dict[str, str] = {}

    def mark(cell: str) -> str:
        kind, _, line = cell.partition(": ")
        if kind == "works":
            return "works"
        return f"{kind} [{lines.setdefault(line, str(len(lines) + 1))}]"

    rows = [
        [
            family,
            *(
                mark(results[family].get(column, "not tried"))
                if column in results[family]
                else "not tried"
                for column in COLUMNS
            ),
        ]
        for family in FAMILIES
        if family in results
    ]
    table = [
        f"| {' | '.join(row)} |"
        for row in [["architecture", *COLUMNS], [":--"] * (len(COLUMNS) + 1), *rows]
    ]
    works = sum(cell.startswith("w") for row in rows for cell in row[1:])
    cells = sum(cell != "not tried" for row in rows for cell in row[1:])
    return "\n".join(
        [
            "# Architectures",
            "",
            "Generated by `python tests/benchmarks/architectures.py`; do not edit. Tiny random "
            "models of each family (transformers' own "
            "classes, four blocks), each method run on it, its student opened again and run.",
            "",
            f"{len(rows)} families, {works} of {cells} cells work. *With* is a setting that leaves "
            "weights as "
            "floats, given to paste by the refusal without it; *refused* is a line that says why "
            "and what to type. Each stands below.",
            "",
            *table,
            "",
            "## Lines",
            "",
            *(f"{number}. {line}" for line, number in lines.items()),
            "",
        ]
    )


def main() -> None:
    """Try the families that are named, or all; write the results and the page."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    broken = 0
    for family, outcomes in outcomes_by_family(sys.argv[1:] or list(FAMILIES)):
        results[family] = outcomes
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(
            family,
            {column: text for column, text in outcomes.items() if text != "works"},
            flush=True,
        )
        broken += sum(text.startswith("breaks") for text in outcomes.values())
    PAGE.write_text(page(results), encoding="utf-8")
    if broken:
        sys.exit(f"{broken} cells break")


if __name__ == "__main__":
    main()
