"""What the SmolLM2 programs share: students, perplexity, and speeds beside the fp32 base.

Each student is made in a process of its own; base and student are timed by turns.

The base is SmolLM2-135M-Instruct from a GGUF file named by HARNESS_GGUF, unpacked (it was Q4_1
once), opened in fp32. Calibration: 128 sequences of 256 tokens of the C4 sample in
HARNESS_DATA_DIR. Perplexity: WikiText-2's raw test text from there, its first WINDOWS windows of
LENGTH tokens. Speeds: decode and prefill of base and student by turns, each in a process of its
own, one ratio a round.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _form import figure

WINDOWS, LENGTH, ROUNDS = int(os.environ.get("HARNESS_WINDOWS", "80")), 512, 6
GRID = ("128x1x32", "512x1x8")


def base_model() -> Any:
    """Return the base's checkpoint."""
    from harness.models.artefacts import default_cache
    from harness.models.resolve import resolve

    if not os.environ.get("HARNESS_GGUF") or not os.environ.get("HARNESS_DATA_DIR"):
        raise SystemExit(
            "set HARNESS_GGUF to SmolLM2-135M-Instruct's GGUF file and HARNESS_DATA_DIR to a "
            "folder with wikitext2/ and c4_demo/"
        )
    return resolve(os.environ["HARNESS_GGUF"], cache=default_cache())


def job_for(folder: Path) -> Any:
    """Return a job whose tasks have no train split: what calibrates reads C4."""
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData

    teacher = base_model()
    return Job(
        teachers=(teacher,),
        student=str(teacher.path),
        student_base=teacher,
        tasks={"wikitext": suites.load("wikitext")},
        source=LocalOrHubData.from_environment(None),
        budget=Budget(seen_tokens=1),
        seed=1,
        workdir=folder,
        cache=folder / "cache",
    )


def compress(name: str, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make a student in this process; return seconds, bytes, memory rise and the method's notes.

    The rise is that of the peak over the memory after the imports.
    """
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import harness.models.packed  # noqa: F401
    import methods
    from harness.machine.memory import baseline_bytes, process_bytes, reset_peak
    from harness.registry import Registry

    folder.mkdir(parents=True, exist_ok=True)
    job = job_for(folder)
    method = Registry("method", methods.METHODS).build(name, settings)
    rest = baseline_bytes("cpu")["resident"]
    reset_peak()
    began = time.perf_counter()
    student = method.compress(job)
    seconds = time.perf_counter() - began
    rise = (process_bytes("VmHWM") or 0) - rest
    notes = json.loads((folder / "cost.json").read_text(encoding="utf-8"))["notes"]
    return {
        "seconds": round(seconds, 1),
        "rise": rise,
        "bytes": student.bytes_on_disk,
        "told": notes[next(iter(notes))],
    }


def make_student(name: str, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make a student in a process of its own; return what it took."""
    line = [sys.executable, __file__, name, json.dumps(settings), str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    costs: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        name,
        settings,
        {key: value for key, value in costs.items() if key != "told"},
        file=sys.stderr,
    )
    return costs


def perplexity(folder: Path, *, by_the_kernel_that_decodes: bool = False) -> float:
    """Return a model folder's perplexity per token on the windows, each read from its start.

    Windows are many rows, which int8 weights multiply by another kernel than the few of decoding;
    that one is asked for by name.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import harness.models.packed
    from harness.data.source import LocalOrHubData

    text = LocalOrHubData.from_environment(None).text("wikitext2/wiki.test.raw")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text[: WINDOWS * LENGTH * 8])["input_ids"][: WINDOWS * LENGTH]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, usual = 0.0, harness.models.packed.MAX_KERNEL_ROWS
    if by_the_kernel_that_decodes:
        harness.models.packed.MAX_KERNEL_ROWS = 2**31
    try:
        with torch.inference_mode():
            for window in torch.tensor(ids).view(-1, LENGTH).split(4):
                logits = model(input_ids=window, use_cache=False).logits[:, :-1]
                total += float(
                    torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
                    )
                )
    finally:
        harness.models.packed.MAX_KERNEL_ROWS = usual
    return math.exp(total / (WINDOWS * (LENGTH - 1)))


def measure_speedups(folder: Path, teacher: Any, *, wrap: str = "") -> dict[str, list[float]]:
    """Return each round's ratios, base over student: decode and prefill at 128, prefill at 512.

    `wrap` is put around the student when it is open (`module:function`).
    """
    import torch

    from harness.measuring.measure import TimedModel, TimingSettings, measure
    from harness.measuring.scenario import parse_grid
    from harness.models.checkpoint import describe

    settings = TimingSettings(
        grid=tuple(scenario for part in GRID for scenario in parse_grid(part)),
        rounds=ROUNDS,
        threads=torch.get_num_threads(),
    )
    with tempfile.TemporaryDirectory() as place:
        measurements = measure(
            TimedModel(describe(folder, name="student"), wrap),
            TimedModel(teacher),
            settings,
            folder=Path(place),
        ).measurements
    ratios = {
        (measurement.name, measurement.condition.split()[0]): list(measurement.values)
        for measurement in measurements
        if measurement.name.endswith("_speedup")
    }
    conditions = list(
        dict.fromkeys(
            measurement.condition
            for measurement in measurements
            if measurement.name == "decode_speedup"
        )
    )
    first, second = (condition.split()[0] for condition in conditions)
    return {
        "decode": ratios["decode_speedup", first],
        "prefill": ratios["prefill_speedup", first],
        "prefill512": ratios["prefill_speedup", second],
    }


def cost_figures(program: str, costs: Mapping[str, Mapping[str, Any]], fp32: int) -> list[Any]:
    """Return two figures over a program's students: the longest seconds, the largest memory rise.

    The rise is a multiple of the fp32 size.
    """
    slowest, largest = (
        max(costs, key=lambda name: costs[name]["seconds"]),
        max(costs, key=lambda name: costs[name]["rise"]),
    )
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    rises = {name: round(cost["rise"] / fp32, 3) for name, cost in costs.items()}
    return [
        figure(
            f"{program}:seconds",
            [costs[slowest]["seconds"]],
            unit="s, the slowest method",
            better="lower",
            target=300,
            details=seconds,
        ),
        figure(
            f"{program}:memory",
            [costs[largest]["rise"] / fp32],
            unit="times the fp32 weights, rise over imports",
            better="lower",
            target=2.5,
            details=rises,
        ),
    ]


@contextmanager
def students_folder() -> Any:
    """Yield a folder for students: HARNESS_KEEP if it is set, else a temporary one."""
    folder = os.environ.get("HARNESS_KEEP")
    if folder:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


if __name__ == "__main__":
    print(json.dumps(compress(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))))
