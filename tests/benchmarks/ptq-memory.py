"""Memory that quantizing needs, in blocks: int8, int4 and GPTQ on a random Llama of true width.

The shape is that of a Llama of 1.1 billion weights (width 2,048, feed-forward 5,632, 22 blocks,
32,000 tokens) with fewer blocks: a block is the unit, and what is measured must not grow with their
number. Its files are in bf16, which a CPU computes in fp32: two units for a block. `gptq-fp32` has
files in fp32; the second moments of GPTQ are in fp32 either way. Peak: the rise of the process's
resident memory while the student is made, over what it holds after its imports and a matrix
product. Token table and head (as the model holds them, in fp32) and the states that enter a block
(fp32) are subtracted.

python tests/benchmarks/ptq-memory.py [BLOCKS] [ROW,ROW]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _form import figure, write_figures

WIDTH, FEED_FORWARD, HEADS, GROUPS, VOCABULARY = 2_048, 5_632, 32, 4, 32_000
SEQUENCES, LENGTH = 16, 256  # of calibration text
_TEXT = {"num_calibration_samples": SEQUENCES, "max_seq_length": LENGTH}
ROWS = {  # the method, its settings, the type of the files
    "int8": ("int8", {}, "bfloat16"),
    "int4": ("int4", {}, "bfloat16"),
    "gptq": ("int4-calibrated", _TEXT, "bfloat16"),
    "gptq-fp32": ("int4-calibrated", _TEXT, "float32"),
}


def save_model(folder: Path, blocks: int, dtype: str) -> dict[str, int]:
    """Save the model; return the bytes of a block, and those of table and head in fp32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from harness.models.resolve import EMBEDDED

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=2_048,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "tiny").save_pretrained(folder)
    block = sum(weight.numel() for weight in model.model.layers[0].parameters())
    outside = 2 * model.model.embed_tokens.weight.numel()
    item = model.dtype.itemsize
    return {"block": item * block, "outside": 4 * outside, "weights": model.num_parameters()}


def rise_of(row: str, folder: Path, whole: bool) -> int:
    """Make a student in this process; return how far its peak lies over what it held before."""
    import torch

    import harness.models.blockwise as blockwise
    import methods
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData
    from harness.machine.memory import baseline_bytes, process_bytes, reset_peak
    from harness.models.checkpoint import describe
    from harness.registry import Registry

    name, settings, dtype = ROWS[row]
    base = describe(folder / dtype, name="random")
    task = suites.load("gsm8k-mini")
    if whole:
        blockwise.open_blockwise = lambda *_, **__: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        job = Job(
            teachers=(base,),
            student=str(base.path),
            student_base=base,
            tasks={"gsm8k-mini": task},
            source=LocalOrHubData(),
            budget=Budget(seen_tokens=1_000, rows=200),
            seed=1,
            workdir=Path(workdir),
            cache=folder / "cache",
        )
        method = Registry("method", methods.METHODS).build(name, settings)
        _import_all(method, folder)
        torch.randn(1_024, 1_024) @ torch.randn(1_024, 1_024)
        rest = baseline_bytes("cpu")["resident"]
        if not reset_peak():
            raise SystemExit("the peak of this process cannot be reset here")
        method.compress(job)
        return (process_bytes("VmHWM") or 0) - rest


def _import_all(method: object, folder: Path) -> None:
    """Import what the method imports, by a student of a model of two small blocks."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData
    from harness.models.checkpoint import describe
    from harness.models.resolve import EMBEDDED

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    config = LlamaConfig(
        vocab_size=1_024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with tempfile.TemporaryDirectory(dir=folder) as small:
        LlamaForCausalLM(config).save_pretrained(f"{small}/base")
        tokenizer.save_pretrained(f"{small}/base")
        base = describe(Path(small) / "base", name="small")
        method.compress(  # type: ignore[attr-defined]
            Job(
                teachers=(base,),
                student=str(base.path),
                student_base=base,
                tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
                source=LocalOrHubData(),
                budget=Budget(seen_tokens=1_000, rows=200),
                seed=1,
                workdir=Path(small),
                cache=folder / "cache",
            )
        )


def main() -> None:
    """Measure every row, each in a process of its own."""
    if sys.argv[1:2] == ["--rise"]:
        print(json.dumps(rise_of(sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "whole")))
        return
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rows = sys.argv[2].split(",") if len(sys.argv) > 2 else list(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        figures = [figure_of(row, Path(folder), blocks) for row in rows]
    write_figures("ptq-memory", figures)


def figure_of(row: str, folder: Path, blocks: int) -> dict[str, object]:
    """Measure a row block by block, and with the model opened whole."""
    dtype = ROWS[row][2]
    sizes = json.loads(_elsewhere("--save", str(folder / dtype), str(blocks), dtype))
    rises = {
        way: int(_elsewhere("--rise", row, str(folder), way)) for way in ("blockwise", "whole")
    }
    states = SEQUENCES * LENGTH * WIDTH * 4 if row.startswith("gptq") else 0
    apart = sizes["outside"] + states
    in_blocks = {way: (rise - apart) / sizes["block"] for way, rise in rises.items()}
    details = {
        **sizes,
        "blocks": blocks,
        "states": states,
        "rise_bytes": rises,
        "opened_whole": round(in_blocks["whole"], 2),
    }
    return figure(
        f"ptq-memory:{row}",
        [in_blocks["blockwise"]],
        unit=f"blocks of the model, in {dtype}",
        better="lower",
        target=3.0,
        details=details,
    )


def _elsewhere(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2_000:])
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--save"]:
        print(json.dumps(save_model(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    else:
        main()
