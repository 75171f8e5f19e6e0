"""Off-policy logit distillation beside trl's DistillationTrainer (forward KL), by turns.

It is the distillation trainer of trl's stable package: its loss is computed in tiles from hidden
states. It trains on-policy; here the completions are given to it in place of the student's own, and
all else is its own way: prompts padded on the left and completions on the right, the teacher run
beside the student, the student's entropy logged.

One pair (teacher four times the student's size, vocabulary 8,192, the teacher trained a little
beforehand), one list of rows, two epochs, batch 16, fp32, as many threads, AdamW, no checkpointing
(its default is to checkpoint, which is measured once beside, without a target). Both are given the
same batches in the same order, grouped by length, and the same learning rate at every step (ours
follows the tokens seen; trl's own follows the steps, which alone moves the loss of a seed by 0.07).
One process a run, one seed a round. Cold: the teacher's cache (256 tokens of each distribution; the
details say how much of its probability they hold) is made within the time; warm: it is there.
Memory: rise of the process's peak over what it was after the imports. Afterwards both students are
read by one evaluator: cross-entropy on held-out rows, and the divergence from the teacher.

python tests/benchmarks/kd-vs-trl.py [ROUNDS]     (needs trl 1.16 in this environment, or on
PYTHONPATH)
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

ROWS, EPOCHS, BATCH, RATE, VOCABULARY, TEACHING, KEPT = 64, 2, 16, 1e-3, 8_192, 20_000, 256

LOOP: dict[str, Any] = {
    "learning_rate": RATE,
    "batch_size": BATCH,
    "micro_batch_size": BATCH,
    "warmup_ratio": 0.05,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "validation_rows": 50,
}


def rows_of(split: str, count: int) -> Any:
    """Return tokenised rows of the generated word problems."""
    from itertools import islice

    from transformers import AutoTokenizer

    import suites
    from harness.data.source import LocalOrHubData
    from harness.models.resolve import EMBEDDED
    from methods.training.base import full_solution_pairs
    from methods.training.rows import encode

    texts = full_solution_pairs(
        islice(suites.load("gsm8k-mini").examples(split, LocalOrHubData()), count)
    )
    return encode(AutoTokenizer.from_pretrained(EMBEDDED / "tiny"), texts, longest=512)[0]


def in_order(seed: int) -> tuple[list[Any], list[float]]:
    """Return the rows of all epochs in order and each step's learning rate, as our loop does."""
    from itertools import islice

    from methods.training.optimizer import learning_rate_at
    from methods.training.rows import shuffled_steps
    from methods.training.settings import LoopSettings

    steps = [
        step
        for _, step in islice(
            shuffled_steps(rows_of("train", ROWS), batch_size=BATCH, seed=seed),
            EPOCHS * ROWS // BATCH,
        )
    ]
    lengths = [sum(len(row.ids) for row in step) for step in steps]
    loop = LoopSettings(**LOOP)
    return [row for step in steps for row in step], [
        learning_rate_at(sum(lengths[:number]) / sum(lengths), loop) for number in range(len(steps))
    ]


def job_in(folder: Path) -> Any:
    """Return a job with the pair of the folder."""
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData
    from harness.models.checkpoint import describe

    teacher, student = (describe(folder / name, name=name) for name in ("teacher", "student"))
    return Job(
        teachers=(teacher,),
        student=str(student.path),
        student_base=student,
        tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=1),
        seed=1,
        workdir=folder,
        cache=folder / "cache",
    )


def teach(folder: Path) -> None:
    """Make the pair, and train the teacher so far that it has something to say."""
    import torch
    from _pair import random_pair

    from harness.models.language_model import open_model
    from methods.training.loop import fit
    from methods.training.settings import LoopSettings, Training
    from methods.training.terms import Objective, hard_labels

    teacher, _, _ = random_pair(folder, vocabulary=VOCABULARY)
    opened = open_model(teacher)
    loop = LoopSettings(
        learning_rate=RATE,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        warmup_ratio=0.05,
        weight_decay=0.01,
        max_grad_norm=1.0,
        validation_rows=50,
    )
    (folder / "work").mkdir()
    fit(
        opened,
        rows=rows_of("train", 2_000),
        validation=rows_of("validation", 50),
        objective=Objective(terms=[hard_labels()]),
        settings=loop,
        training=Training(seen_tokens=TEACHING, seed=0, workdir=folder / "work"),
    )
    opened.model.to(torch.float32).save_pretrained(folder / "teacher")


