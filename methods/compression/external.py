"""Quantisation by other libraries: what is not installed is skipped with the command that installs
it. No torch at import.
"""

import errno
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError, Skipped
from methods.compression.base import StudentBuilder


def require_package(package: str, extra: str) -> None:
    """Raise `Skipped` where a package is missing, or the one that it stands in (optimum.quanto)."""
    parts = package.split(".")
    if any(importlib.util.find_spec(".".join(parts[: at + 1])) is None for at in range(len(parts))):
        raise Skipped(
            f"{package} is not installed; type: pip install 'compression-harness[{extra}]'"
        )


def count_matrices(model: Any, method: str) -> int:
    """Count the matrices that a library shall pack: those of the blocks. Refuses a model with any
    that it would leave out unsaid.
    """
    from methods.compression.layers import as_linear, is_unknown_matrix, names_without_numbers

    head = model.get_output_embeddings()
    matrices = [
        module for module in model.modules() if module is not head and as_linear(module) is not None
    ]
    known = {id(module.weight) for module in (*matrices, *([head] if head is not None else []))}
    strange = [
        name
        for name, one in model.named_parameters()
        if id(one) not in known and is_unknown_matrix(model, name)
    ]
    if strange:
        names = ", ".join(names_without_numbers(strange))
        raise CellFailed(
            f"{method} cannot quantise {names}; use int8 or int4 "
            "with ignore=[...] to leave these weights as floats"
        )
    return len(matrices)


@contextmanager
def explaining_library_errors(method: str, library: str, base: Checkpoint) -> Iterator[None]:
    """Turn whatever a library raises into the row's reason: what it was given, which library of
    which version, what to type next.

    Libraries raise anything, `SystemExit` and exceptions of other languages' bindings included.
    What says that memory or disk is full goes on as it is: the row's reason names what makes that
    smaller.
    """
    from harness.machine.memory import is_out_of_memory

    try:
        yield
    except (CellFailed, HarnessError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as problem:
        full = isinstance(problem, OSError) and problem.errno == errno.ENOSPC
        if full or is_out_of_memory(problem):
            raise
        raise CellFailed(
            f"{method}: {_library_with_version(library)} failed on {base.name} "
            f"({_exception_text(problem)}); {_next_step(problem, library)}"
        ) from problem


def _library_with_version(library: str) -> str:
    """Return a library with its version, where that is known."""
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return library


def _exception_text(problem: BaseException) -> str:
    """Say what was raised in one line, also where an exception has no text or cannot be written."""
    from harness.errors import in_one_line

    try:
        return in_one_line(problem).removesuffix(": ")
    except Exception:  # noqa: BLE001  an exception's own text may raise
        return type(problem).__name__


def _next_step(problem: BaseException, library: str) -> str:
    """Say what to type next: a library that cannot be imported may be mended, a model that it
    refuses cannot.
    """
    if isinstance(problem, ImportError):
        extra = "gptq" if "gptq" in library else "quant"
        return (
            f"type: pip install --upgrade 'compression-harness[{extra}]', or use int8 or int4, "
            "which need no library"
        )
    return "use int8 or int4"


def save_library_student(
    making: StudentBuilder,
    packed: Any,
    told: dict[str, Any],
    *,
    save: Callable[[Any], None] | None = None,
) -> Checkpoint:
    """Save a model that a library packed, and compare what a fresh opening answers with what it
    answered before.

    Some libraries reload random weights with no more than a warning. `told` names the library.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from harness.models.checkpoint import weight_files

    ids = torch.arange(3, 35, device=packed.device)[None]
    library = str(told["library"])

    def write(fresh: Any) -> None:
        with explaining_library_errors(making.method, library, making.base):
            if save is not None:
                save(fresh)
            else:
                # before anything is run: bitsandbytes lays its weights out anew for a CPU's kernel
                packed.save_pretrained(fresh)
        making.opened.tokenizer.save_pretrained(fresh)
        for path in weight_files(fresh):
            _sort_metadata(path)

        def answers() -> tuple[Any, Any]:
            again = (
                AutoModelForCausalLM.from_pretrained(fresh, dtype=packed.dtype)
                .to(packed.device)
                .eval()
            )
            with torch.inference_mode():
                return packed(input_ids=ids).logits.float(), again(input_ids=ids).logits.float()

        with explaining_library_errors(making.method, library, making.base):
            before, after = answers()
        gap = float((after - before).abs().max())
        if not gap <= 1e-3 * max(1.0, float(before.abs().max())):
            raise CellFailed(
                f"{making.method}: the saved student answers otherwise when it is opened again "
                f"(logits differ by {gap:.3g})"
            )

        told["bits_per_weight"] = making.bits(
            sum(path.stat().st_size for path in weight_files(fresh))
        )

    return making.save_as(write, notes=told)


def _sort_metadata(path: Path) -> None:
    """Sort what a safetensors file notes beside its tensors: it is written in a random order, and
    the same student has the same bytes.
    """
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))
