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

from _form import figure, write_figures
from _timing import BURN, measure_beside_itself

RUNS = 20


def main() -> None:
    """Measure the embedded teacher against itself RUNS times beside a burning process."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    intervals: dict[str, list[tuple[float, float, float]]] = {
        "prefill": [],
        "decode": [],
        "end_to_end": [],
    }
    remarks = []
    for number in range(runs):
        burning = subprocess.Popen(
            [sys.executable, "-c", BURN, str(random.Random(number).random())]
        )
        try:
            with tempfile.TemporaryDirectory() as folder:
                measurements = measure_beside_itself(Path(folder))
        finally:
            burning.kill()
            burning.wait()
        for name, values in intervals.items():
            speedup = next(m for m in measurements if m.name == f"{name}_speedup")
            values.append((speedup.low, speedup.value, speedup.high))
        remarks.append(next(m for m in measurements if m.name == "decode_speedup").remark)
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
    target = round(17 * runs / RUNS)
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "measure-aa",
                [holding["decode"]],
                unit=f"of {runs} intervals",
                better="higher",
                target=target,
                details=details,
            ),
            figure(
                "measure-aa:half-width",
                [widths["decode"]],
                unit="of the ratio",
                better="lower",
                target=0.08,
            ),
        ],
    )


if __name__ == "__main__":
    main()
