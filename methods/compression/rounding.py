"""Rounding weights to few bits: round to nearest, GPTQ, and the tensors of a packed checkpoint.

Legend: O outputs, I inputs, G groups of inputs. Scales are rounded to bf16 *before* weights are
rounded to them, so that saving them in another float type changes no weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from harness.errors import CellFailed
from harness.models.packed import pack_nibbles, row_parts

Scales = Literal["absmax", "mse"]  # where the scale of a group comes from
# What the largest magnitude of a group is divided by to give the scales that a search tries: by 7
# nothing is clipped, by 12.75 everything above 0.6 of it.
_DIVISORS = tuple(7 + step / 4 for step in range(24))
_SHRINKS = tuple(1 - step / 40 for step in range(17))  # of the range of an asymmetric group
_REFINING_DAMPENING = 1e-3  # share of the mean second moment, added to each


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in integers: `w_hat = scale * (codes - zero_point)`, by groups of inputs."""

    codes: Tensor  # (O, I): -127..127 of int8, or 0..15
    scale: Tensor  # (O, G) in bf16
    zero_point: Tensor  # (O, G), integers as floats
    group_size: int

    def rows(self, part: slice) -> "QuantizedMatrix":
        """Return some rows of the matrix."""
        return QuantizedMatrix(
            self.codes[part], self.scale[part], self.zero_point[part], self.group_size
        )

    def write_into(self, weight: Tensor) -> None:
        """Write w_hat into a weight (O, I)."""
        for part in row_parts(*weight.shape):
            weight[part] = self.rows(part).dequantized()

    def dequantized(self) -> Tensor:
        """Return w_hat, (O, I) in fp32."""
        width = self.codes.shape[1]
        scale, zero_point = (
            of_groups.float().repeat_interleave(self.group_size, dim=1)[:, :width]
            for of_groups in (self.scale, self.zero_point)
        )
        return scale * (self.codes.float() - zero_point)


class Grid(NamedTuple):
    """The scale (bf16) and the zero point (integers as floats) of groups of weights, (O, G)."""

    scale: Tensor
    zero_point: Tensor


