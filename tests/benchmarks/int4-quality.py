"""How much of the damage of rounding to nearest int4's settings remove, on SmolLM2-135M.

Damage is a row's log-perplexity above the base's; the share removed is that of rounding to nearest
in the same format: 4-bit codes, a bf16 scale for 64 inputs, table and head in int8. The base was
Q4_1 once (blocks of 32), with which groups of 64 do not align. Bits are counted over the matrices
of the blocks with their scales as they are stored, and over the whole file. Settings were chosen by
the layers' errors on calibration text, never by this text. Seconds follow the load of the machine:
they are details, and no figure.

What is finished lies in HARNESS_KEEP, if it is set, and is not made again.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/int4-quality.py
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _form import figure, write_figures
from _smollm2 import base_model, make_student, perplexity, students_folder

BEST = "gptq, mse, refined"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    BEST: ("int4-calibrated", {"scales": "mse", "refinement_passes": 3}),
    "nearest": ("int4", {}),
}


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a file holds, else make it and write it there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def perplexity_of(folder: Path) -> float:
    """Return a folder's perplexity, read in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the students, read them all, and compare their damage."""
    teacher = base_model()
    with students_folder() as folder:
        base = kept(folder / "base.json", lambda: perplexity_of(teacher.path))
        read, costs = {}, {}
        for row, (name, settings) in ROWS.items():
            place = folder / row.replace(", ", "-")
            costs[row] = kept(
                place / "cost-of-row.json",
                lambda: make_student(name, {"group_size": 64, **settings}, place),  # noqa: B023
            )
            read[row] = kept(
                place / "perplexity.json",
                lambda: perplexity_of(place / "student"),  # noqa: B023
            )
            print(row, read[row], costs[row]["seconds"], file=sys.stderr)
    worst = math.log(read["nearest"] / base)
    removed = {row: round(1 - math.log(read[row] / base) / worst, 4) for row in ROWS}
    notes = {row: costs[row]["told"] for row in ROWS}
    details = {
        "perplexity": {"base": base, **read},
        "removed": removed,
        "seconds": {row: costs[row]["seconds"] for row in ROWS},
        "bits_of_block_matrices": {row: notes[row]["bits_of_a_packed_weight"] for row in ROWS},
        "bits_of_the_whole_file": {row: notes[row]["bits_per_weight"] for row in ROWS},
        "calibration": notes[BEST]["calibration"],
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "int4-quality:removed",
                [removed[BEST]],
                unit="of the log-perplexity damage of rounding to nearest, g64",
                better="higher",
                target=0.65,
                peer="int4, ours",
                details=details,
            )
        ],
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(perplexity(Path(sys.argv[1])))
    else:
        main()
