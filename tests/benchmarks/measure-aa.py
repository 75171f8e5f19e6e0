"""The same model against itself, twenty times, beside a process that burns a core in bursts.

Its value is how many of the twenty 95 % intervals of the decode ratio hold 1.0; the details give
prefill, end to end, and how wide the intervals are.

python tests/benchmarks/measure-aa.py [RUNS]
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _form import figure, write_figures
from _timing import BURN, measure_beside_itself

from harness.records.record import Measurement

RUNS = 20
NAMES = ("prefill", "decode", "end_to_end")


def speedups_beside_a_burner(number: int) -> dict[str, Measurement]:
    """Measure the embedded teacher against itself while a process burns a core in bursts."""
    seed = str(random.Random(number).random())
    burner = subprocess.Popen([sys.executable, "-c", BURN, seed])
    try:
        with tempfile.TemporaryDirectory() as folder:
            measurements = measure_beside_itself(Path(folder))
    finally:
        burner.kill()
        burner.wait()
    first = {measurement.name: measurement for measurement in reversed(measurements)}
    return {name: first[f"{name}_speedup"] for name in NAMES}


def main() -> None:
    """Measure RUNS times and write how many intervals hold 1."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    intervals: dict[str, list[tuple[Any, float, Any]]] = {name: [] for name in NAMES}
    remarks = []
    for number in range(runs):
        speedups = speedups_beside_a_burner(number)
        for name, speedup in speedups.items():
            intervals[name].append((speedup.low, speedup.value, speedup.high))
        remarks.append(speedups["decode"].remark)
        low, value, high = intervals["decode"][-1]
        print(
            f"run {number + 1}: decode x {value:.3f} [{low:.3f}, {high:.3f}] {remarks[-1]}",
            flush=True,
        )
    holding = {
        name: sum(low <= 1 <= high for low, _, high in values) for name, values in intervals.items()
    }
    widths = {
        name: round(median((high - low) / 2 for low, _, high in values), 4)
        for name, values in intervals.items()
    }
    details = {
        "intervals that hold 1.0": holding,
        "of": runs,
        "median half-width": widths,
        "runs marked dirty": sum(map(bool, remarks)),
        "decode": [[round(part, 4) for part in interval] for interval in intervals["decode"]],
    }
    print(details)
    figures = [
        figure(
            "measure-aa",
            [holding["decode"]],
            unit=f"of {runs} intervals",
            better="higher",
            target=round(17 * runs / RUNS),
            details=details,
        ),
        figure(
            "measure-aa:half-width",
            [widths["decode"]],
            unit="of the ratio",
            better="lower",
            target=0.08,
        ),
    ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
