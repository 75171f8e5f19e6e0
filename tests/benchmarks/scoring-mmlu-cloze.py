"""Five-shot MMLU with the choices as texts (cloze), 100 questions, SmolLM2-135M, fp32, two cores.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/scoring-mmlu-cloze.py [ITEMS]
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

SUBJECTS = ("anatomy",)  # the shortest prefix of all: the least to share


def main() -> None:
    """Score ITEMS questions by both, once each."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    opened = outside_model()
    requests = requests_of(
        suites.load("mmlu-cloze").lm_eval_tasks(data_source(), subjects=SUBJECTS), items
    )
    result = alternate_sides(opened, requests, batch_size=4, rounds=1)
    details = {
        **compare_choices(requests, result["answers"]),
        **errors_against_float64(opened, requests, result["answers"]),
        "subjects": SUBJECTS,
        "batch size of the peer": 4,
        "CPU seconds": result["seconds"],
        "peak memory above rest, MiB": {
            who: round(value / 2**20) for who, value in result["peaks"].items()
        },
    }
    peer = "lm-eval HFLM, logits cache on"
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "scoring-mmlu-cloze",
                result["ratios"],
                unit="times less CPU",
                better="higher",
                target=4,
                peer=peer,
                details=details,
            )
        ],
    )


if __name__ == "__main__":
    main()
