"""How many bits the matrices of a model's blocks take in its files, and how many of their weights
are zero, counted there.
"""

import re
from pathlib import Path
from typing import Any

from harness.models.checkpoint import header_entries, weight_files

_BLOCK = re.compile(r"\.(layers|h|blocks)\.\d+\.")
_ROW_BITS = 64  # of a row's scale and zero, at most, where one is kept for each row
# what a library keeps beside a matrix at most: a code book, its own description
_MATRIX_BYTES = 512


def bits_in_file(base: Path, student: Path) -> tuple[float | None, float]:
    """Return the bits of a weight in the student's packed matrices, and how far a declared number
    may be from them; None: no packed one.

    A packed matrix is one of the base's blocks that has other types or shapes in the student; all
    tensors whose names begin with its module's count, its bias left out. A declared number cannot
    know how wide rows are: it may miss the scale and zero of the narrowest row, and what a library
    keeps beside the smallest matrix.
    """
    before, after = _tensors(base), _tensors(student)
    stored = weights = 0
    narrowest = smallest = 2**62
    for name, entry in before.items():
        if (
            len(entry["shape"]) != 2
            or not _BLOCK.search(name)
            or after.get(name, {}).get("dtype") in ("F32", "F16", "BF16")
        ):
            continue
        module = name.removesuffix("weight")
        own = [
            one
            for other, one in after.items()
            if other.startswith(module) and other != f"{module}bias"
        ]
        # factors in its stead
        if not own or any(other.startswith(f"{module}up.") for other in after):
            continue
        rows, columns = entry["shape"]
        stored += 8 * sum(end - begin for begin, end in (one["data_offsets"] for one in own))
        weights += rows * columns
        narrowest, smallest = min(narrowest, columns), min(smallest, rows * columns)
    if not weights:
        return None, 0.0
    return stored / weights, _ROW_BITS / narrowest + 8 * _MATRIX_BYTES / smallest


def zeros_in_blocks(folder: Path) -> float | None:
    """Return the share of zeros in the float matrices of a model's blocks; None where it
    has none.
    """
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


def _tensors(folder: Path) -> dict[str, Any]:
    return {
        name: entry for path in weight_files(folder) for name, entry in header_entries(path).items()
    }
