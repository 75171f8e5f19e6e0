"""One optimiser step of `response` from a warm cache beside one of `sft`: time, peak memory.

Four rows of 256 tokens, half of them trained, student half the teacher's blocks: the embedded pair
(distributions kept whole) and, where HARNESS_GGUF names it, SmolLM2-135M (the 64 likeliest tokens).
Medians of paired steps; memory is the rise of the process's peak over a step, each in a process of
its own.

HARNESS_GGUF=... python tests/benchmarks/kd-step.py [STEPS]
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _form import figure, write_figures

import suites
from harness.contract import Budget, Job
from harness.data.source import LocalOrHubData
from harness.machine.memory import baseline_bytes, process_bytes, reset_peak
from harness.models.resolve import resolve
from harness.models.shaping import student_of
from methods.training.divergences import distribution_kl
from methods.training.optimizer import make_optimizers
from methods.training.positions import Positions
from methods.training.rows import TokenRow
from methods.training.settings import LoopSettings
from methods.training.stepper import Stepper
from methods.training.teacher_cache import teacher_cache
from methods.training.teachers import TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels

ROWS, LENGTH, TRAINED_FROM = 4, 256, 128


def setting(name: str, folder: Path) -> tuple[Any, Any, list[TokenRow], Any]:
    """Return (student, its optimizer, rows, warm cache) of a pair."""
    teacher = resolve(name, cache=Path(os.environ.get("HARNESS_CACHE", folder / "models")))
    student = student_of("depth:0.5", teacher, seed=0, device="cpu", dtype="float32")
    draw = random.Random(0)
    width = int(student.model.config.vocab_size)
    rows = [
        TokenRow(tuple(draw.randrange(width) for _ in range(LENGTH)), TRAINED_FROM)
        for _ in range(ROWS)
    ]
    job = Job(
        teachers=(teacher,),
        student="depth:0.5",
        student_base=teacher,
        tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=10_000),
        seed=0,
        workdir=folder,
        cache=folder,
    )
    sizes = {"batch_size": ROWS, "micro_batch_size": ROWS}
    loop = LoopSettings(
        learning_rate=1e-4,
        **sizes,
        warmup_ratio=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        validation_rows=1,
    )
    [(optimizer, _)] = make_optimizers(student.model, loop)
    student.model.train()
    return student, optimizer, rows, teacher_cache(job, teacher, rows, k=64, width=width)


def distilled(at: Positions) -> Any:
    """The loss of `response` at its default temperature."""
    return distribution_kl(at.student_NV, at.teachers[0], 2.0)


def step(kind: str, student: Any, optimizer: Any, rows: list[TokenRow], cached: Any) -> float:
    """Make one step; return its seconds."""
    plain = Objective(terms=[hard_labels()])
    taught = Objective(
        terms=[Term("kl", 0.5, distilled), hard_labels(0.5)],
        sources=[cached],
        vocabulary=cached.meta["vocabulary"],
    )
    objective = plain if kind == "sft" else taught
    stepper = Stepper(
        student.model, TrainedPositionLogits(student.model), objective, ROWS, student.pad_id
    )
    began = time.perf_counter()
    stepper.backward(
        rows,
        weights={term.name: term.weight for term in objective.terms},
        backward=lambda loss: loss.backward(),
    )
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    stepper.head.close()
    return seconds


def peak_of(name: str, kind: str, folder: Path) -> int:
    """Return how far one step of a kind lifts the peak of a fresh process, in bytes."""
    student, optimizer, rows, cached = setting(name, folder)
    # the optimizer's moments and the libraries' own memory
    step(kind, student, optimizer, rows, cached)
    rest = baseline_bytes("cpu")["resident"]
    reset_peak()
    step(kind, student, optimizer, rows, cached)
    return max(0, (process_bytes("VmHWM") or 0) - rest)


def main() -> None:
    """Measure both pairs, or (called by itself) one peak."""
    if len(sys.argv) == 5 and sys.argv[1] == "--peak":
        print(json.dumps(peak_of(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
        return
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    pairs = {
        "embedded": "tiny",
        **({"SmolLM2-135M": os.environ["HARNESS_GGUF"]} if os.environ.get("HARNESS_GGUF") else {}),
    }
    figures = []
    for label, name in pairs.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            student, optimizer, rows, cached = setting(name, folder)
            for kind in ("sft", "response", "sft", "response"):
                step(kind, student, optimizer, rows, cached)
            ratios = []
            for _ in range(steps):
                a, b, c, d = (
                    step(kind, student, optimizer, rows, cached)
                    for kind in ("sft", "response", "response", "sft")
                )
                ratios.append((b + c) / (a + d))
            peaks = {}
            for kind in ("sft", "response"):
                line = [sys.executable, __file__, "--peak", name, kind, place]
                peaks[kind] = json.loads(
                    subprocess.run(
                        line, capture_output=True, text=True, check=True
                    ).stdout.splitlines()[-1]
                )
        details = {
            "rows": ROWS,
            "tokens each": LENGTH,
            "peak rise, MiB": {kind: round(v / 2**20, 1) for kind, v in peaks.items()},
            "kept whole": cached.dense,
            "steps": 4 * steps,
        }
        print(label, details, sorted(ratios)[len(ratios) // 2])
        memory = peaks["response"] / peaks["sft"]
        figures += [
            figure(
                f"kd-step:{label}",
                ratios,
                unit="times sft",
                better="lower",
                target=1.15,
                peer="sft, ours",
                details=details,
            ),
            figure(
                f"kd-step:{label}:memory",
                [memory],
                unit="times sft",
                better="lower",
                target=1.25,
                peer="sft, ours",
            ),
        ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
