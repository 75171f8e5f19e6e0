"""Int4 weights of SmolLM2-135M beside its fp32 base: bytes, decode, and calibrated rounding against rounding to nearest.

The base was Q4_1 once (groups of 32), so groups of 64 are compared: rounding to nearest in groups of 32 would reproduce it and prove
nothing.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/int4-smollm2.py
"""

from pathlib import Path

from _form import figure, write
from _smollm2 import base, cost_figures, made, perplexity, speeds, workplace

from harness.arithmetic import parameters_on_disk

PEER = "the fp32 base, by turns"


def main() -> None:
    """Make both students, read them, time one: they have one form."""
    teacher = base()
    fp32 = 4 * parameters_on_disk(teacher.path)
    costs, read = {}, {"base": perplexity(teacher.path)}
    with workplace() as folder:
        for label, settings in (("int4", {}), ("int4-calibrated", {}), ("int4-calibrated raw", {"weighting": "raw"})):
            costs[label] = made(label.partition(" ")[0], {"group": 64, **settings}, folder / label)
            read[label] = perplexity(folder / label / "student")
        timed = speeds(folder / "int4" / "student", teacher)
    details = {"perplexity": read, "told": {name: one["told"] for name, one in costs.items()}}
    ratios = {name: read[name] / read["int4"] for name in ("int4-calibrated", "int4-calibrated raw")}
    figures = [
        figure("int4-smollm2:decode", timed["decode"], unit="times fp32", better="higher", target=1.5, peer=PEER, details=details),
        figure("int4-smollm2:prefill", timed["prefill"], unit="times fp32, 128 tokens", better="higher", target=0.7, peer=PEER),
        figure("int4-smollm2:disk", [costs["int4"]["bytes"] / fp32], unit="of the fp32 bytes", better="lower", target=0.20),
        figure("int4-smollm2:calibrated", [ratios["int4-calibrated"]], unit="times the perplexity of rounding to nearest, g64",
               better="lower", target=1.0, peer="int4, ours"),
        figure("int4-smollm2:calibrated-as-published", [ratios["int4-calibrated raw"]],
               unit="times the perplexity of rounding to nearest, g64", better="lower", target=None, peer="int4, ours"),
    ]  # fmt: skip
    write(Path(__file__).stem, [*figures, *cost_figures("int4-smollm2", costs, fp32)])


if __name__ == "__main__":
    main()