def quantization_grid(w: Tensor, *, bits: int, group_size: int, symmetric: bool) -> Grid:
    """Return the grid that the smallest and largest weight of every group ask for.

    Symmetric: scale = max|w| / (2^(b-1) - 1), zero point in the middle. Asymmetric: the range is
    widened to hold 0, scale = (max - min) / (2^b - 1), zero point = round(-min / scale). Either way
    a weight of 0 stays exactly 0.
    """
    padded = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % group_size))
    groups = padded.view(w.shape[0], -1, group_size)
    if not symmetric:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = bf16_without_zeros((high - low) / (2**bits - 1))
        return Grid(scale, torch.round(-low / scale.float()).clamp(0, 2**bits - 1))
    scale = bf16_without_zeros(groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
    middle = 0.0 if bits == 8 else float(2 ** (bits - 1))
    return Grid(scale, torch.full_like(scale, middle, dtype=torch.float32))


def searched_grid(group: Tensor, importance: Tensor, *, symmetric: bool) -> Grid:
    """Return the int4 grid of one group that has the smallest weighted squared error, (O, 1).

    `group` (O, n) are the weights, `importance` (n,) what a squared error of each counts. Symmetric
    grids use all 16 codes, -8..7 about the middle, and their scale may be negative, so that the
    longer side is the one of the larger weights (llama.cpp's Q4_0 does so): it is +-max|w| / d for
    24 divisors d from 7 to 12.75. An asymmetric range is shrunk towards 0, to 0.6 of its size.
    """
    best_error = torch.full((len(group),), torch.inf, device=group.device)
    best = Grid(torch.ones_like(best_error, dtype=torch.bfloat16), torch.zeros_like(best_error))
    for grid in _tried_grids(group, symmetric=symmetric):
        scale = grid.scale.float()
        codes = nearest_codes(group, scale, grid.zero_point, bits=4, symmetric=False)
        rounded = scale[:, None] * (codes - grid.zero_point[:, None])
        error = (group - rounded).square() @ importance
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = Grid(
            *(torch.where(is_better, new, old) for new, old in zip(grid, best, strict=True))
        )
    return Grid(best.scale[:, None], best.zero_point[:, None])


def _tried_grids(group: Tensor, *, symmetric: bool) -> Iterator[Grid]:
    """Yield the grids (O,) that a search tries, those without clipping first."""
    if symmetric:
        largest = group.abs().amax(1)
        middle = torch.full_like(largest, 8.0)
        for divisor in _DIVISORS:
            for side in (largest, -largest):
                yield Grid(bf16_without_zeros(side / divisor), middle)
        return
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    for shrink in _SHRINKS:
        scale = bf16_without_zeros(shrink * (high - low) / 15)
        yield Grid(scale, torch.round(-shrink * low / scale.float()).clamp(0, 15))


def bf16_without_zeros(scale: Tensor) -> Tensor:
    """Round scales to bf16; a scale of 0, of a group of zeros, becomes 1."""
    rounded = scale.to(torch.bfloat16)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def nearest_codes(
    w: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, symmetric: bool
) -> Tensor:
    """Return the nearest codes of columns (O, n), with one scale and zero point a row, (O,)."""
    if bits == 8:
        return torch.round(w / scale[:, None]).clamp_(-127, 127)
    lowest = 1 if symmetric else 0  # symmetric codes are -7..7 about the middle
    return (torch.round(w / scale[:, None]) + zero_point[:, None]).clamp_(lowest, 2**bits - 1)


def round_to_nearest(
    w: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    scales: Scales = "absmax",
) -> QuantizedMatrix:
    """Round every weight to the nearest code (RTN), the baseline of calibrated methods.

    A `group_size` of 0 is the whole row. `scales="mse"` (int4 alone) searches each group's scale by
    the squared error of its weights.
    """
    group_size = group_size or w.shape[1]
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    grids: list[Grid] = []
    for part in row_parts(*w.shape):
        rows = w[part].float()
        if scales == "mse":
            grid = _searched_grids(rows, group_size=group_size, symmetric=symmetric)
        else:
            grid = quantization_grid(rows, bits=bits, group_size=group_size, symmetric=symmetric)
        grids.append(grid)
        codes[part] = _codes_of_groups(
            rows,
            grid,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric and scales == "absmax",
        )
    scale, zero_point = (torch.cat(of_parts) for of_parts in zip(*grids, strict=True))
    return QuantizedMatrix(codes, scale, zero_point, group_size)


def _searched_grids(w: Tensor, *, group_size: int, symmetric: bool) -> Grid:
    """Return the searched grids of all groups of weights (O, I), whose errors count alike."""
    return _joined(
        [
            searched_grid(columns, w.new_ones(columns.shape[1]), symmetric=symmetric)
            for columns in w.split(group_size, dim=1)
        ]
    )


def _joined(grids: Sequence[Grid]) -> Grid:
    """Return the grids of neighbouring groups as one."""
    scale, zero_point = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return Grid(scale, zero_point)


def _codes_of_groups(
    w: Tensor, grid: Grid, *, bits: int, group_size: int, symmetric: bool
) -> Tensor:
    """Return the nearest codes of weights (O, I) in int8."""
    codes = [
        nearest_codes(
            columns,
            grid.scale[:, group].float(),
            grid.zero_point[:, group],
            bits=bits,
            symmetric=symmetric,
        )
        for group, columns in enumerate(w.split(group_size, dim=1))
    ]
    return torch.cat(codes, dim=1).to(torch.int8)


class InverseFactor(NamedTuple):
    """The upper Cholesky factor (I, I) of an inverse, and the inputs (I,) that were always 0."""

    factor: Tensor
    dead: Tensor


def inverse_cholesky(gram: Tensor, dampening: float) -> InverseFactor:
    """Return the upper Cholesky factor of the inverse of H = X^T X + dampening * mean(diag) I.

    Row i of the factor, divided by its diagonal, says how the weights after weight i best
    compensate an error in it (Frantar et al., 2023, GPTQ, section 3.3). The dampening grows
    tenfold until the factorisation exists. Raises `CellFailed` where it never does.
    """
    h = gram.float()
    diagonal = h.diagonal().clone()
    dead = diagonal == 0
    for _ in range(6):
        h.diagonal()[dead] = 1.0
        h.diagonal().add_(dampening * h.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(h)
        h.diagonal().copy_(diagonal)  # in place and back: a copy of such a matrix costs memory
        if int(failed) == 0:
            factor = _inverse(factor)
            factor, failed = _upper_cholesky(factor)
            if int(failed) == 0:
                return InverseFactor(factor, dead)
        dampening *= 10
    raise CellFailed(
        "the second moments of a layer's inputs cannot be inverted; look for inputs that are not "
        "finite"
    )


def _inverse(lower: Tensor) -> Tensor:
    """Return the inverse of the matrix whose Cholesky factor this is; on a CPU in its place."""
    in_place = lower.device.type == "cpu"
    return torch.cholesky_inverse(lower, out=lower) if in_place else torch.cholesky_inverse(lower)


def _upper_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix's upper Cholesky factor, and 0 if it exists; on a CPU in its place."""
    out = (matrix, torch.empty((), dtype=torch.int32)) if matrix.device.type == "cpu" else None
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=True, out=out)
    return factor, failed


class _Columns(NamedTuple):
    """How GPTQ rounds columns: the grid of a group, and the codes of a column on it."""

    bits: int
    group_size: int
    symmetric: bool
    scales: Scales

    def grid(self, group: Tensor, pivots: Tensor) -> Grid:
        """Return a group's grid (O, 1).

        An error of weight i costs its square divided by pivot i's square, once the columns after it
        have compensated.
        """
        if self.scales == "mse":
            return searched_grid(group, 1 / pivots.square(), symmetric=self.symmetric)
        return quantization_grid(
            group, bits=self.bits, group_size=group.shape[1], symmetric=self.symmetric
        )

    def codes(self, column: Tensor, grid: Grid) -> Tensor:
        """Return the nearest codes of one column, (O,)."""
        scale, zero_point = grid.scale[:, 0].float(), grid.zero_point[:, 0]
        middle = self.symmetric and self.scales == "absmax"  # -7..7 of the 16 codes
        return nearest_codes(column[:, None], scale, zero_point, bits=self.bits, symmetric=middle)[
            :, 0
        ]


def round_with_gptq(
    w: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    dampening: float = 0.01,
    columns: int = 128,
    keep_mask: Tensor | None = None,
) -> QuantizedMatrix:
    """Round column by column; the columns after each compensate its error (GPTQ).

    Frantar et al., 2023. `gram` is X^T X of the layer's inputs, (I, I); a `group_size` of 0 is the
    whole row. Columns are corrected in parts of `columns`. A group gets its scale when its first
    column is rounded, from the corrected weights. A weight was pruned where `keep_mask` (O, I) is
    False: it stays zero and compensates nothing.
    """
    rounding = _Columns(bits, group_size or w.shape[1], symmetric, "absmax")
    return _round_columns(w, inverse_cholesky(gram, dampening), rounding, columns, keep_mask)


def round_with_searched_gptq(
    w: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    symmetric: bool = True,
    dampening: float = 0.01,
    keep_mask: Tensor | None = None,
) -> QuantizedMatrix:
    """Round to int4 as `round_with_gptq` does, with scales that `searched_grid` finds."""
    rounding = _Columns(4, group_size, symmetric, "mse")
    return _round_columns(w, inverse_cholesky(gram, dampening), rounding, 128, keep_mask)


def _round_columns(
    w: Tensor,
    inverse: InverseFactor,
    rounding: _Columns,
    columns: int,
    keep_mask: Tensor | None,
) -> QuantizedMatrix:
    """Round the columns of W (O, I) one after another, in parts of `columns`."""
    w = w.float().clone()
    width, group_size = w.shape[1], rounding.group_size
    factor, dead = inverse
    w[:, dead] = 0
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    grids: list[Grid] = []
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        errors = torch.empty_like(w[:, start:stop])
        for column in range(start, stop):
            offset = column - start
            if column % group_size == 0:
                group = _corrected_group(w, factor, errors, start, column, group_size)
                if keep_mask is not None:
                    group = group * keep_mask[:, column : column + group_size]
                grids.append(
                    rounding.grid(group, factor.diagonal()[column : column + group.shape[1]])
                )
            scale, zero_point = grids[-1].scale[:, 0].float(), grids[-1].zero_point[:, 0]
            code = rounding.codes(w[:, column], grids[-1])
            codes[:, column] = code.to(torch.int8)
            rounded = scale * (code - zero_point)
            errors[:, offset] = (w[:, column] - rounded) / factor[column, column]
            correction = errors[:, offset : offset + 1] * factor[column, None, column + 1 : stop]
            subtract_correction(w, column + 1, stop, correction, keep_mask)
        subtract_correction(w, stop, width, errors @ factor[start:stop, stop:], keep_mask)
    return QuantizedMatrix(codes, *_joined(grids), group_size)


def subtract_correction(
    w: Tensor, start: int, stop: int, correction: Tensor, keep_mask: Tensor | None
) -> None:
    """Subtract a correction from columns `start` to `stop` of W, in place.

    Where `keep_mask` (O, I) is False a weight was pruned and stays zero.
    """
    w[:, start:stop] -= correction
    if keep_mask is not None:
        w[:, start:stop] *= keep_mask[:, start:stop]


def _corrected_group(
    w: Tensor, factor: Tensor, errors: Tensor, start: int, column: int, group_size: int
) -> Tensor:
    """Return the weights of the group that begins at `column`, corrected for all errors so far.

    `errors` are those of the part of columns that begins at `start`. Columns behind that part have
    not been corrected for them yet.
    """
    part_stop = start + errors.shape[1]
    if column + group_size <= part_stop:
        return w[:, column : column + group_size]
    stop = min(column + group_size, w.shape[1])
    group = w[:, column:stop].clone()
    group[:, part_stop - column :] -= (
        errors[:, : column - start] @ factor[start:column, part_stop:stop]
    )
    return group


def packed_layer(
    name: str, matrix: QuantizedMatrix, bias: Tensor | None, *, kind: str, **spec_entries: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a module's entry of `config.json`, and its tensors by their full names."""
    shape = [int(size) for size in matrix.codes.shape]
    spec: dict[str, Any] = {"kind": kind, "shape": shape, **spec_entries}
    tensors = {f"{name}.scale": matrix.scale}
    if kind == "int4":
        zeros = bool((matrix.zero_point != 8).any())
        spec |= {"group": matrix.group_size, **({"zeros": True} if zeros else {})}
        tensors[f"{name}.weight"] = pack_nibbles(matrix.codes)
        if zeros:
            tensors[f"{name}.zero"] = pack_nibbles(matrix.zero_point.to(torch.uint8))
    else:
        tensors[f"{name}.weight"] = matrix.codes[..., None]
        tensors[f"{name}.scale"] = matrix.scale[:, 0]
    if bias is not None:
        spec["bias"] = True
        tensors[f"{name}.bias"] = bias.detach()
    return spec, tensors
