"""ARC-Easy, zero-shot, beside lm-eval at its best batch size: SmolLM2-135M, fp32, two cores.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/scoring-arc.py [ITEMS]
"""

import sys
from pathlib import Path

from _form import figure, write_figures
from _scoring import (
    alternate_sides,
    best_batch_size,
    compare_choices,
    data_source,
    outside_model,
    requests_of,
)

import suites

SIZES = (4, 16, 64)


def main() -> None:
    """Find the peer's best batch size on 40 items, then alternate on ITEMS of them."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    opened, source = outside_model(), data_source()
    task = suites.load("lm-eval:arc_easy", data_folder=source.folder)
    best, seconds = best_batch_size(opened, requests_of(task.lm_eval_tasks(source), 40), SIZES)
    requests = requests_of(task.lm_eval_tasks(source), items)
    result = alternate_sides(opened, requests, batch_size=best, rounds=2)
    same = compare_choices(requests, result["answers"])
    details = {
        **same,
        "best batch size of the peer": best,
        "CPU seconds on 40 items by batch size": seconds,
        "CPU seconds": result["seconds"],
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "scoring-arc",
                result["ratios"],
                unit="times less CPU",
                better="higher",
                target=2.5,
                peer=f"lm-eval HFLM, batch {best}",
                details=details,
            )
        ],
    )
    if same["same predictions"] < same["items"]:
        sys.exit(f"{same}: the answers differ")


if __name__ == "__main__":
    main()
