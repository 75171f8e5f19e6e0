"""Planted differences: a model a tenth slower a token, and one that holds 64 MiB more.

The value is how often the slower one was found (the whole interval of its decode ratio below 1.0).

python tests/benchmarks/measure-planted.py [RUNS]
"""

import os
import sys
import tempfile
from pathlib import Path

# for the wrappers
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)

from _form import figure, write_figures
from _timing import measure_beside_itself

RUNS = 20
MIB = 2**20


def main() -> None:
    """Measure the slower model RUNS times, the heavier one once."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    intervals = []
    for number in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            measurements = measure_beside_itself(Path(folder), wrap="_wrapped:make_slower")
        speedup = next(m for m in measurements if m.name == "decode_speedup")
        low, value, high = speedup.low, speedup.value, speedup.high
        intervals.append([round(part, 4) for part in (low, value, high)])
        print(
            f"run {number + 1}: decode x {value:.3f} [{low:.3f}, {high:.3f}] {speedup.remark}",
            flush=True,
        )
    slower_runs = sum(high < 1 for _, _, high in intervals)
    bytes_of = {}
    for name, wrap in (("plain", ""), ("heavier", "_wrapped:make_heavier")):
        with tempfile.TemporaryDirectory() as folder:
            measurements = measure_beside_itself(Path(folder), wrap=wrap, rounds=1)
        bytes_of[name] = {m.name: m.value for m in measurements if m.unit == "bytes"}
        remark = next(m.remark for m in measurements if m.name == "weight_bytes_resident")
    more = {
        name: round((bytes_of["heavier"][name] - bytes_of["plain"][name]) / MIB, 2)
        for name in bytes_of["plain"]
    }
    details = {"decode": intervals, "MiB more of the heavier model": more, "its row says": remark}
    print(details)
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "measure-planted",
                [slower_runs],
                unit=f"of {runs} found",
                better="higher",
                target=round(18 * runs / RUNS),
                details=details,
            ),
            figure(
                "measure-planted:memory",
                [abs(more["weight_bytes_resident"] - 64)],
                unit="MiB off 64",
                better="lower",
                target=2,
            ),
        ],
    )


if __name__ == "__main__":
    main()
