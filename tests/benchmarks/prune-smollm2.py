"""Cuts of SmolLM2-135M: depth and width by count and speed, zeros by perplexity.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/prune-smollm2.py
"""

from pathlib import Path
from typing import Any

from _form import figure, write_figures
from _smollm2 import (
    WINDOWS,
    base_model,
    cost_figures,
    make_student,
    measure_speedups,
    perplexity,
    students_folder,
)

from harness.models.shape import parameters_on_disk

PEER = "the fp32 base, by turns"
# Feed-forward channels alone (as Minitron's Llama-3.1 width students keep their heads), and with
# one of three KV groups.
CUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("depth", "prune-depth", {"ratio": 0.4}),
    ("width", "prune-width", {"ratio": 0.5}),
    ("width-and-heads", "prune-width", {"ratio": 0.5, "groups": 1}),
]


def main() -> None:
    """Make every student, count, read and time them."""
    teacher = base_model()
    count = parameters_on_disk(teacher.path)
    figures, costs, read = [], {}, {"windows": WINDOWS, "base": perplexity(teacher.path)}
    with students_folder() as folder:
        for label, name, settings in CUTS:
            costs[label] = make_student(name, settings, folder / label)
            student = folder / label / "student"
            remaining = parameters_on_disk(student)
            read[label] = perplexity(student)
            timed = measure_speedups(student, teacher)
            assert costs[label]["told"]["parameters"] == [count, remaining], (
                "not the count that the formula says"
            )
            smaller = count / remaining
            details = {
                "parameters": [count, remaining],
                "speed": timed,
                "perplexity": read,
                "told": costs[label]["told"],
            }
            figures.append(
                figure(
                    f"prune-smollm2:{label}",
                    [speedup / smaller for speedup in timed["decode"]],
                    unit="decode speedup over parameter ratio",
                    better="higher",
                    target=0.9,
                    peer=PEER,
                    details=details,
                )
            )
        for name in ("prune-magnitude", "prune-wanda", "prune-sparsegpt"):
            costs[name] = make_student(name, {}, folder / name)
            read[name] = perplexity(folder / name / "student")
    for name in ("wanda", "sparsegpt"):
        ratio = read[f"prune-{name}"] / read["prune-magnitude"]
        figures.append(
            figure(
                f"prune-smollm2:{name}",
                [ratio],
                unit="times magnitude's perplexity at 50 %",
                better="lower",
                target=1.0,
                peer="prune-magnitude, ours",
                details=read,
            )
        )
    write_figures(Path(__file__).stem, [*figures, *cost_figures("prune-smollm2", costs, 4 * count)])


if __name__ == "__main__":
    main()