def ours(folder: Path, out: Path, seed: int) -> dict[str, float]:
    """Train by our loop: the teacher's cache is made when it is not there."""
    from harness.machine.memory import process_bytes, reset_peak
    from harness.models.language_model import open_model
    from methods.training.divergences import distribution_kl
    from methods.training.loop import fit
    from methods.training.settings import LoopSettings, Training
    from methods.training.teacher_cache import teacher_cache
    from methods.training.terms import Objective, Term

    rows, job = rows_of("train", ROWS), job_in(folder)
    budget = EPOCHS * sum(len(row.ids) for row in rows)
    reset_peak()
    rest = process_bytes("VmRSS") or 0
    began = time.perf_counter()
    cached = teacher_cache(job, job.teacher, rows, k=KEPT, width=VOCABULARY)
    student = open_model(job.student_base)
    loop = LoopSettings(**LOOP)
    objective = Objective(
        terms=[Term("kl", 1.0, lambda at: distribution_kl(at.student_NV, at.teachers[0], 1.0))],
        sources=[cached],
        vocabulary=VOCABULARY,
    )
    (out / "work").mkdir(parents=True)
    spent = fit(
        student,
        rows=rows,
        validation=rows[:1],
        objective=objective,
        settings=loop,
        training=Training(seen_tokens=budget, seed=seed, workdir=out / "work"),
    )
    seconds = time.perf_counter() - began
    peak = process_bytes("VmHWM") or 0
    student.model.save_pretrained(out)
    return {
        "seconds": seconds,
        "rise": peak - rest,
        "tokens": spent.seen,
        "steps": spent.step,
        "kept": cached.meta["kept_mass"],
    }


def _trl_arguments(out: Path, seed: int, *, checkpointing: bool) -> Any:
    """Return trl's settings for the training that ours is."""
    from trl import DistillationConfig

    return DistillationConfig(
        output_dir=str(out / "work"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        beta=0.0,
        weight_decay=0.01,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_num_workers=0,
        seed=seed,
    )


def _off_policy_trainer(rows: list[Any], rates: list[float]) -> Any:
    """Return trl's trainer with the rows' own completions, and the learning rate of each step."""
    import torch
    from trl import DistillationTrainer

    class OffPolicy(DistillationTrainer):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            """Take the rows that the prompts name; return their prompts' tokens."""
            self.batch_rows = [rows[int(number)] for number in prompts]
            return [list(row.ids[: row.trained_from]) for row in self.batch_rows], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            """Give the rows' completions in place of what the student would write."""
            return [list(row.ids[row.trained_from :]) for row in self.batch_rows]

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: ([*rates, 0.0])[step] / RATE
            )
            return self.lr_scheduler

    return OffPolicy


def trl(folder: Path, out: Path, seed: int, *, checkpointing: bool = False) -> dict[str, float]:
    """Train by trl's DistillationTrainer on the same rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.machine.memory import process_bytes, reset_peak

    rows, rates = in_order(seed)
    trainer_class = _off_policy_trainer(rows, rates)  # imports trl, before the clock starts
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    data = Dataset.from_dict({"prompt": [str(number) for number in range(len(rows))]})
    reset_peak()
    rest = process_bytes("VmRSS") or 0
    began = time.perf_counter()
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=_trl_arguments(out, seed, checkpointing=checkpointing),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    seconds = time.perf_counter() - began
    peak = process_bytes("VmHWM") or 0
    student.save_pretrained(out)
    tokens = sum(len(row.ids) for row in rows)
    if trainer.state.num_input_tokens_seen != tokens:
        raise SystemExit(f"trl saw {trainer.state.num_input_tokens_seen} tokens, not {tokens}")
    return {
        "seconds": seconds,
        "rise": peak - rest,
        "tokens": tokens,
        "steps": trainer.state.global_step,
    }


def checkpointed(folder: Path, out: Path, seed: int) -> dict[str, float]:
    """Train by trl's trainer as it is by default: activations are computed again."""
    return trl(folder, out, seed, checkpointing=True)


def evaluate(folder: Path, out: Path, seed: int) -> dict[str, float]:
    """Return a student's held-out cross-entropy and its divergence from the teacher, in nats."""
    import torch
    from transformers import AutoModelForCausalLM

    from methods.training.losses import cross_entropy, forward_kl
    from methods.training.rows import batch_of
    from methods.training.teachers import TrainedPositionLogits

    rows = sorted(rows_of("validation", 48), key=lambda row: len(row.ids))
    heads = [
        TrainedPositionLogits(
            AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        )
        for model_folder in (out, folder / "teacher")
    ]
    sums = {"ce": 0.0, "kl": 0.0}
    count = 0
    for start in range(0, len(rows), 16):
        batch = batch_of(rows[start : start + 16], 1)
        with torch.no_grad():
            student, teacher = (head(batch) for head in heads)
        sums["ce"] += float(cross_entropy(student, batch.labels_N).sum())
        sums["kl"] += float(forward_kl(student, teacher).sum())
        count += int(batch.mask.sum())
    return {name: round(value / count, 5) for name, value in sums.items()}


PARTS = {
    "teach": lambda folder, out, seed: teach(folder),
    "ours": ours,
    "trl": trl,
    "checkpointed": checkpointed,
    "evaluate": evaluate,
}


