"""LAMBADA beside lm-eval at its best batch size: SmolLM2-135M, fp32, two cores.

Nothing is shared between its items.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/scoring-lambada.py [ITEMS]
"""

import sys
from pathlib import Path

from _form import figure, write_figures
from _scoring import alternate_sides, best_batch_size, data_source, outside_model, requests_of

import suites

SIZES = (1, 4, 16)


def main() -> None:
    """Find the peer's best batch size on 60 items, then alternate on ITEMS of them."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    opened, source = outside_model(), data_source()
    task = suites.load("lm-eval:lambada_openai", data_folder=source.folder)
    best, seconds = best_batch_size(opened, requests_of(task.lm_eval_tasks(source), 60), SIZES)
    requests = requests_of(task.lm_eval_tasks(source), items)
    result = alternate_sides(opened, requests, batch_size=best, rounds=2)
    pairs = list(zip(result["answers"]["ours"], result["answers"]["theirs"], strict=True))
    alike = sum(mine[1] == theirs[1] for mine, theirs in pairs)
    details = {
        "items": len(pairs),
        "same predictions": alike,
        "largest gap of a log-probability": max(abs(mine[0] - theirs[0]) for mine, theirs in pairs),
        "best batch size of the peer": best,
        "CPU seconds on 60 items by batch size": seconds,
        "CPU seconds": result["seconds"],
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "scoring-lambada",
                result["ratios"],
                unit="times less CPU",
                better="higher",
                target=1.3,
                peer=f"lm-eval HFLM, batch {best}",
                details=details,
            )
        ],
    )
    if alike < len(pairs):
        sys.exit(f"{alike} of {len(pairs)} answers are alike")


if __name__ == "__main__":
    main()
