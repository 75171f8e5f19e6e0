"""The base in bf16 beside fp32: what a processor's bf16 instructions gain by themselves.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/bf16-smollm2.py
"""

from pathlib import Path

from _form import figure, write_figures
from _smollm2 import base_model, measure_speedups


def main() -> None:
    """Time one model in two types."""
    teacher = base_model()
    timed = measure_speedups(teacher.path, teacher, wrap="_wrapped:in_bf16")
    units = {
        "decode": "times fp32",
        "prefill": "times fp32, 128 tokens",
        "prefill512": "times fp32, 512 tokens",
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                f"bf16-smollm2:{name}",
                timed[name],
                unit=unit,
                better="higher",
                target=None,
                peer="the fp32 base, by turns",
            )
            for name, unit in units.items()
        ],
    )


if __name__ == "__main__":
    main()
