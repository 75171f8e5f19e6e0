"""Quantisation by other libraries: what is not installed is skipped with the command that installs it. No torch at import."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.contract import Checkpoint
from harness.errors import Skipped
from methods._compress import Making


def require(package: str, extra: str) -> None:
    """Raise `Skipped` where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed; type: pip install 'compression-harness[{extra}]'")


def matrices_of(model: Any, method: str) -> int:
    """Count the matrices that a library shall pack: those of the blocks. Refuses a model with any that it would leave out unsaid."""
    from harness.errors import CellFailed
    from methods._layers import is_stranger, seen_as_linear, short_names

    head = model.get_output_embeddings()
    matrices = [module for module in model.modules() if module is not head and seen_as_linear(module) is not None]
    known = {id(module.weight) for module in (*matrices, *([head] if head is not None else []))}
    strange = [name for name, one in model.named_parameters() if id(one) not in known and is_stranger(model, name)]
    if strange:
        raise CellFailed(
            f"{method} does not know {', '.join(short_names(strange))}, which would stay as they are unsaid; use int8 or int4 with skip"
        )
    return len(matrices)


def packed_by_library(method: str, pack: Callable[[], Any]) -> Any:
    """Let a library pack a model; what it raises on a model that it does not take becomes the row's reason."""
    from harness.errors import CellFailed, in_one_line

    try:
        return pack()
    except (NotImplementedError, AttributeError, RuntimeError, TypeError, ValueError, KeyError) as problem:
        raise CellFailed(f"{method}: the library does not take this model ({in_one_line(problem)}); use int8 or int4") from problem


def written_by(making: Making, packed: Any, told: dict[str, Any], *, save: Callable[[Any], None] | None = None) -> Checkpoint:
    """Save a model that a library packed, and compare what a fresh opening answers with what it answered before.

    Some libraries reload random weights with no more than a warning.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from harness.checkpoint import weight_files
    from harness.errors import CellFailed

    ids = torch.arange(3, 35, device=packed.device)[None]

    def write(fresh: Any) -> None:
        if save is not None:
            save(fresh)
        else:
            packed.save_pretrained(fresh)  # before anything is run: bitsandbytes lays its weights out anew for a CPU's kernel
        making.opened.tokenizer.save_pretrained(fresh)
        for path in weight_files(fresh):
            _in_order(path)

        def answers() -> tuple[Any, Any]:
            again = AutoModelForCausalLM.from_pretrained(fresh, dtype=packed.dtype).to(packed.device).eval()
            with torch.inference_mode():
                return packed(input_ids=ids).logits.float(), again(input_ids=ids).logits.float()

        before, after = packed_by_library(making.method, answers)
        gap = float((after - before).abs().max())
        if not gap <= 1e-3 * max(1.0, float(before.abs().max())):
            raise CellFailed(f"{making.method}: the saved student answers otherwise when it is opened again (logits differ by {gap:.3g})")

        told["bits_per_weight"] = making.bits(sum(path.stat().st_size for path in weight_files(fresh)))

    return making.save_as(write, notes=told)


def _in_order(path: Path) -> None:
    """Sort what a safetensors file notes beside its tensors: it is written in a random order, and the same student has the same bytes."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))
