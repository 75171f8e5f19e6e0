"""Perplexity of int8 SmolLM2-135M by the kernel that decodes.

Windows of text have many rows, which another kernel multiplies.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/int8-few-rows.py
"""

from pathlib import Path

from _form import figure, write_figures
from _smollm2 import WINDOWS, base_model, make_student, perplexity, students_folder


def main() -> None:
    """Make the student, read the text three times: base, many rows, few rows."""
    teacher = base_model()
    with students_folder() as folder:
        make_student("int8", {}, folder / "int8")
        student = folder / "int8" / "student"
        read = {
            "windows": WINDOWS,
            "base": perplexity(teacher.path),
            "many rows": perplexity(student),
            "few rows": perplexity(student, by_the_kernel_that_decodes=True),
        }
    ratio = read["few rows"] / read["base"]
    result = figure(
        "int8-few-rows",
        [ratio],
        unit="times the base's perplexity",
        better="lower",
        target=1.01,
        peer="the fp32 base",
        details=read,
    )
    write_figures(Path(__file__).stem, [result])


if __name__ == "__main__":
    main()
