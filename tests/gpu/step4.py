"""Step 4: training at the shape of 1.5B by each recipe: tokens/s, peak against plan, host syncs.

The whole product runs: rows of a file of one's own, the teacher's cache, the loop, the saved
student. Weights are random; the teacher is narrow and has the same vocabulary of 152k, since
a teacher's reading is measured elsewhere (step 3).
"""

import json
import random
import shutil
import statistics
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kit import GIB, Figures, Kit, Skip, configuration, parameters_of

STEPS, ROWS = 50, 16  # optimiser steps, and rows of each
WARM_STEPS = 10  # left out of the rate
WATCHED_STEPS = (3, 4, 5)  # in which the host's waits are counted
METHODS = ("sft", "response")
PLAN_ROOM = 1.25
# What makes the host wait for the card.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def run(kit: Kit) -> None:
    """Run the step's parts: every recipe of `response`, and `sft` by the first one."""
    # the optimizer of bf16 is compiled for a card, and the stand-in is none
    recipes = [recipe for recipe in _recipes() if recipe != "bf16" or not kit.dry]
    for method, recipe in [("response", recipe) for recipe in recipes] + [("sft", recipes[0])]:
        kit.part(
            f"{method}, {recipe}",
            lambda method=method, recipe=recipe: trained(kit, method, recipe),
            needs=_needs(kit, method, recipe),
            seconds=100,
        )


def _recipes() -> tuple[str, ...]:
    """Return the recipes that this version knows, in the order of its setting."""
    from methods.training.base import Trained

    recipes = typing.get_args(typing.get_type_hints(Trained)["recipe"])
    return tuple(recipe for recipe in recipes if recipe != "auto")  # auto is one of the others


def _method(method: str, recipe: str, **settings: Any) -> Any:
    from harness.catalog import methods

    return methods().build(method, {"recipe": recipe, **settings})


def _needs(kit: Kit, method: str, recipe: str) -> float:
    weights = parameters_of("1.5B", kit.shapes)
    return _method(method, recipe).training_bytes_per_weight * weights + 8 * GIB


def trained(kit: Kit, method: str, recipe: str) -> Figures:
    """Train 50 steps; compare the rate's parts, the peak with the plan's, and count host waits."""
    if recipe == "bf16" and find_spec("torchao") is None:
        raise Skip("its optimizer is torchao's, which is not here: pack.py --also torchao")
    import torch

    from harness.machine.memory import baseline_bytes

    student, teacher = _folder(kit, "1.5B", "student"), _folder(kit, "1.5B", "teacher")
    folder = kit.work / f"trained-{method}-{recipe}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    few = {"batch_size": 4, "micro_batch_size": 4} if kit.dry else {}
    built = _method(method, recipe, validation_rows=8, **few)
    job = _job(kit, folder, teacher, student)
    baseline_bytes(kit.device)
    before = torch.cuda.memory_allocated()
    with watched_steps() as watch:
        built.compress(job)
    cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    planned = _planned_bytes(kit, built, method, student, teacher, job)
    rates = watch.rates()
    peak = torch.cuda.max_memory_allocated() - before
    figures = {
        "steps": len(watch.steps),
        "tokens/s": round(statistics.median(rates)),
        "slowest and fastest step": [round(min(rates)), round(max(rates))],
        "host waits a step": watch.waits,
        "peak bytes": peak,
        "planned bytes": round(planned),
        "peak over plan": round(peak / planned, 3),
        "recorded peak": cost["peak_bytes"],
        "seconds in all": round(cost["seconds"], 1),
    }
    if peak > PLAN_ROOM * planned and not kit.dry:
        raise RuntimeError(f"training holds more than its plan says: {figures}")
    return figures


