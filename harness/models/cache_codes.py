"""Keys and values as codes of few bits, and back: what a quantized cache stores. Imports torch.

One token's key (or value) in one head is stored by itself, in groups of its channels: no number
depends on another token, so no answer depends on how a text was cut into batches, packs or steps.
int8 is symmetric: `value = code * scale`, codes of -127..127. int4 has an offset, as KIVI's
(Liu et al., 2024): `value = offset + code * scale`, codes of 0..15, two in a byte. Scales and
offsets are float16, rounded outward (scales up, offsets down), so that no number is clipped: in
float32 a value lies within half a scale of the number that it stands for.

Shapes: ... any dimensions, D channels of a head, N groups of them, G channels of a group, C bytes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.models.cache_format import CacheFormat

_MOST_INT8, _MOST_INT4 = 127, 15


class Codes(NamedTuple):
    """What is stored of keys or values."""

    codes: Tensor  # (..., D) int8, or (..., D/2) uint8 of two int4 codes, the first one lowest
    scales: Tensor  # (..., N) float16
    offsets: Tensor | None  # (..., N) float16 of int4; None of int8

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors."""
        parts = (self.codes, self.scales, self.offsets)
        return tuple(part for part in parts if part is not None)


def encode(states: Tensor, cache_format: CacheFormat) -> Codes:
    """Return the codes of keys or values, (..., D)."""
    grouped = states.float().unflatten(-1, (-1, cache_format.group_of(states.shape[-1])))
    if cache_format.bits == 8:
        scales = _half_not_below(grouped.abs().amax(dim=-1) / _MOST_INT8)
        codes = _nearest_codes(grouped, scales).clamp(-_MOST_INT8, _MOST_INT8)
        return Codes(codes.flatten(-2).to(torch.int8), scales, None)
    offsets = _half_not_above(grouped.amin(dim=-1))
    scales = _half_not_below((grouped.amax(dim=-1) - offsets.float()) / _MOST_INT4)
    above = grouped - offsets.float()[..., None]
    codes = _nearest_codes(above, scales).clamp(0, _MOST_INT4).flatten(-2).to(torch.uint8)
    return Codes(codes[..., ::2] | codes[..., 1::2] << 4, scales, offsets)


def decode(stored: Codes, dtype: torch.dtype) -> Tensor:
    """Return the keys or values that codes stand for, (..., D)."""
    codes, groups = stored.codes, stored.scales.shape[-1]
    if stored.offsets is not None:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    grouped = codes.unflatten(-1, (groups, -1)).float() * stored.scales.float()[..., None]
    if stored.offsets is not None:
        grouped = grouped + stored.offsets.float()[..., None]
    return grouped.flatten(-2).to(dtype)


def as_stored(states: Tensor, cache_format: CacheFormat) -> Tensor:
    """Return what a cache gives back for keys or values, (..., D), in their own type.

    Gradients pass as if nothing were rounded (the straight-through estimator of Bengio et al.,
    2013).
    """
    if torch.is_grad_enabled() and states.requires_grad:
        through: Tensor = _StraightThrough.apply(states, cache_format)
        return through
    return decode(encode(states, cache_format), states.dtype)


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Rounds forward, and hands gradients on backward."""

    @staticmethod
    def forward(context: Any, states: Tensor, cache_format: CacheFormat) -> Tensor:
        return decode(encode(states, cache_format), states.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _nearest_codes(grouped: Tensor, scales: Tensor) -> Tensor:
    """Return the nearest code of each number, (..., N, G); 0 in a group whose scale is 0."""
    steps = scales.float()[..., None]
    return (grouped / steps.masked_fill(steps == 0, 1.0)).round()


def _half_not_below(numbers: Tensor) -> Tensor:
    """Return the smallest float16 that is no smaller than each number of 0 or more."""
    halves = numbers.half()
    too_low = halves.float() < numbers
    # the bits of positive floats are ordered as the floats are
    return (halves.view(torch.int16) + too_low.to(torch.int16)).view(torch.float16)


def _half_not_above(numbers: Tensor) -> Tensor:
    """Return the largest float16 that is no larger than each number."""
    halves = numbers.half()
    too_high = halves.float() > numbers
    bits = halves.view(torch.int16)
    # below a positive float are lower bits, below a negative one higher bits, below 0 the smallest
    below = torch.where(halves > 0, bits - 1, bits + 1)
    below = torch.where(halves == 0, torch.full_like(bits, -32767), below)
    return torch.where(too_high, below, bits).view(torch.float16)
