"""Five-shot MMLU by letters beside lm-eval: three subjects, SmolLM2-135M, fp32, two cores.

One subject has a prompt of 2,400 tokens.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/scoring-mmlu.py [ITEMS]
"""

import sys
from pathlib import Path

from _form import figure, write_figures
from _scoring import (
    alternate_sides,
    compare_choices,
    data_source,
    errors_against_float64,
    outside_model,
    requests_of,
)

import suites

SUBJECTS = ("anatomy", "high_school_european_history", "marketing")


def main() -> None:
    """Score ITEMS questions of each subject by both, once each."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    opened = outside_model()
    requests = requests_of(
        suites.load("mmlu").lm_eval_tasks(data_source(), subjects=SUBJECTS), items
    )
    result = alternate_sides(opened, requests, batch_size=4, rounds=1)
    same = compare_choices(requests, result["answers"])
    print(same)
    details = {
        **same,
        **errors_against_float64(opened, requests, result["answers"]),
        "subjects": SUBJECTS,
        "items of each": items,
        "batch size of the peer": 4,
        "CPU seconds": result["seconds"],
        "peak memory above rest, MiB": {
            who: round(value / 2**20) for who, value in result["peaks"].items()
        },
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "scoring-mmlu",
                result["ratios"],
                unit="times less CPU",
                better="higher",
                target=5,
                peer="lm-eval HFLM, logits cache on",
                details=details,
            )
        ],
    )


if __name__ == "__main__":
    main()
