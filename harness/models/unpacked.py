"""Keeps packed weights unpacked on a GPU while a call computes many rows with them.

Scoring decodes hundreds of rows for hundreds of steps. Unpacking every weight in every step costs
more than the step itself; unpacked once, a step costs what it costs for a plain bf16 model. Only
scoring does this, and gives the memory back at the end: timing and weighing see packed weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.machine.memory import free_bytes, is_out_of_memory
from harness.models.language_model import LanguageModel

KEPT_DEVICES = ("cuda",)  # kinds of devices
_MEMORY_SHARE = 0.4  # of the free memory: keys and values, activations and logits need the rest


@contextmanager
def unpacked_once(opened: LanguageModel) -> Iterator[None]:
    """Keep a packed model's weights unpacked inside the block, where there is room for them.

    Products of many rows are the same to the last bit as with weights unpacked for each call.
    """
    layers = _packed_layers(opened)
    free = free_bytes(opened.device) if layers else None
    needed = sum(2 * layer.in_features * layer.out_features for layer in layers)
    is_kept = bool(layers) and (free is None or needed <= _MEMORY_SHARE * free)
    try:
        if is_kept:
            _unpack(layers)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("kept", None)


def _packed_layers(opened: LanguageModel) -> list[Any]:
    """Return the layers whose products unpack their weights, on a device that keeps them."""
    if opened.device.partition(":")[0] not in KEPT_DEVICES:
        return []
    from harness.models import packed

    modules = list(opened.model.modules())
    # a table of which no head reads looks its vectors up, and multiplies with nothing
    tables = [module.table[0] for module in modules if isinstance(module, packed.TiedHead)]
    without_product = (packed.Int8DynamicLinear, packed.Int8Embedding)
    linear = [
        module
        for module in modules
        if isinstance(module, packed.Int8Linear | packed.Int4Linear)
        and not isinstance(module, without_product)
    ]
    # those of a block around this one are left to it
    return [layer for layer in (*linear, *tables) if "kept" not in layer.__dict__]


def _unpack(layers: list[Any]) -> None:
    """Unpack layer by layer, until memory ends: the others unpack for each call, as always."""
    import torch

    with torch.inference_mode():
        for layer in layers:
            try:
                weight = layer.unpacked()
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                return
            if weight is not None:
                layer.kept = weight
