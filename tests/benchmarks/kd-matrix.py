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


class Arms:
    """Two arms that distil the same rows: with shared caches, and with the teacher beside each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry("method", methods.METHODS)
        self.tasks = {"gsm8k-mini": suites.load("gsm8k-mini")}
        teacher, self.student, self.ratio = random_pair(folder)
        second = Checkpoint(
            path=teacher.path,
            name="second",
            digest="of its own",
            bytes_on_disk=teacher.bytes_on_disk,
        )
        self.teachers = (teacher, second)

    def job(self, workdir: Path, cache: Path, budget: Budget) -> Job:
        """Return the job of a row in a new folder."""
        workdir.mkdir()
        return Job(
            teachers=self.teachers,
            student=str(self.student.path),
            student_base=self.student,
            tasks=self.tasks,
            source=LocalOrHubData(),
            budget=budget,
            seed=1,
            workdir=workdir,
            cache=cache,
        )

    def warm_up(self) -> None:
        """Train shortly, once with the cache and once without: imports and first calls."""
        place = self.folder / "warm-up"
        warm = self.job(place, place, Budget(seen_tokens=2_000, rows=20))
        for cached in ("on", "off"):
            settings = {"cache": cached, "validation_rows": 2}
            self.registry.build("response", settings).compress(warm)
            (place / "student").rename(self.folder / f"warm-{cached}")

    def seconds(self, arm: str, number: int) -> float:
        """Return the seconds in which an arm makes a row's student."""
        name, settings = MATRIX[number]
        workdir = self.folder / f"{arm}-{number}"
        cache = self.folder / "cache" if arm == "cached" else workdir / "cache"
        job = self.job(workdir, cache, Budget(seen_tokens=PASSES * ROWS * 84, rows=ROWS))
        cache_settings = {} if name == "cot" else {"cache": "on" if arm == "cached" else "off"}
        method = self.registry.build(
            "cot-unfiltered" if name == "cot" else name,
            {**settings, **cache_settings, "validation_rows": ROWS // 10},
        )
        began = time.perf_counter()
        _compress(method, job)
        return time.perf_counter() - began


def main() -> None:
    """Run both arms and write the figure."""
    spent: dict[str, list[float]] = {"cached": [], "live": []}
    with tempfile.TemporaryDirectory() as place:
        arms = Arms(Path(place))
        arms.warm_up()
        for number, (name, settings) in enumerate(MATRIX):
            for arm in ("cached", "live") if number % 2 == 0 else ("live", "cached"):
                spent[arm].append(arms.seconds(arm, number))
                print(arm, name, settings, f"{spent[arm][-1]:.1f} s", file=sys.stderr)
    total = sum(spent["cached"]) / sum(spent["live"])
    details = {
        "rows": [f"{name} {json.dumps(settings)}" for name, settings in MATRIX],
        "teacher over student, parameters": arms.ratio,
        "seconds": {arm: [round(value, 2) for value in values] for arm, values in spent.items()},
    }
    result = figure(
        "kd-matrix",
        [total],
        unit="times the live arm",
        better="lower",
        target=0.6,
        peer="ours, cache off",
        details=details,
    )
    write_figures(Path(__file__).stem, [result])


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
