"""Training in bf16 without a copy in float32: weights, gradients and 8-bit moments of AdamW.

A step of AdamW is often smaller than half the distance of two bf16 numbers, so a weight that is
rounded to the nearest one would never move. torchao's `AdamW8bit` rounds up or down at random, with
odds that make the mean right (stochastic rounding, Zamirai et al., 2020, "Revisiting BFloat16
Training"), and keeps both moments in 8 bits with a scale for each 256 (Dettmers et al., 2022,
"8-bit Optimizers via Block-wise Quantization"). Draws come from torch's own generator, whose state
is saved with the training's.
"""

import importlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.errors import CellFailed, Skipped

_MODULE, OPTIMIZER = "torchao.optim", "AdamW8bit"
_BLOCK = 256  # weights whose moments share a scale
_SLICE = 2**22  # weights of a step at once, where it is not compiled
_C_COMPILERS = ("cc", "gcc", "clang")


def refuse_bf16_training(device: str, label: str) -> None:
    """Raise `Skipped` where torchao is missing, and `CellFailed` for a card without bf16."""
    try:
        importlib.import_module(_MODULE)
    except ImportError as problem:
        raise Skipped(
            f"{label}: torchao is not installed; type: pip install 'compression-harness[bf16]'"
        ) from problem
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CellFailed(
            f"{label}: {torch.cuda.get_device_name(device)} has no bf16; use recipe=full or "
            "recipe=lora"
        )


def optimizer_notes(device: str) -> dict[str, Any]:
    """Return what the record says of the optimizer: library, version, how it ran."""
    return {
        "optimizer": f"torchao {OPTIMIZER} {version('torchao')}",
        "stochastic_rounding": True,
        "optimizer_compiled": can_compile(device),
    }


def can_compile(device: str) -> bool:
    """Tell whether the optimizer's step is compiled: on a GPU, with Triton and a C compiler.

    On a CPU compiling takes half a minute and more for each new process (measured: 34 s for a
    small model), which eager steps of the models that a CPU can train do not cost together.
    """
    if not device.startswith("cuda") or find_spec("triton") is None:
        return False
    return bool(os.environ.get("CC")) or any(map(shutil.which, _C_COMPILERS))


def adamw_8bit(
    groups: Sequence[dict[str, Any]],
    *,
    rate: float,
    betas: tuple[float, float],
    device: str,
) -> torch.optim.Optimizer:
    """Return AdamW with 8-bit moments and stochastic rounding of bf16 weights.

    Its learning rates are tensors, to be filled in place. Without a compiler a step makes some
    forty bytes for each weight that it looks at, so it looks at a few million at a time.
    """
    make = getattr(importlib.import_module(_MODULE), OPTIMIZER)
    options = {"lr": rate, "betas": betas, "bf16_stochastic_round": True}
    if can_compile(device):
        return make(list(groups), **options)
    slices = [[piece for weight in group["params"] for piece in _cut(weight)] for group in groups]
    optimizer = make(
        [
            {**group, "params": [piece.weight for piece in pieces]}
            for group, pieces in zip(groups, slices, strict=True)
        ],
        **options,
    )
    _step_by_slices(optimizer, [piece for pieces in slices for piece in pieces])
    return optimizer


class _Slice(NamedTuple):
    """Some rows of a weight, as a weight of its own that shares its memory."""

    source: nn.Parameter
    rows: slice | None  # None for all of it
    weight: nn.Parameter


def _cut(weight: nn.Parameter) -> Iterator[_Slice]:
    """Yield slices of few rows, cut where blocks of moments end: their scales stay as they are."""
    if weight.numel() <= _SLICE or weight.ndim < 2 or weight.numel() % _BLOCK:
        yield _Slice(weight, None, weight)
        return
    columns = weight.numel() // weight.shape[0]
    step = _BLOCK // math.gcd(columns, _BLOCK)  # rows of complete blocks
    step *= max(1, _SLICE // (columns * step))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield _Slice(weight, rows, nn.Parameter(weight.data[rows]))


def _step_by_slices(optimizer: Any, slices: Sequence[_Slice]) -> None:
    """Let an optimizer of slices step without compiling, by the gradients of what they are of."""
    step = optimizer.step

    @wraps(step)
    def eager_step(*arguments: Any, **options: Any) -> Any:
        for source, rows, weight in slices:
            if rows is not None:
                weight.grad = None if source.grad is None else source.grad[rows]
        with torch.compiler.set_stance("force_eager"):
            return step(*arguments, **options)

    def drop_gradients(set_to_none: bool = True) -> None:
        for source, _, weight in slices:
            source.grad = weight.grad = None

    optimizer.step, optimizer.zero_grad = eager_step, drop_gradients
