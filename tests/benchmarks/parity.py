"""The harness beside lm-eval's evaluation, item by item, for all pairs of factor values.

The factors are architecture, tokenizer, task form and batch size.

lm-eval's `simple_evaluate` with its own Hugging Face backend runs in float32, one row at a time;
ours runs at three batch sizes. An item is alike where the prompt is the same and so are the answer
written, or the choice and every log-probability within 2e-3 nats. Cells are kept as they come,
under the digest of the code that made them, so that a stopped run goes on: give it seconds, and run
it again.

python tests/benchmarks/parity.py [SECONDS]
"""

import json
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _parity
from _form import figure, write_figures
from _forms import write_tasks

from harness.files.digests import digest_of, file_digest

ROOT = Path(__file__).parents[2]


def finished_cells_path() -> Path:
    """Return the file of finished cells, named by the digest of the code that they depend on."""
    folder = Path(__file__).parent
    files = [*sorted((ROOT / "harness").glob("*.py")), *sorted((ROOT / "suites").glob("*.py"))]
    files += [folder / f"_{name}.py" for name in ("parity", "forms", "tokenizers", "architectures")]
    key = digest_of([(path.name, file_digest(path)) for path in files])[:16]
    return Path(os.environ.get("HARNESS_CACHE", ROOT / "results/runs")) / "parity" / f"{key}.jsonl"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the outcomes of finished cells by name."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return dict(json.loads(line) for line in lines if line)


def main() -> None:
    """Run the cells that are missing, and write the figures once none is."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else float("inf")
    path, cells, began = finished_cells_path(), _parity.design(), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = path.parent / "tasks"
    write_tasks(tasks)
    done = read(path)
    with path.open("a", encoding="utf-8") as stream:
        for cell in cells:
            if cell.name in done:
                continue
            if time.monotonic() - began > seconds:
                break
            done[cell.name] = asdict(_parity.compare_cell(cell, tasks))
            stream.write(json.dumps([cell.name, done[cell.name]], ensure_ascii=False) + "\n")
            stream.flush()
    report(
        [done[cell.name] | {"name": cell.name} for cell in cells if cell.name in done], len(cells)
    )


def report(outcomes: list[dict[str, Any]], design_size: int) -> None:
    """Print what differs, and write the figures of a whole design."""
    refused = [outcome for outcome in outcomes if outcome["refused"]]
    answered = [outcome for outcome in outcomes if not outcome["refused"]]
    for outcome in refused:
        print(f"refused: {outcome['name']}: {outcome['refused']}")
    for outcome in answered:
        differing = outcome["items"] - outcome["alike"]
        if differing:
            print(
                f"differs: {outcome['name']}: {differing} of {outcome['items']}: "
                f"{'; '.join(outcome['differs'])[:600]}"
            )
    items, alike = (sum(outcome[key] for outcome in answered) for key in ("items", "alike"))
    print(
        f"{len(outcomes)} of {design_size} cells, {alike} of {items} items alike, "
        f"{len(refused)} refused"
    )
    if len(outcomes) < design_size:
        return
    factors = dict(
        zip(
            ("architectures", "tokenizers", "forms", "batch sizes"),
            map(len, _parity.FACTORS),
            strict=True,
        )
    )
    details = {
        "cells": design_size,
        "items": items,
        **factors,
        "widest gap of a log-probability": max(outcome["gap"] for outcome in answered),
        "refusals": sorted({outcome["refused"] for outcome in refused}),
    }
    peer = "lm-eval simple_evaluate, hf backend, float32, batch 1"
    figures = [
        figure(
            "parity:predictions",
            [alike / items],
            unit="of the items",
            better="higher",
            target=1.0,
            peer=peer,
            details=details,
        ),
        figure(
            "parity:refused",
            [len(refused) / design_size],
            unit="of the cells",
            better="lower",
            target=0.05,
        ),
    ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
