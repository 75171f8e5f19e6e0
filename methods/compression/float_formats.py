"""Rounding weights to small floats: FP8, NVFP4 and MXFP4, with their scales, as fp32 values.

Each function returns what the stored numbers stand for, (O, I) in fp32, and nothing packed. The
elements are E4M3 (OCP 8-bit floating point, 2023: 4 bits of exponent, 3 of mantissa, at most 448)
or E2M1 (OCP Microscaling Formats v1.0, section 5.3.3: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives). Rounding is to nearest, ties to the even code, and what is too large becomes the largest
element. Legend: O outputs, I inputs, N blocks of inputs that share a scale, B inputs of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from harness.models.packed import row_parts

E2M1_LARGEST = 6.0
E4M3_LARGEST = 448.0
E4M3_SMALLEST_NORMAL = 2.0**-6
_E2M1_LARGEST_EXPONENT = 2  # of 4, the largest power of two of E2M1
_E8M0_EXPONENTS = (-127, 127)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Return the nearest values of E2M1, ties to the even code; beyond 6 that is 6."""
    magnitude = values.abs().clamp(max=E2M1_LARGEST)
    # the elements are halves up to 2, ones up to 4, and twos up to 6
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    # torch.round takes ties to the even multiple of a step, which is the even code
    return (torch.round(magnitude / step) * step).copysign(values)


def round_to_e4m3(values: Tensor) -> Tensor:
    """Return the nearest values of E4M3, ties to the even code; beyond 448 that is 448."""
    clipped = values.clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return clipped.to(torch.float8_e4m3fn).to(torch.float32)


def fp8_values(weight_OI: Tensor) -> Tensor:
    """Return what E4M3 with an fp32 scale for each output channel stands for, (O, I).

    The scale takes the largest magnitude of a channel to 448; a channel of zeros stays zero.
    """

    def of_rows(rows: Tensor) -> Tensor:
        largest = rows.abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest / E4M3_LARGEST)
        return round_to_e4m3(rows / scale) * scale

    return _by_rows(weight_OI, of_rows)


def nvfp4_values(weight_OI: Tensor) -> Tensor:
    """Return what NVFP4 stands for, (O, I): E2M1 in blocks of 16, two levels of scales.

    The matrix has one fp32 scale, that takes the largest block scale to E4M3's 448. A block's scale
    takes its largest magnitude to 6, and is itself rounded to E4M3, above 0. Source: NVIDIA,
    Pretraining Large Language Models with NVFP4 (2025), appendix B; the blocks are of inputs.
    """
    tensor_scale = weight_OI.abs().amax().float() / (E4M3_LARGEST * E2M1_LARGEST)
    if tensor_scale == 0:
        return torch.zeros_like(weight_OI, dtype=torch.float32)

    def of_blocks(blocks_ONB: Tensor) -> Tensor:
        largest = blocks_ONB.abs().amax(dim=-1, keepdim=True)
        stored = (largest / E2M1_LARGEST / tensor_scale).clamp(min=E4M3_SMALLEST_NORMAL)
        scale = round_to_e4m3(stored) * tensor_scale
        return round_to_e2m1(blocks_ONB / scale) * scale

    return _by_blocks(weight_OI, 16, of_blocks)


def mxfp4_values(weight_OI: Tensor) -> Tensor:
    """Return what MXFP4 stands for, (O, I): E2M1 in blocks of 32, scales that are powers of two.

    A block's scale is the largest power of two that is not above its largest magnitude, divided by
    E2M1's own largest, 4 (OCP Microscaling Formats v1.0, section 6.3). So magnitudes up to 8 scales
    occur, and those above 6 become 6.
    """

    def of_blocks(blocks_ONB: Tensor) -> Tensor:
        largest = blocks_ONB.abs().amax(dim=-1, keepdim=True)
        # frexp: largest = mantissa * 2^exponent with 0.5 <= mantissa < 1, exact where log2 is not
        exponent = torch.frexp(largest).exponent - 1 - _E2M1_LARGEST_EXPONENT
        exponent = torch.where(largest == 0, _E8M0_EXPONENTS[0], exponent).clamp(*_E8M0_EXPONENTS)
        scale = torch.ldexp(torch.ones_like(largest), exponent)
        return round_to_e2m1(blocks_ONB / scale) * scale

    return _by_blocks(weight_OI, 32, of_blocks)


def _by_rows(weight_OI: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a rounded matrix in fp32, some rows at a time: copies of a whole one cost memory."""
    values = torch.empty(weight_OI.shape, dtype=torch.float32, device=weight_OI.device)
    for part in row_parts(*weight_OI.shape):
        values[part] = rounded(weight_OI[part].float())
    return values


def _by_blocks(weight_OI: Tensor, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a matrix rounded in blocks of `size` inputs; the last one is filled up with zeros."""
    inputs = weight_OI.shape[1]

    def of_rows(rows: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(rows, (0, -inputs % size))
        return rounded(padded.unflatten(1, (-1, size))).flatten(1)[:, :inputs]

    return _by_rows(weight_OI, of_rows)
