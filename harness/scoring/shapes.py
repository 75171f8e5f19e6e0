"""Bounds how many shapes attention meets on a GPU, and chooses kernels that need no plan for each.

From torch 2.10 on cuDNN's attention plans every shape that it has not met, on cards of capability
9.0 for some tenths of a second each. Packs of questions have hundreds of widths, and answers grow
by a token at every step. So on a GPU widths are rounded up, and scoring leaves cuDNN's attention
out: torch's other kernels take any shape as it comes. A mask whose rows are multiples of 16 numbers
is read in place by those, where any other is copied in every layer.

On a CPU nothing is rounded: a wider row costs as much as it is wider. No torch at import.
"""

from collections.abc import Iterator
from contextlib import contextmanager

WIDTH_STEP = 64  # the smallest; a warp's tiles are of 16 to 128 tokens
_STEPS_PER_DOUBLING = 8  # of wider rows: at most an eighth is padding
ROWS_STEP = 8
ROUNDED_DEVICES = ("cuda",)  # kinds of devices
# Whether scoring on a GPU may use cuDNN's attention; the verification program compares both.
MAY_PLAN = False


def rounded_width(tokens: int, device: str) -> int:
    """Return how wide to make a row of so many tokens on a device; never narrower.

    A GPU's widths are multiples of 64 up to 1,024, and above that one of eight in each doubling:
    32 widths up to 4,096 tokens.
    """
    if device.partition(":")[0] not in ROUNDED_DEVICES or tokens == 0:
        return tokens
    doubling = 1 << (tokens - 1).bit_length()  # the power of two that is not smaller
    step = max(WIDTH_STEP, doubling // (2 * _STEPS_PER_DOUBLING))
    return -(-tokens // step) * step


def rounded_rows(rows: int, device: str) -> int:
    """Return how many rows to run side by side for so many: a multiple of 8 on a GPU."""
    if device.partition(":")[0] not in ROUNDED_DEVICES:
        return rows
    return -(-rows // ROWS_STEP) * ROWS_STEP


@contextmanager
def without_planning(device: str) -> Iterator[None]:
    """Leave cuDNN's attention out on a GPU inside the block; restore the choice afterwards."""
    import torch

    if not device.startswith("cuda") or MAY_PLAN:
        yield
        return
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
