"""Counts the bits and the zeros of the matrices in a model's blocks, in its files."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from harness.models.checkpoint import header_entries, weight_files

# kinds of packed layers, as students' configurations name them
INT4_KINDS = ("int4",)
INT8_KINDS = ("int8", "int8-dynamic")
WITH_INT8_ACTIVATIONS = ("int8-dynamic",)
_BLOCK = re.compile(r"\.(layers|h|blocks)\.\d+\.")
_MAX_ROW_BITS = 64  # of the scale and zero of one row
# beside one matrix: a library's code book, its description of the matrix
_MAX_MATRIX_BYTES = 512


class FileBits(NamedTuple):
    """Bits of a weight in packed matrices."""

    bits: float | None  # None where no matrix is packed
    tolerance: float  # by how much a declared number may differ


def bits_in_file(base: Path, student: Path) -> FileBits:
    """Return the bits of a weight in a student's packed matrices, as its files hold them.

    A packed matrix is one of the base's blocks that has another type or shape in the student. All
    tensors whose names begin with its module's count, except its bias. A declared number of bits
    cannot know how wide rows are: it may miss the scale and zero of the narrowest row, and what a
    library keeps beside the smallest matrix. That is the tolerance.
    """
    base_entries, entries = _entries(base), _entries(student)
    stored_bits = weights = 0
    fewest_columns = fewest_weights = 2**62
    for name, base_entry in base_entries.items():
        is_float = entries.get(name, {}).get("dtype") in ("F32", "F16", "BF16")
        if len(base_entry["shape"]) != 2 or not _BLOCK.search(name) or is_float:
            continue
        module = name.removesuffix("weight")
        offsets = [
            entry["data_offsets"]
            for tensor, entry in entries.items()
            if tensor.startswith(module) and tensor != f"{module}bias"
        ]
        is_factored = any(tensor.startswith(f"{module}up.") for tensor in entries)
        if not offsets or is_factored:
            continue
        rows, columns = base_entry["shape"]
        stored_bits += 8 * sum(end - begin for begin, end in offsets)
        weights += rows * columns
        fewest_columns = min(fewest_columns, columns)
        fewest_weights = min(fewest_weights, rows * columns)
    if not weights:
        return FileBits(None, 0.0)
    tolerance = _MAX_ROW_BITS / fewest_columns + 8 * _MAX_MATRIX_BYTES / fewest_weights
    return FileBits(stored_bits / weights, tolerance)


def zeros_in_blocks(folder: Path) -> float | None:
    """Return the share of zeros in the float matrices of a model's blocks, None if it has none."""
    from safetensors import safe_open

    zeros = count = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                tensor = opened.get_tensor(name)
                if tensor.ndim == 2 and tensor.is_floating_point() and _BLOCK.search(name):
                    zeros += int((tensor == 0).sum())
                    count += tensor.numel()
    return zeros / count if count else None


def _entries(folder: Path) -> dict[str, Any]:
    return {
        name: entry for path in weight_files(folder) for name, entry in header_entries(path).items()
    }
