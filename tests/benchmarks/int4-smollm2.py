"""Int4 weights of SmolLM2-135M beside its fp32 base: bytes, decode speed, perplexity.

Calibrated rounding is compared with rounding to nearest.

The base was Q4_1 once (groups of 32), so groups of 64 are compared: rounding to nearest in groups
of 32 would reproduce it and prove nothing.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/int4-smollm2.py
"""

from pathlib import Path

from _form import figure, write_figures
from _smollm2 import (
    base_model,
    cost_figures,
    make_student,
    measure_speedups,
    perplexity,
    students_folder,
)

from harness.models.shape import parameters_on_disk

PEER = "the fp32 base, by turns"


def main() -> None:
    """Make both students, read them, time one: they have one form."""
    teacher = base_model()
    fp32 = 4 * parameters_on_disk(teacher.path)
    costs, read = {}, {"base": perplexity(teacher.path)}
    with students_folder() as folder:
        for name in ("int4", "int4-calibrated"):
            costs[name] = make_student(name, {"group": 64}, folder / name)
            read[name] = perplexity(folder / name / "student")
        timed = measure_speedups(folder / "int4" / "student", teacher)
    details = {"perplexity": read, "told": {name: cost["told"] for name, cost in costs.items()}}
    ratio = read["int4-calibrated"] / read["int4"]
    figures = [
        figure(
            "int4-smollm2:decode",
            timed["decode"],
            unit="times fp32",
            better="higher",
            target=1.5,
            peer=PEER,
            details=details,
        ),
        figure(
            "int4-smollm2:prefill",
            timed["prefill"],
            unit="times fp32, 128 tokens",
            better="higher",
            target=0.7,
            peer=PEER,
        ),
        figure(
            "int4-smollm2:disk",
            [costs["int4"]["bytes"] / fp32],
            unit="of the fp32 bytes",
            better="lower",
            target=0.20,
        ),
        figure(
            "int4-smollm2:calibrated",
            [ratio],
            unit="times the perplexity of rounding to nearest, g64",
            better="lower",
            target=1.0,
            peer="int4, ours",
        ),
    ]
    write_figures(Path(__file__).stem, [*figures, *cost_figures("int4-smollm2", costs, fp32)])


if __name__ == "__main__":
    main()
