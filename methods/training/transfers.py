"""Numbers between the processor and a GPU: copies that nobody waits for, and one wait a step.

A GPU works through a queue. Each number that Python reads from it waits until the queue is empty;
so does each copy of ordinary memory to it. A step therefore reads all its numbers at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: Any) -> Tensor:
    """Return a tensor on a device; a copy to a GPU is queued from pinned memory."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def read_numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Return the values of tensors of one element each, read in a single transfer.

    They are what `float` returns of each: no type is narrowed.
    """
    if not scalars:
        return []
    is_double = any(scalar.dtype == torch.float64 for scalar in scalars)
    dtype = torch.float64 if is_double else torch.float32
    stacked = torch.stack([scalar.detach().to(dtype).reshape(()) for scalar in scalars])
    numbers: list[float] = stacked.cpu().tolist()
    return numbers
