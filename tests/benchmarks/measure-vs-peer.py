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
from harness.models.language_model import LanguageModel

SCENARIO = {"prompt_tokens": 128, "batch": 1, "new_tokens": 33}
THREADS = 2


WRITE_TOKENS = (
    "model.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, **settings)"
)
READ_PROMPT = "model(input_ids=ids, use_cache=True, logits_to_keep=1)"


class Peer:
    """torch.utils.benchmark's stopwatch on one model and one prompt."""

    def __init__(self, model: Any) -> None:
        shape = (1, SCENARIO["prompt_tokens"])
        ids = torch.randint(0, 49_000, shape, generator=torch.Generator().manual_seed(0))
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        self.names = {"model": model, "ids": ids, "settings": settings, "mask": mask}

    def seconds(self, statement: str, **names: Any) -> float:
        """Return the seconds of one run of a statement."""
        variables = {**self.names, "torch": torch, **names}
        statement = f"with torch.inference_mode(): {statement}"
        timer = Timer(statement, globals=variables, num_threads=THREADS)
        return float(timer.timeit(1).median)

    def read_and_decode(self) -> tuple[float, float]:
        """Return the seconds of the prefill, and of one decoded token."""
        prefill = self.seconds(READ_PROMPT)
        long = self.seconds(WRITE_TOKENS, n=SCENARIO["new_tokens"])
        short = self.seconds(WRITE_TOKENS, n=1)
        return prefill, (long - short) / (SCENARIO["new_tokens"] - 1)


def ours_read_and_decode(stopwatch: Stopwatch) -> tuple[float, float]:
    """Return the seconds of the prefill, and of one decoded token, by the harness's stopwatch."""
    [stamps] = stopwatch.ask("visit", scenario=SCENARIO, runs=1, prefills=0)["stamps"]
    return stamps[1], (stamps[-1] - stamps[1]) / (SCENARIO["new_tokens"] - 1)


def alternate(opened: LanguageModel, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return both sides' seconds, one of each a round."""
    seconds: dict[str, list[float]] = {
        "our prefill": [],
        "our decode": [],
        "their prefill": [],
        "their decode": [],
    }
    peer = Peer(opened.model)
    job = TimingJob(
        path=str(opened.checkpoint.path),
        device="cpu",
        dtype="float32",
        threads=THREADS,
        vocabulary=49_000,
    )
    with Stopwatch(job, folder, "ours") as stopwatch:
        stopwatch.wait_until_ready()
        stopwatch.ask("open")
        stopwatch.ask("warm", scenario=SCENARIO, visit_seconds=0.1)
        peer.seconds(WRITE_TOKENS, n=8)
        for number in range(rounds):
            for side in ("our", "their") if number % 2 == 0 else ("their", "our"):
                prefill, decode = (
                    ours_read_and_decode(stopwatch) if side == "our" else peer.read_and_decode()
                )
                seconds[f"{side} prefill"].append(prefill)
                seconds[f"{side} decode"].append(decode)
            print({name: round(values[-1], 4) for name, values in seconds.items()}, flush=True)
    return seconds


def main() -> None:
    """Alternate ours and theirs for ROUNDS rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        seconds = alternate(outside_model(), rounds, Path(folder))
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
    result = figure(
        "measure-vs-peer",
        [max(gaps.values())],
        unit="of the median",
        better="lower",
        target=0.1,
        peer="torch.utils.benchmark over model(...) and model.generate",
        details=details,
    )
    write_figures(Path(__file__).stem, [result])


if __name__ == "__main__":
    main()
