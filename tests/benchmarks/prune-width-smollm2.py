"""Width cuts of SmolLM2-135M at the default ratio, without and with one of three KV groups.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/prune-width-smollm2.py
"""

from pathlib import Path
from typing import Any

from _form import figure, write_figures
from _smollm2 import base_model, make_student, measure_speedups, students_folder

from harness.models.shape import parameters_on_disk

CUTS: list[tuple[str, dict[str, Any]]] = [("channels", {}), ("channels-and-heads", {"groups": 1})]


def main() -> None:
    """Make both students, count and time them."""
    teacher = base_model()
    count = parameters_on_disk(teacher.path)
    figures = []
    with students_folder() as folder:
        for label, settings in CUTS:
            notes = make_student("prune-width", settings, folder / label)["told"]
            student = folder / label / "student"
            remaining = parameters_on_disk(student)
            assert notes["parameters"] == [count, remaining], "not the count that the formula says"
            timed = measure_speedups(student, teacher)
            figures.append(
                figure(
                    f"prune-width-smollm2:{label}",
                    [speedup * remaining / count for speedup in timed["decode"]],
                    unit="decode speedup over parameter ratio",
                    better="higher",
                    target=0.9,
                    peer="the fp32 base, by turns",
                    details={"parameters": [count, remaining], "speed": timed},
                )
            )
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