def part(name: str, folder: Path, out: str = "unused", seed: int = 0) -> Any:
    """Run a part in a process of its own; return what it says."""
    line = [sys.executable, __file__, "--part", name, str(folder), str(folder / out), str(seed)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


class Measured(NamedTuple):
    """What all rounds measured, by kind of run, one value a round."""

    speeds: dict[str, list[float]]  # tokens a second
    rises: dict[str, list[float]]  # of peak memory, MiB
    read: dict[str, list[dict[str, float]]]  # held-out losses
    checkpointed: dict[str, float]  # trl's run as it is by default, once
    kept: list[float]  # of the teacher's probability, by the tokens that our cache keeps


def alternate(folder: Path, rounds: int) -> Measured:
    """Alternate cold, trl and warm runs, and read each round's students of the last two."""
    import shutil

    measured = Measured(
        speeds={"cold": [], "trl": [], "warm": []},
        rises={"cold": [], "trl": [], "warm": []},
        read={"warm": [], "trl": []},
        checkpointed={},
        kept=[],
    )
    part("teach", folder)
    for number in range(rounds):
        for kind in ("cold", "trl", "warm") if number % 2 == 0 else ("trl", "cold", "warm"):
            if kind == "cold":
                shutil.rmtree(folder / "cache", ignore_errors=True)
            shutil.rmtree(folder / kind, ignore_errors=True)
            result = part("trl" if kind == "trl" else "ours", folder, kind, number + 1)
            measured.speeds[kind].append(result["tokens"] / result["seconds"])
            measured.rises[kind].append(result["rise"] / 2**20)
            if kind == "cold":
                measured.kept.append(result["kept"])
            print(kind, result, file=sys.stderr)
        for kind in ("warm", "trl"):
            measured.read[kind].append(part("evaluate", folder, kind))
    measured.checkpointed.update(part("checkpointed", folder, "checkpointed", rounds))
    return measured


def details_of(measured: Measured, version: str) -> dict[str, object]:
    """Return speeds, memory and held-out losses, and whether our loss is at least as good."""
    read = measured.read
    gaps = [
        ours["ce"] - theirs["ce"] for ours, theirs in zip(read["warm"], read["trl"], strict=True)
    ]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan
    as_good = "no"
    if fmean(gaps) <= 0:
        as_good = "yes"
    elif fmean(gaps) < 2 * error:
        as_good = "cannot tell"
    default = measured.checkpointed
    return {
        "trl": version,
        "rows": ROWS,
        "epochs": EPOCHS,
        f"probability of the {KEPT} tokens that the cache keeps": measured.kept,
        "tokens a second": _rounded(measured.speeds),
        "rise, MiB": _rounded(measured.rises),
        "trl with its default, checkpointed activations": {
            "tokens a second": round(default["tokens"] / default["seconds"]),
            "rise, MiB": round(default["rise"] / 2**20),
        },
        "held-out, nats a token, mean over rounds": {
            kind: {
                name: round(fmean(losses[name] for losses in rounds), 5) for name in ("ce", "kl")
            }
            for kind, rounds in read.items()
        },
        "held-out cross-entropy by seed": {
            kind: [losses["ce"] for losses in rounds] for kind, rounds in read.items()
        },
        "ours less trl's, and its standard error": [round(fmean(gaps), 5), round(error, 5)],
        "validation cross-entropy at least as good": as_good,
    }


def _rounded(values_by_kind: Mapping[str, list[float]]) -> dict[str, list[int]]:
    return {kind: [round(value) for value in values] for kind, values in values_by_kind.items()}


def main() -> None:
    """Alternate cold, trl and warm runs, and write three figures."""
    if len(sys.argv) > 1 and sys.argv[1] == "--part":
        name, folder, out, seed = sys.argv[2:6]
        print(json.dumps(PARTS[name](Path(folder), Path(out), int(seed))))
        return
    from importlib import metadata

    from _form import figure, write_figures

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as place:
        measured = alternate(Path(place), rounds)
    version = metadata.version("trl")
    peer = f"trl {version} DistillationTrainer, off-policy"

    def ratios(values: Mapping[str, list[float]], kind: str) -> list[float]:
        return [ours / theirs for ours, theirs in zip(values[kind], values["trl"], strict=True)]

    speed: dict[str, Any] = {"unit": "times the tokens a second", "better": "higher", "peer": peer}
    figures = [
        figure(
            "kd-vs-trl:stable-warm",
            ratios(measured.speeds, "warm"),
            target=1.2,
            details=details_of(measured, version),
            **speed,
        ),
        figure("kd-vs-trl:stable-cold", ratios(measured.speeds, "cold"), target=1.0, **speed),
        figure(
            "kd-vs-trl:stable-memory",
            ratios(measured.rises, "warm"),
            unit="times the rise of peak memory",
            better="lower",
            target=1.0,
            peer=peer,
        ),
    ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
