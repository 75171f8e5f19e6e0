"""Seconds that GPTQ takes per billion weights of the blocks, against auto-round's light setting.

One random Llama in bf16 (width 1,024, feed-forward 2,816, two blocks), the same 64 sequences of 256
random tokens, 4 bits in groups of 128; both open the model's files and write the student's, each in
a process of its own, by turns, on as many threads. auto-round's light setting is its own: 50 steps,
batches of 8, a learning rate of 0.005. Its packages need not be installed beside ours: name another
interpreter.

python tests/benchmarks/ptq-seconds.py [ROUNDS] [PYTHON WITH auto-round]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _form import figure, write_figures

WIDTH, FEED_FORWARD, BLOCKS, VOCABULARY = 1_024, 2_816, 2, 1_024
SEQUENCES, LENGTH, GROUP = 64, 256, 128
LIGHT = {"iters": 50, "lr": 5e-3, "batch_size": 8}  # auto-round's recipe of this name


def save_model(folder: Path) -> int:
    """Save the model; return the number of weights in its blocks."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from harness.models.resolve import EMBEDDED

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2_048,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "tiny").save_pretrained(folder)
    return sum(weight.numel() for weight in model.model.layers.parameters())


def sequences() -> Any:
    """Return the token ids that both calibrate on, (SEQUENCES, LENGTH)."""
    import torch

    return torch.randint(
        3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1)
    )


def seconds_of_gptq(folder: Path) -> float:
    """Make our student; return its seconds, from opening the files to the checked student."""
    import methods
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData
    from harness.models.checkpoint import describe
    from harness.registry import Registry
    from methods.compression import calibration

    data = calibration.CalibrationData(sequences(), {})
    calibration.calibration_data = lambda *_, **__: data
    method = Registry("method", methods.METHODS).build("int4-calibrated", {"group_size": GROUP})
    with tempfile.TemporaryDirectory() as workdir:
        base = describe(folder, name="random")
        job = Job(
            teachers=(base,),
            student=str(folder),
            student_base=base,
            tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
            source=LocalOrHubData(),
            budget=Budget(seen_tokens=1_000, rows=10),
            seed=1,
            workdir=Path(workdir),
            cache=Path(workdir) / "cache",
        )
        began = time.perf_counter()
        method.compress(job)
        return time.perf_counter() - began


def seconds_of_auto_round(folder: Path) -> float:
    """Make auto-round's student; return its seconds, from opening the files to the saved student.

    Runs in an interpreter that has auto-round, and needs nothing of ours.
    """
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences()]
    with tempfile.TemporaryDirectory() as student:
        began = time.perf_counter()
        rounder = AutoRound(
            str(folder),
            scheme="W4A16",
            group_size=GROUP,
            dataset=DataLoader(rows, batch_size=LIGHT["batch_size"]),
            nsamples=SEQUENCES,
            seqlen=LENGTH,
            device_map="cpu",
            **LIGHT,
        )
        rounder.quantize_and_save(student, format="auto_round")
        return time.perf_counter() - began


def main() -> None:
    """Time both by turns."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    peer = sys.argv[2] if len(sys.argv) > 2 else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        weights = save_model(Path(folder))
        pairs = [
            (_seconds(sys.executable, "gptq", folder), _seconds(peer, "auto-round", folder))
            for _ in range(rounds)
        ]
    scale = 1e9 / weights
    version = subprocess.run(
        [peer, "-c", "from importlib.metadata import version; print(version('auto-round'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    details = {
        "seconds": [[round(value, 2) for value in pair] for pair in pairs],
        "seconds_per_billion": {
            name: round(scale * median(values))
            for name, values in zip(("gptq", "auto-round"), zip(*pairs, strict=True), strict=True)
        },
        "weights_of_the_blocks": weights,
    }
    write_figures(
        "ptq-seconds",
        [
            figure(
                "ptq-seconds",
                [ours / theirs for ours, theirs in pairs],
                unit="of the seconds of auto-round's light setting",
                better="lower",
                target=1.0,
                peer=f"auto-round {version}",
                details=details,
            )
        ],
    )


def _seconds(python: str, which: str, folder: str) -> float:
    done = subprocess.run(
        [python, __file__, "--seconds", which, folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2_000:])
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seconds"]:
        time_one = {"gptq": seconds_of_gptq, "auto-round": seconds_of_auto_round}[sys.argv[2]]
        print(json.dumps(time_one(Path(sys.argv[3]))))
    else:
        main()