def _folder(kit: Kit, name: str, role: str) -> Any:
    """Return a saved random model with the embedded tokenizer; a teacher is narrow."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.models.checkpoint import describe
    from harness.models.resolve import EMBEDDED

    folder = kit.work / f"random-{name}-{role}"
    if not (folder / "tokenizer_config.json").exists():
        shape = kit.shapes[name]
        if role == "teacher":
            shape = (64, 2, 4, 2, 128, shape[5], True)
        torch.manual_seed(0)
        with torch.device(kit.device):
            model = AutoModelForCausalLM.from_config(
                configuration(name, {name: shape}), dtype=getattr(torch, kit.dtype)
            )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(EMBEDDED / "tiny").save_pretrained(folder)
    return describe(folder, name=f"random {name} {role}")


def _texts(kit: Kit) -> Path:
    """Write a file of training rows as long as GSM8K's: 190 tokens on average, 380 at most."""
    file = kit.work / "rows.jsonl"
    draw = random.Random(4)
    count, longest = (24, 40) if kit.dry else (ROWS * STEPS, 380)
    words = ("apples", "books", "has", "more", "than", "some", "boxes", "twice", "as", "many")
    lines = []
    for _ in range(count):
        length = max(8, min(longest, round(draw.lognormvariate(0, 0.4) * longest / 2)))
        text = [draw.choice(words) for _ in range(length * 2 // 3)]
        third = len(text) // 3
        prompt, completion = " ".join(text[:third]), " " + " ".join(text[third:])
        lines.append(json.dumps({"prompt": prompt, "completion": completion}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _job(kit: Kit, folder: Path, teacher: Any, student: Any) -> Any:
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData
    from harness.data.training_sets import TrainingSet

    rows = TrainingSet(str(_texts(kit)))
    return Job(
        teachers=(teacher,),
        student=str(student.path),
        student_base=student,
        tasks={rows.name: rows},
        source=LocalOrHubData(),
        budget=(
            Budget(seen_tokens=1_000, rows=20)
            if kit.dry
            else Budget(seen_tokens=STEPS * ROWS * 190, rows=STEPS * ROWS)
        ),
        seed=0,
        workdir=folder,
        cache=kit.work / "cache",
        device=kit.device,
        dtype=kit.dtype,
    )


def _planned_bytes(
    kit: Kit, built: Any, method: str, student: Any, teacher: Any, job: Any
) -> float:
    """Return the device memory that the plan gives this training."""
    from harness.estimating.estimate import student_stages
    from harness.estimating.hardware import parse_hardware
    from harness.estimating.workload import EstimateRequest, workload_of
    from harness.machine.memory import device_bytes
    from harness.models.shape import Shape

    shape = Shape.of_folder(student.path)
    request = EstimateRequest(
        teacher=Shape.of_folder(teacher.path),
        student=shape,
        chain=(method,),
        budget=job.budget.seen_tokens,
        rows=job.budget.rows,
        micro_batch_size=built.micro_batch_size,
        items={},
    )
    hardware = parse_hardware(f"1x{round(device_bytes(kit.device) / GIB)}GB", [])
    stages = student_stages(method, workload_of(built), shape, request, hardware)
    return stages[-1].memory


class StepWatch:
    """The seconds and tokens of every optimiser step, and the host's waits in a few of them."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []  # seconds since the last one, tokens
        self.waits: dict[str, float] = {}  # by what waited, a step
        self.stamp = 0.0

    def rates(self) -> list[float]:
        """Return tokens a second of the steps after the first ones."""
        later = self.steps[WARM_STEPS:] or self.steps[1:]
        return [tokens / seconds for seconds, tokens in later]


@contextmanager
def watched_steps() -> Iterator[StepWatch]:
    """Watch the steps of a training: each step waits for the card at its end, as its log does."""
    import torch

    from methods.training.loop import _TrainingRun

    watch, plain = StepWatch(), _TrainingRun._advance

    def advance(run: Any, step: int, planned_rows: Any) -> None:
        torch.cuda.synchronize()
        began, seen = time.perf_counter(), run.state.seen
        if step in WATCHED_STEPS:
            with waits_of_host() as counts:
                plain(run, step, planned_rows)
            for name, count in counts.items():
                watch.waits[name] = watch.waits.get(name, 0) + count / len(WATCHED_STEPS)
        else:
            plain(run, step, planned_rows)
        torch.cuda.synchronize()
        if run.state.seen > seen:
            watch.steps.append((time.perf_counter() - began, run.state.seen - seen))

    _TrainingRun._advance = advance
    try:
        yield watch
    finally:
        _TrainingRun._advance = plain


@contextmanager
def waits_of_host() -> Iterator[dict[str, int]]:
    """Count what makes the host wait for the card: values that are read, and moves back."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = function.name()
            source = next((value for value in args if isinstance(value, torch.Tensor)), None)
            is_on_card = source is not None and source.device.type == "cuda"
            target = (kwargs or {}).get("device")
            moves_back = name == "aten::_to_copy" and str(target) == "cpu"
            if type(source).__name__ == "OnCard":  # the stand-in, where autograd names the CPU too
                moves_back = moves_back and (kwargs or {}).get("pin_memory") is not None
            if is_on_card and (name in WAITS or moves_back):
                counts[name] = counts.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    with Counter():
        yield counts
