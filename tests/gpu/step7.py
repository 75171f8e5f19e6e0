"""Step 7: compression with calibration on two blocks of a 7B: seconds and peak a block."""

import json
import shutil
import time
from typing import Any

from kit import GIB, Figures, Kit, configuration, parameters_of

BLOCKS = 2
VOCABULARY = 2048  # table and head are not what is measured
METHODS = ("int4-calibrated", "prune-wanda", "prune-sparsegpt", "prune-width", "lowrank", "int8")


def run(kit: Kit) -> None:
    """Run the step's parts."""
    for method in METHODS:
        kit.part(method, lambda method=method: compressed(kit, method), needs=16 * GIB, seconds=50)


def _shape(kit: Kit) -> tuple[int, int, int, int, int, int, bool]:
    hidden, _, heads, key_heads, intermediate, _, _ = kit.shapes["7B"]
    return hidden, BLOCKS, heads, key_heads, intermediate, VOCABULARY, False


def _folder(kit: Kit) -> Any:
    """Return a saved model of two blocks with random weights and the embedded tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.models.checkpoint import describe
    from harness.models.resolve import EMBEDDED

    folder = kit.work / "two-blocks"
    if not (folder / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        with torch.device(kit.device):
            model = AutoModelForCausalLM.from_config(
                configuration("7B", {"7B": _shape(kit)}), dtype=getattr(torch, kit.dtype)
            )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(EMBEDDED / "tiny").save_pretrained(folder)
    return describe(folder, name="two blocks of a 7B")


def _job(kit: Kit, method: str) -> Any:
    import suites
    from harness.contract import Budget, Job
    from harness.data.source import LocalOrHubData

    base, folder = _folder(kit), kit.work / f"compressed-{method}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Job(
        teachers=(base,),
        student=str(base.path),
        student_base=base,
        tasks={"gsm8k-mini": suites.load("gsm8k-mini")},
        source=LocalOrHubData(),
        budget=Budget(seen_tokens=1_000, rows=60 if kit.dry else 2_000),
        seed=0,
        workdir=folder,
        cache=kit.work / "cache",
        device=kit.device,
        dtype=kit.dtype,
    )


def compressed(kit: Kit, method: str) -> Figures:
    """Compress both blocks; return seconds, and the peak on the card in bf16 blocks."""
    import torch

    from harness.catalog import methods
    from harness.machine.memory import baseline_bytes

    job = _job(kit, method)
    built = methods().build(method, _settings(kit, method))
    baseline_bytes(kit.device)
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    student = built.compress(job)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - before
    notes = json.loads((job.workdir / "cost.json").read_text(encoding="utf-8"))["notes"]
    bytes_on_disk = student.bytes_on_disk
    shutil.rmtree(job.workdir)
    hidden = _shape(kit)[0]
    of_blocks = parameters_of("7B", {"7B": _shape(kit)}) - 2 * VOCABULARY * hidden
    item = 2 if kit.dtype == "bfloat16" else 4
    return {
        "seconds a block": round(seconds / BLOCKS, 2),
        "peak in blocks": round(peak / (item * of_blocks / BLOCKS), 2),
        "peak bytes": peak,
        "bytes on disk": bytes_on_disk,
        "base: bytes on disk": job.student_base.bytes_on_disk,
        "notes": notes,
    }


def _settings(kit: Kit, method: str) -> dict[str, Any]:
    """Return few and short calibration texts in a dry run, else the defaults."""
    if not kit.dry or method == "int8":
        return {}
    few = {"num_calibration_samples": 4, "max_seq_length": 16}
    return few | ({"group_size": 32} if method == "int4-calibrated" else {})
