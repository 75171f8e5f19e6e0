"""Cuts of SmolLM2-135M: depth and width by count and speed, zeros by perplexity.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/prune-smollm2.py
"""

from pathlib import Path

from _form import figure, write
from _smollm2 import WINDOWS, base, cost_figures, made, perplexity, speeds, workplace

from harness.arithmetic import parameters_on_disk

PEER = "the fp32 base, by turns"


def main() -> None:
    """Make every student, count, read and time them."""
    teacher = base()
    count = parameters_on_disk(teacher.path)
    figures, costs, read = [], {}, {"windows": WINDOWS, "base": perplexity(teacher.path)}
    with workplace() as folder:
        for name, settings in (("prune-depth", {"ratio": 0.4}), ("prune-width", {"ratio": 0.5, "groups": 1})):
            costs[name] = made(name, settings, folder / name)
            student = folder / name / "student"
            left = parameters_on_disk(student)
            read[name] = perplexity(student)
            timed = speeds(student, teacher)
            assert costs[name]["told"]["parameters"] == [count, left], "not the count that the formula says"
            smaller = count / left
            details = {"parameters": [count, left], "speed": timed, "perplexity": read, "told": costs[name]["told"]}
            figures.append(
                figure(f"prune-smollm2:{name.removeprefix('prune-')}", [one / smaller for one in timed["decode"]],
                       unit="decode speedup over parameter ratio", better="higher", target=0.9, peer=PEER, details=details)
            )  # fmt: skip
        for name in ("prune-magnitude", "prune-wanda", "prune-sparsegpt"):
            costs[name] = made(name, {}, folder / name)
            read[name] = perplexity(folder / name / "student")
    for name in ("wanda", "sparsegpt"):
        ratio = read[f"prune-{name}"] / read["prune-magnitude"]
        figures.append(
            figure(f"prune-smollm2:{name}", [ratio], unit="times magnitude's perplexity at 50 %", better="lower", target=1.0,
                   peer="prune-magnitude, ours", details=read)
        )  # fmt: skip
    write(Path(__file__).stem, [*figures, *cost_figures("prune-smollm2", costs, 4 * count)])


if __name__ == "__main__":
    main()
