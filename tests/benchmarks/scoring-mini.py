"""Both embedded tasks (1,000 items, teacher `tiny`) beside lm-eval at its best batch size.

python tests/benchmarks/scoring-mini.py [ROUNDS]
"""

import sys
from pathlib import Path

from _form import figure, write_figures
from _scoring import alternate_sides, compare_choices, lm_eval_backend, requests_of, timed_answers

import suites
from harness.data.source import LocalOrHubData
from harness.models.language_model import open_model
from harness.models.resolve import resolve

BATCHES = {"gsm8k-mini": (64, 128, 256, 512), "mmlu-mini": (16, 64, 256)}
TARGETS = {"gsm8k-mini": 1.5, "mmlu-mini": 2.0}


def main() -> None:
    """Find the peer's best batch size on a fifth of the items, then alternate on all of them."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    opened = open_model(resolve("tiny", cache=Path("unused")))
    figures = []
    for name, batches in BATCHES.items():
        trial = requests_of(suites.load(name).lm_eval_tasks(LocalOrHubData()), 400)
        timed_answers(lm_eval_backend(opened, batches[0]), trial[:200])  # warm
        seconds = {size: timed_answers(lm_eval_backend(opened, size), trial)[0] for size in batches}
        best = min(seconds, key=seconds.__getitem__)
        requests = requests_of(suites.load(name).lm_eval_tasks(LocalOrHubData()), 1000)
        result = alternate_sides(opened, requests, batch_size=best, rounds=rounds)
        if name == "mmlu-mini":
            same = compare_choices(requests, result["answers"])
        else:
            pairs = list(zip(result["answers"]["ours"], result["answers"]["theirs"], strict=True))
            same = {"items": len(pairs), "same answers": sum(a == b for a, b in pairs)}
        details = {
            **same,
            "best batch size of the peer": best,
            "CPU seconds on 400 items by batch size": seconds,
            "CPU seconds": result["seconds"],
            "peak memory above rest, MiB": {
                who: round(value / 2**20) for who, value in result["peaks"].items()
            },
        }
        figures.append(
            figure(
                f"scoring-mini:{name.partition('-')[0]}",
                result["ratios"],
                unit="times less CPU",
                better="higher",
                target=TARGETS[name],
                peer=f"lm-eval HFLM, batch {best}",
                details=details,
            )
        )
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
