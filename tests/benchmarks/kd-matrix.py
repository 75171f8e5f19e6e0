"""The cost of eight distillations of one teacher with shared caches, beside a live teacher.

Response at three temperatures and by JSD, selective by tokens and by rows, two teachers,
chain-of-thought; a teacher four times the student's size (random weights: what is compared is
cost), three passes over 300 problems each, 30 held-out ones. Seconds of whole `compress` calls, the
cached arm's caches made within it; the two arms alternate row by row, in one process, after a short
training that is not timed (imports, first calls).

python tests/benchmarks/kd-matrix.py
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _form import figure, write_figures
from _pair import random_pair

import methods
import suites
from harness.contract import Budget, Checkpoint, Job
from harness.data.source import LocalOrHubData
from harness.registry import Registry

ROWS, PASSES = 300, 3
MATRIX: list[tuple[str, dict[str, Any]]] = [
    ("response", {"temperature": 1.0}),
    ("response", {}),
    ("response", {"temperature": 4.0}),
    ("response", {"divergence": "jsd"}),
    ("selective", {}),
    ("selective", {"by": "confidence"}),
    ("multi-teacher", {}),
    ("cot", {"longest": 48}),
]


def main() -> None:
    """Run both arms and write the figure."""
    registry = Registry("method", methods.METHODS)
    tasks = {"gsm8k-mini": suites.load("gsm8k-mini")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        teacher, student, ratio = random_pair(folder)
        second = Checkpoint(
            path=teacher.path,
            name="second",
            digest="of its own",
            bytes_on_disk=teacher.bytes_on_disk,
        )
        spent: dict[str, list[float]] = {"cached": [], "live": []}
        warm = Job(
            teachers=(teacher, second),
            student=str(student.path),
            student_base=student,
            tasks=tasks,
            source=LocalOrHubData(),
            budget=Budget(seen_tokens=2_000, rows=20),
            seed=1,
            workdir=folder / "warm-up",
            cache=folder / "warm-up",
        )
        warm.workdir.mkdir()
        for cached in ("on", "off"):
            registry.build("response", {"cache": cached, "validation_rows": 2}).compress(warm)
            (warm.workdir / "student").rename(folder / f"warm-{cached}")
        for number, (name, settings) in enumerate(MATRIX):
            for arm in ("cached", "live") if number % 2 == 0 else ("live", "cached"):
                workdir = folder / f"{arm}-{number}"
                workdir.mkdir()
                cache = folder / "cache" if arm == "cached" else workdir / "cache"
                job = Job(
                    teachers=(teacher, second),
                    student=str(student.path),
                    student_base=student,
                    tasks=tasks,
                    source=LocalOrHubData(),
                    budget=Budget(seen_tokens=PASSES * ROWS * 84, rows=ROWS),
                    seed=1,
                    workdir=workdir,
                    cache=cache,
                )
                row_settings = dict(settings)
                cache_settings = (
                    {} if name == "cot" else {"cache": "on" if arm == "cached" else "off"}
                )
                method = registry.build(
                    "cot-unfiltered" if name == "cot" else name,
                    {**row_settings, **cache_settings, "validation_rows": ROWS // 10},
                )
                began = time.perf_counter()
                _compress(method, job)
                spent[arm].append(time.perf_counter() - began)
                print(arm, name, row_settings, f"{spent[arm][-1]:.1f} s", file=sys.stderr)
    total = sum(spent["cached"]) / sum(spent["live"])
    details = {
        "rows": [f"{name} {json.dumps(settings)}" for name, settings in MATRIX],
        "teacher over student, parameters": ratio,
        "seconds": {arm: [round(value, 2) for value in values] for arm, values in spent.items()},
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "kd-matrix",
                [total],
                unit="times the live arm",
                better="lower",
                target=0.6,
                peer="ours, cache off",
                details=details,
            )
        ],
    )


def _compress(method: Any, job: Job) -> None:
    """Make a student; a random teacher solves nothing, so `cot` keeps whatever ended or was cut."""
    if "ChainOfThought" in type(method).__name__:
        from methods.training import trace_filter

        plain = trace_filter.filter_traces

        def everything(examples: Any, texts: Any, job: Any, **_: Any) -> Any:
            return [
                (example, group[0].text) for example, group in zip(examples, texts, strict=True)
            ], {}

        trace_filter.filter_traces = everything
        try:
            method.compress(job)
        finally:
            trace_filter.filter_traces = plain
        return
    method.compress(job)


if __name__ == "__main__":
    main()
