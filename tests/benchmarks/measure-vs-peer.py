"""Our prefill and decode medians against torch.utils.benchmark's on one model, by turns in one run.

The peer times `model(...)` for the prefill and `model.generate` of 33 tokens less that of one token
for the decoding, in this process; ours is the stopwatch process that `harness measure` uses. The
value is the larger of the two relative differences.

HARNESS_GGUF=... python tests/benchmarks/measure-vs-peer.py [ROUNDS]
"""

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _form import figure, write_figures
from _scoring import outside_model
from torch.utils.benchmark import Timer

from harness.measuring.measure import Stopwatch
from harness.measuring.scenario import Scenario
from harness.measuring.worker import TimingJob

SCENARIO = {"prompt_tokens": 128, "batch": 1, "new_tokens": 33}
THREADS = 2


def main() -> None:
    """Alternate ours and theirs for ROUNDS rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    opened = outside_model()
    model = opened.model
    ids = torch.randint(
        0, 49_000, (1, SCENARIO["prompt_tokens"]), generator=torch.Generator().manual_seed(0)
    )
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def theirs(statement: str, **names: Any) -> float:
        variables = {
            "model": model,
            "ids": ids,
            "settings": settings,
            "mask": torch.ones_like(ids),
            "torch": torch,
            **names,
        }
        return float(
            Timer(
                f"with torch.inference_mode(): {statement}", globals=variables, num_threads=THREADS
            )
            .timeit(1)
            .median
        )

    write_tokens = (
        "model.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, **settings)"
    )
    seconds: dict[str, list[float]] = {
        "our prefill": [],
        "our decode": [],
        "their prefill": [],
        "their decode": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        job = TimingJob(
            path=str(opened.checkpoint.path),
            device="cpu",
            dtype="float32",
            threads=THREADS,
            vocabulary=49_000,
        )
        with Stopwatch(job, Path(folder), "ours") as ours:
            ours.wait_until_ready()
            ours.ask("open")
            ours.ask("warm", scenario=SCENARIO, visit_seconds=0.1)
            theirs(write_tokens, n=8)
            for number in range(rounds):
                for who in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
                    if who == "ours":
                        [stamps] = ours.ask("visit", scenario=SCENARIO, runs=1, prefills=0)[
                            "stamps"
                        ]
                        seconds["our prefill"].append(stamps[1])
                        seconds["our decode"].append(
                            (stamps[-1] - stamps[1]) / (SCENARIO["new_tokens"] - 1)
                        )
                    else:
                        seconds["their prefill"].append(
                            theirs("model(input_ids=ids, use_cache=True, logits_to_keep=1)")
                        )
                        long, short = (
                            theirs(write_tokens, n=SCENARIO["new_tokens"]),
                            theirs(write_tokens, n=1),
                        )
                        seconds["their decode"].append(
                            (long - short) / (SCENARIO["new_tokens"] - 1)
                        )
                print({name: round(values[-1], 4) for name, values in seconds.items()}, flush=True)
    medians = {name: median(values) for name, values in seconds.items()}
    gaps = {
        part: abs(medians[f"our {part}"] / medians[f"their {part}"] - 1)
        for part in ("prefill", "decode")
    }
    details = {
        "scenario": str(Scenario(**SCENARIO)),
        "medians, s (decode: a token)": medians,
        "relative differences": gaps,
        "rounds": rounds,
    }
    print(details)
    peer = "torch.utils.benchmark over model(...) and model.generate"
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "measure-vs-peer",
                [max(gaps.values())],
                unit="of the median",
                better="lower",
                target=0.1,
                peer=peer,
                details=details,
            )
        ],
    )


if __name__ == "__main__":
    main()
