"""One step of `response` at a vocabulary of 152k: logits in parts against logits held whole.

1,024 trained positions, the teacher's 64 likeliest tokens from memory, a random Llama of width 576
and two blocks whose head is its token table. Memory is the rise of the process's peak over a step's
forward and backward pass, each form in a process of its own; time is the median of steps by turns.

python tests/benchmarks/kd-memory.py [STEPS]
"""

import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
from _form import figure, write_figures
from transformers import LlamaConfig, LlamaForCausalLM

from harness.machine.memory import baseline_bytes, process_bytes, reset_peak
from harness.models.logit_tail import logit_tail_of
from harness.scoring.backend import TopK
from methods.training.chunked_logits import ChunkedLoss, positions_of_a_part
from methods.training.divergences import distribution_kl
from methods.training.positions import Distribution
from methods.training.rows import Batch, TokenRow
from methods.training.stepper import Stepper
from methods.training.teachers import TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels

VOCABULARY, WIDTH, BLOCKS = 152_000, 576, 2
ROWS, LENGTH, TRAINED_FROM = 8, 256, 128  # 1,024 trained positions
KEPT = 64  # tokens of the teacher's distribution
FORMS = ("whole", "parts")


class FromMemory:
    """A teacher's distributions as a cache gives them, made up once."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        count = ROWS * (LENGTH - TRAINED_FROM)
        ids = [torch.randperm(VOCABULARY, generator=draw)[:KEPT] for _ in range(count)]
        log_p_NK = torch.log_softmax(torch.randn(count, KEPT + 1, generator=draw), -1)[:, :KEPT]
        self.distribution = Distribution(None, TopK(torch.stack(ids), log_p_NK))

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        return self.distribution

    reads_in_parts = True

    def read_parts(self, batch: Batch, vocabulary: int | None) -> Distribution:
        return self.distribution


def model_of() -> Any:
    """Return the student: random, its head tied to its token table."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=9,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def rows_of() -> list[TokenRow]:
    """Return rows of one length."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw).tolist()
    return [TokenRow(tuple(row), TRAINED_FROM) for row in ids]


def stepper_of(model: Any, form: str) -> Stepper:
    """Return what makes a step of `response` at its default settings."""
    terms = [
        Term("kl", 0.5, lambda at: distribution_kl(at.student_NV, at.teachers[0], 2.0)),
        hard_labels(0.5),
    ]
    head = model.get_output_embeddings()
    chunked = None
    if form == "parts":
        tail = logit_tail_of(model)
        assert tail is not None
        chunked = ChunkedLoss(head, tail, positions_of_a_part(VOCABULARY))
    objective = Objective(terms=terms, sources=[FromMemory()])
    return Stepper(model, TrainedPositionLogits(model), objective, ROWS, 0, chunked=chunked)


def step(stepper: Stepper, model: Any, rows: list[TokenRow]) -> float:
    """Make one forward and backward pass; return its seconds."""
    began = time.perf_counter()
    stepper.backward(rows, weights={"kl": 0.5, "ce": 0.5}, backward=lambda loss: loss.backward())
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=False)
    return seconds


def peak_of(form: str) -> int:
    """Return how far a step lifts this process's peak, in bytes; gradients are there before."""
    model, rows = model_of(), rows_of()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    stepper = stepper_of(model, form)
    rest = baseline_bytes("cpu")["resident"]
    reset_peak()
    step(stepper, model, rows)
    return max(0, (process_bytes("VmHWM") or 0) - rest)


def main() -> None:
    """Measure both forms, or (called by itself) one peak."""
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak_of(sys.argv[2])))
        return
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    peaks = {form: [_peak_elsewhere(form) for _ in range(3)] for form in FORMS}
    model, rows = model_of(), rows_of()
    steppers = {}
    for form in FORMS:
        steppers[form] = stepper_of(model, form)
        step(steppers[form], model, rows)
    seconds = [[step(steppers[form], model, rows) for form in FORMS] for _ in range(steps)]
    memory = [parts / whole_logits for whole_logits, parts in zip(*peaks.values(), strict=True)]
    times = [parts / whole_logits for whole_logits, parts in seconds]
    details = {
        "peak_bytes": {form: round(median(values)) for form, values in peaks.items()},
        "seconds": [[round(value, 3) for value in pair] for pair in seconds],
        "positions_of_a_part": positions_of_a_part(VOCABULARY),
    }
    write_figures(
        "kd-memory",
        [
            figure(
                "kd-memory:peak",
                memory,
                unit="of the peak rise of whole logits",
                better="lower",
                target=0.40,
                details=details,
            ),
            figure(
                "kd-memory:time",
                times,
                unit="of the time of whole logits",
                better="lower",
                target=1.25,
                details=details,
            ),
        ],
    )


def _peak_elsewhere(form: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--peak", form], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


if __name__ == "__main__":
    main()
