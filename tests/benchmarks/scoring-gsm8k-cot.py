"""Eight-shot GSM8K with chains of thought beside lm-eval: 32 problems, SmolLM2-135M, fp32.

Both run on two cores and write at most 512 tokens an answer.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/scoring-gsm8k-cot.py [ITEMS] [BATCH
SIZE OF THE PEER]
"""

import sys
from pathlib import Path

from _form import figure, write_figures
from _scoring import alternate_sides, data_source, outside_model, requests_of

import suites


def main() -> None:
    """Write ITEMS answers by both, once each."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    opened = outside_model()
    requests = requests_of(suites.load("gsm8k-cot").lm_eval_tasks(data_source()), items)
    result = alternate_sides(opened, requests, batch_size=batch, rounds=1)
    mine, theirs = result["answers"]["ours"], result["answers"]["theirs"]
    details = {
        "items": items,
        "same answers": sum(a == b for a, b in zip(mine, theirs, strict=True)),
        "batch size of the peer": batch,
        "new tokens at most": 512,
        "CPU seconds": result["seconds"],
        "peak memory above rest, MiB": {
            who: round(value / 2**20) for who, value in result["peaks"].items()
        },
    }
    print(details)
    peer = f"lm-eval HFLM, batch {batch}"
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "scoring-gsm8k-cot",
                result["ratios"],
                unit="times less CPU",
                better="higher",
                target=2,
                peer=peer,
                details=details,
            )
        ],
    )


if __name__ == "__main__":
    main()
