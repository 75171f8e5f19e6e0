"""Quantisation by other libraries: checks before it, error messages, and saving what they packed.

A library that is not installed makes the row skipped, with the command that installs it. Importing
this module imports no torch.
"""

import errno
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError, Skipped
from harness.renames.modules import by_old_name
from methods.compression.base import StudentBuilder

_EXTRAS = {"gptq": "gptq", "auto-round": "autoround"}  # libraries with an extra of their own


def require_package(package: str, extra: str) -> None:
    """Raise `Skipped` where a package, or a package that holds it, is not installed.

    `package` may be dotted, such as `optimum.quanto`; `extra` is our extra that installs it.
    """
    parts = package.split(".")
    parents = (".".join(parts[: count + 1]) for count in range(len(parts)))
    if any(importlib.util.find_spec(parent) is None for parent in parents):
        raise Skipped(
            f"{package} is not installed; type: pip install 'compression-harness[{extra}]'"
        )


def count_matrices(model: Any, method: str) -> int:
    """Count a model's linear layers but for its head: a library must pack all of them.

    Raises `CellFailed` for a model with matrices of another kind. A library would not pack those,
    and would not say so.
    """
    from methods.compression.layers import as_linear, is_unknown_matrix, names_without_numbers

    head = model.get_output_embeddings()
    matrices = [
        module for module in model.modules() if module is not head and as_linear(module) is not None
    ]
    known_ids = {id(module.weight) for module in (*matrices, *([head] if head is not None else []))}
    unknown = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in known_ids and is_unknown_matrix(model, name)
    ]
    if unknown:
        names = ", ".join(names_without_numbers(unknown))
        raise CellFailed(
            f"{method} does not know {names} and would leave them as they are; use int8 or int4 "
            "with ignore"
        )
    return len(matrices)


@contextmanager
def explaining_library_errors(method: str, library: str, base: Checkpoint) -> Iterator[None]:
    """Turn whatever a library raises into a `CellFailed`, the reason that the row shows.

    The reason names the model, the library with its version, and what to type next. Libraries raise
    anything: `SystemExit`, and exceptions of other languages' bindings. Errors of a full memory or
    disk pass unchanged: their own message says how to need less.
    """
    from harness.machine.memory import is_out_of_memory

    try:
        yield
    except (CellFailed, HarnessError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as problem:
        disk_full = isinstance(problem, OSError) and problem.errno == errno.ENOSPC
        if disk_full or is_out_of_memory(problem):
            raise
        raise CellFailed(
            f"{method}: {_library_with_version(library)} failed on {base.name} "
            f"({_exception_text(problem)}); {_next_step(problem, library)}"
        ) from problem


def _library_with_version(library: str) -> str:
    """Return a library's name with its version, or the name alone where it has none."""
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return library


def _exception_text(problem: BaseException) -> str:
    """Return an exception in one line; its class where it has no text or the text itself raises."""
    from harness.errors import in_one_line

    try:
        return in_one_line(problem).removesuffix(": ")
    except Exception:  # noqa: BLE001  an exception's own text may raise
        return type(problem).__name__


def _next_step(problem: BaseException, library: str) -> str:
    """Return what to type next.

    An upgrade may help where a library cannot be imported; nothing helps where it refuses a model.
    """
    if isinstance(problem, ImportError):
        extras = (extra for name, extra in _EXTRAS.items() if name in library)
        extra = next(extras, "quant")
        return (
            f"type: pip install --upgrade 'compression-harness[{extra}]', or use int8 or int4, "
            "which need no library"
        )
    return "use int8 or int4"


def save_library_student(
    builder: StudentBuilder,
    packed: Any,
    notes: dict[str, Any],
    *,
    save: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Save a model that a library packed, and check that it answers the same when opened again.

    Some libraries reload random weights with only a warning. `notes["library"]` names the library.
    `save(folder)` writes the weights where `save_pretrained` cannot. Raises `CellFailed` where the
    logits of the opened student differ.
    """
    from harness.models.checkpoint import weight_files

    library = str(notes["library"])

    def write(folder: Path) -> None:
        with explaining_library_errors(builder.method, library, builder.base):
            if save is not None:
                save(folder)
            else:
                # before anything runs: bitsandbytes reorders its weights for a CPU's kernel
                packed.save_pretrained(folder)
        builder.opened.tokenizer.save_pretrained(folder)
        for path in weight_files(folder):
            _sort_metadata(path)
        with explaining_library_errors(builder.method, library, builder.base):
            logits = _compare_logits(packed, folder)
        gap = float((logits.reopened - logits.packed).abs().max())
        if not gap <= 1e-3 * max(1.0, float(logits.packed.abs().max())):
            raise CellFailed(
                f"{builder.method}: the saved student gives other logits when it is opened again "
                f"(they differ by {gap:.3g}); use int8 or int4"
            )
        size = sum(path.stat().st_size for path in weight_files(folder))
        notes["bits_per_weight"] = builder.bits(size)

    return builder.save_as(write, notes=notes)


class _Logits(NamedTuple):
    """Logits of the same tokens: from the packed model in memory, and opened from its files."""

    packed: Any
    reopened: Any


def _compare_logits(packed: Any, folder: Path) -> _Logits:
    """Run some tokens through the packed model and through the model that `folder` holds."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 35, device=packed.device)[None]
    reopened = AutoModelForCausalLM.from_pretrained(folder, dtype=packed.dtype)
    reopened = reopened.to(packed.device).eval()
    with torch.inference_mode():
        return _Logits(packed(input_ids=ids).logits.float(), reopened(input_ids=ids).logits.float())


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, so that one student always has the same bytes.

    Libraries write it in a random order.
    """
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


__getattr__ = by_old_name(__name__)
