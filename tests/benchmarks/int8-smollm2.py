"""Int8 weights, without and with int8 activations, of SmolLM2-135M beside its fp32 base.

Speed, bytes and perplexity are measured.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/int8-smollm2.py
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
    """Make both students, read them, time them."""
    teacher = base_model()
    fp32 = 4 * parameters_on_disk(teacher.path)
    reference = perplexity(teacher.path)
    figures, costs = [], {}
    with students_folder() as folder:
        for name, targets in (
            ("int8", (1.7, 1.0, 0.30, 1.01)),
            ("int8-dynamic", (1.3, 1.2, 0.30, 1.15)),
        ):
            costs[name] = make_student(name, {}, folder / name)
            student = folder / name / "student"
            read, timed = perplexity(student), measure_speedups(student, teacher)
            mark = "int8-smollm2:" if name == "int8" else "int8-smollm2:dynamic-"
            details = {"perplexity": [reference, read], "told": costs[name]["told"]}
            figures += [
                figure(
                    f"{mark}decode",
                    timed["decode"],
                    unit="times fp32",
                    better="higher",
                    target=targets[0],
                    peer=PEER,
                    details=details,
                ),
                figure(
                    f"{mark}prefill",
                    timed["prefill"],
                    unit="times fp32, 128 tokens",
                    better="higher",
                    target=targets[1],
                    peer=PEER,
                ),
                figure(
                    f"{mark}prefill512",
                    timed["prefill512"],
                    unit="times fp32, 512 tokens",
                    better="higher",
                    target=targets[1],
                    peer=PEER,
                ),
                figure(
                    f"{mark}disk",
                    [costs[name]["bytes"] / fp32],
                    unit="of the fp32 bytes",
                    better="lower",
                    target=targets[2],
                ),
                figure(
                    f"{mark}perplexity",
                    [read / reference],
                    unit="times the base's",
                    better="lower",
                    target=targets[3],
                ),
            ]
    write_figures(Path(__file__).stem, [*figures, *cost_figures("int8-smollm2", costs, fp32)])


if __name__ == "__main__":
    main()
