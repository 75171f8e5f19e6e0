"""The cost of stamps: CPU seconds of one stamp a token over those of decoding the token.

The model is the fastest one there is.

The embedded teacher decodes a token in two milliseconds; on any real model the share is smaller.
The details give the same from paired runs with and without stamps, whose difference drowns in their
spread.

python tests/benchmarks/measure-overhead.py
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from _form import figure, write_figures

from harness.measuring.worker import generate_greedily, token_times
from harness.models.language_model import open_model
from harness.models.resolve import resolve

TOKENS = 64


def bare(model: object, ids: torch.Tensor, new_tokens: int) -> None:
    """Decode as the stopwatch does, without a stamp anywhere."""
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
        chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        for _ in range(new_tokens - 1):
            out = model(
                input_ids=chosen,
                past_key_values=out.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )  # type: ignore[operator]
            chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)


def cpu_seconds(work: object) -> float:
    """Return the CPU seconds of one call."""
    began = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - began


def main() -> None:
    """Compare stamps alone with decoding, and runs with stamps with runs without."""
    model = open_model(resolve("tiny", cache=Path("unused"))).model
    ids = torch.zeros((1, 16), dtype=torch.long)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    clock: list[int] = []

    def stamps_alone() -> None:
        for _ in range(TOKENS * 100):
            clock.append(time.perf_counter_ns())

    generate_greedily(model, ids, TOKENS)
    alone = median(cpu_seconds(stamps_alone) / 100 for _ in range(rounds))
    with_stamps, without = [], []
    for number in range(rounds):
        for stamped in (True, False) if number % 2 else (False, True):
            work = (
                (lambda: token_times(model, ids, TOKENS, "cpu"))
                if stamped
                else (lambda: bare(model, ids, TOKENS))
            )
            (with_stamps if stamped else without).append(cpu_seconds(work))
    paired = [a / b for a, b in zip(with_stamps, without, strict=True)]
    details = {
        "CPU seconds of a token's stamp": alone / TOKENS,
        "of decoding a token": median(without) / TOKENS,
        "ratio of paired runs, median and quartiles": [
            round(v, 4) for v in (median(paired), *sorted(paired)[rounds // 4 :: rounds // 2])
        ],
    }
    print(details)
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "measure-overhead",
                [100 * alone / median(without)],
                unit="% of CPU time",
                better="lower",
                target=1,
                details=details,
            )
        ],
    )


if __name__ == "__main__":
    main()
