"""Rounding weights to few bits: formulas, error-compensated rounding, and the way from codes to a
packed checkpoint.

Legend: O outputs, I inputs, G groups of inputs. Scales are rounded to bf16 *before* weights are
rounded to them, so that no later change of a float's type changes what a code stands for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.errors import CellFailed
from harness.models.packed import pack_nibbles


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in integers: `w_hat = scale * (codes - zero)`, group by group of inputs."""

    codes: Tensor  # (O, I): -127..127 of int8, or 0..15
    scale: Tensor  # (O, G) in bf16
    zero: Tensor  # (O, G), integers as floats
    group: int

    def dequantized(self) -> Tensor:
        """Return w_hat, (O, I) in fp32."""
        width = self.codes.shape[1]
        scale, zero = (
            one.float().repeat_interleave(self.group, dim=1)[:, :width]
            for one in (self.scale, self.zero)
        )
        return scale * (self.codes.float() - zero)


def quantization_grid(w: Tensor, *, bits: int, group: int, zeros: bool) -> tuple[Tensor, Tensor]:
    """Return (scale in bf16, zero as integers), each (O, G), of a matrix's groups by their
    extremes.

    Symmetric: scale = max|w| / (2^(b-1) - 1), zero in the middle. Asymmetric: the range widened to
    hold 0, scale = (max - min) / (2^b - 1), zero = round(-min / scale): 0 stays exactly 0 either
    way.
    """
    padded = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % group))
    groups = padded.view(w.shape[0], -1, group)
    if zeros:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = _bf16_without_zeros((high - low) / (2**bits - 1))
        return scale, torch.round(-low / scale.float()).clamp(0, 2**bits - 1)
    scale = _bf16_without_zeros(groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
    return scale, torch.full_like(
        scale, 0.0 if bits == 8 else float(2 ** (bits - 1)), dtype=torch.float32
    )


def _bf16_without_zeros(scale: Tensor) -> Tensor:
    rounded = scale.to(torch.bfloat16)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def nearest_codes(w: Tensor, scale: Tensor, zero: Tensor, *, bits: int, zeros: bool) -> Tensor:
    """Return the codes of columns (O, n) under one scale and zero a row, (O,) each: the nearest,
    clamped to what the bits hold.
    """
    if bits == 8:
        return torch.round(w / scale[:, None]).clamp_(-127, 127)
    lowest = 0 if zeros else 1  # symmetric codes leave the lowest one out: -7..7
    return (torch.round(w / scale[:, None]) + zero[:, None]).clamp_(lowest, 2**bits - 1)


def round_to_nearest(
    w: Tensor, *, bits: int, group: int = 0, zeros: bool = False
) -> QuantizedMatrix:
    """Round every weight to the nearest code (RTN): the floor that a calibrated method must beat.
    group 0: the whole row.
    """
    w = w.float()
    group = group or w.shape[1]
    scale, zero = quantization_grid(w, bits=bits, group=group, zeros=zeros)
    codes = torch.cat(
        [
            nearest_codes(part, scale[:, at].float(), zero[:, at], bits=bits, zeros=zeros)
            for at, part in enumerate(w.split(group, dim=1))
        ],
        dim=1,
    )
    return QuantizedMatrix(codes.to(torch.int8), scale, zero, group)


def inverse_cholesky(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return (upper Cholesky factor of the inverse of H, inputs that were always 0), H = X^T X +
    damp * mean(diag) I.

    Row i of the factor, divided by its diagonal, says how an error in weight i is best made up for
    by the weights after it (Frantar et al., 2023, GPTQ, section 3.3). Jitter grows until the
    factorisation exists.
    """
    h = gram.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    mean = h.diagonal().mean()
    for _ in range(6):
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        lower, problem = torch.linalg.cholesky_ex(damped)
        if int(problem) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, problem = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(problem) == 0:
                return upper, dead
        damp *= 10
    raise CellFailed(
        "what flows into a layer has no second moments that can be inverted (is a number in it not "
        "finite?)"
    )


def round_with_gptq(
    w: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group: int = 0,
    zeros: bool = False,
    damp: float = 0.01,
    columns: int = 128,
    stays: Tensor | None = None,
) -> QuantizedMatrix:
    """Round column by column, each error made up for in the columns after it (GPTQ; Frantar et al.,
    2023).

    A group's scale is taken when its first column comes, from the weights as they are by then.
    Where `stays` (O, I) is false a weight was pruned: it stays zero and takes up no error of
    others.
    """
    w = w.float().clone()
    wide = w.shape[1]
    group = group or wide
    factor, dead = inverse_cholesky(gram, damp)
    w[:, dead] = 0
    codes = torch.empty_like(w)
    scales, zero_points = [], []
    for start in range(0, wide, columns):
        stop = min(start + columns, wide)
        part, inside = w[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for at in range(stop - start):
            if (start + at) % group == 0:
                ahead = (
                    w[:, start + at : start + at + group]
                    if start + at + group <= stop
                    else _group_ahead(w, factor, errors, start, at, group)
                )
                ahead = (
                    ahead if stays is None else ahead * stays[:, start + at : start + at + group]
                )
                scale, zero = quantization_grid(ahead, bits=bits, group=ahead.shape[1], zeros=zeros)
                scales.append(scale)
                zero_points.append(zero)
            column, spread = part[:, at], inside[at, at]
            code = nearest_codes(
                column[:, None],
                scales[-1][:, 0].float(),
                zero_points[-1][:, 0],
                bits=bits,
                zeros=zeros,
            )
            codes[:, start + at] = code[:, 0]
            value = scales[-1][:, 0].float() * (code[:, 0] - zero_points[-1][:, 0])
            errors[:, at] = (column - value) / spread
            part[:, at + 1 :] -= errors[:, at : at + 1] * inside[at : at + 1, at + 1 :]
            if stays is not None:
                part[:, at + 1 :] *= stays[:, start + at + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        if stays is not None:
            w[:, stop:] *= stays[:, stop:]
    return QuantizedMatrix(
        codes.to(torch.int8), torch.cat(scales, 1), torch.cat(zero_points, 1), group
    )


def _group_ahead(
    w: Tensor, factor: Tensor, errors: Tensor, start: int, at: int, group: int
) -> Tensor:
    """Return a group's weights where it reaches past the columns being worked on: those do not know
    this part's errors yet.
    """
    stop = min(start + at + group, w.shape[1])
    ahead = w[:, start + at : stop].clone()
    behind = errors.shape[1] - at  # columns of the group that this part holds, corrected already
    ahead[:, behind:] -= errors[:, :at] @ factor[start : start + at, start + errors.shape[1] : stop]
    return ahead


def packed_layer(
    name: str, found: QuantizedMatrix, bias: Tensor | None, *, kind: str, **more: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a module's line of `config.json` and its tensors by full name."""
    shape = [int(one) for one in found.codes.shape]
    spec: dict[str, Any] = {"kind": kind, "shape": shape, **more}
    tensors = {f"{name}.scale": found.scale}
    if kind == "int4":
        zeros = bool((found.zero != 8).any())
        spec |= {"group": found.group, **({"zeros": True} if zeros else {})}
        tensors[f"{name}.weight"] = pack_nibbles(found.codes)
        if zeros:
            tensors[f"{name}.zero"] = pack_nibbles(found.zero.to(torch.uint8))
    else:
        tensors[f"{name}.weight"] = found.codes[..., None]
        tensors[f"{name}.scale"] = found.scale[:, 0]
    if bias is not None:
        spec["bias"] = True
        tensors[f"{name}.bias"] = bias.detach()
    return spec, tensors
