"""Lowering the output error of a rounded matrix further: scales by least squares, codes one by one.

GPTQ chooses every code once and never looks back. Here the error on calibration text,
`sum((W - W_hat) H (W - W_hat)^T)` with H = X^T X of the layer's inputs, is lowered from where GPTQ
ended: all scales of a row are solved for its codes, then each code moves to the value that is best
for all others as they are (coordinate descent, as CDQuant of Nair and Suggala, 2024). Rows of the
matrix do not depend on one another, and no step raises the error of a row.

Legend: O outputs, I inputs, G groups of inputs, S inputs of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from harness.models.packed import row_parts
from methods.compression.rounding import QuantizedMatrix, bf16_without_zeros

_DAMPENING = 1e-3  # share of the mean second moment, added to each: few tokens leave H singular
_RIDGE = 1e-6  # share of the mean of a row's system: codes that are all zero leave it singular
_COLUMNS = 64  # that are moved before the gradient of all others is corrected


class _Rows(NamedTuple):
    """Some rows of a matrix: weights, what they are rounded to, and where codes may move."""

    w: Tensor  # (O, I)
    centred: Tensor  # codes minus zero points, (O, I)
    lowest: Tensor  # of the centred codes, (O, I); the highest is 15 above it
    keep: Tensor | None  # (O, I), False where a weight was pruned


def refine(
    matrix: QuantizedMatrix,
    w: Tensor,
    gram: Tensor,
    *,
    passes: int,
    keep_mask: Tensor | None = None,
) -> QuantizedMatrix:
    """Return an int4 matrix with no larger error on the inputs whose second moments are `gram`.

    `w` (O, I) are the weights that it stands for, `gram` is X^T X, (I, I). A weight was pruned
    where `keep_mask` (O, I) is False, and stays zero. Zero points stay as they are.
    """
    damping = _DAMPENING * gram.diagonal().mean()
    moments = gram.float() + damping * torch.eye(len(gram), device=gram.device)
    codes, scale = matrix.codes.clone(), matrix.scale.clone()
    for part in row_parts(*w.shape):
        before = matrix.rows(part)
        zeros = before.zero_point.repeat_interleave(matrix.group_size, dim=1)[:, : w.shape[1]]
        keep = None if keep_mask is None else keep_mask[part]
        rows = _Rows(w[part].float(), before.codes.float() - zeros, -zeros, keep)
        scale_OG = before.scale
        for _ in range(passes):
            scale_OG = solved_scales(rows, scale_OG, moments, matrix.group_size)
            rows = _moved_codes(rows, _of_inputs(scale_OG, rows.w, matrix.group_size), moments)
        codes[part] = (rows.centred + zeros).to(torch.int8)
        scale[part] = scale_OG
    return QuantizedMatrix(codes, scale, matrix.zero_point, matrix.group_size)


def solved_scales(rows: _Rows, scale_OG: Tensor, moments: Tensor, group_size: int) -> Tensor:
    """Return each row's best scales (O, G) in bf16 for its codes; its old ones where they win.

    With c_g the codes of group g, zero elsewhere, and s their scales, the error
    (w - sum_g s_g c_g) H (...)^T is least where sum_h (c_g H c_h^T) s_h = c_g H w^T for all g.
    """
    padding = -rows.w.shape[1] % group_size
    codes_OGS = _in_groups(rows.centred, padding, group_size)
    targets = (_in_groups(rows.w @ moments, padding, group_size) * codes_OGS).sum(-1)
    products = []
    for group, part in enumerate(moments.split(group_size)):
        through_moments = codes_OGS[:, group, : len(part)] @ part  # c_g H, (O, I)
        products.append((_in_groups(through_moments, padding, group_size) * codes_OGS).sum(-1))
    system = torch.stack(products, dim=1)  # (O, G, G)
    ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(system.dtype).tiny
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    solved = bf16_without_zeros(torch.linalg.solve(system, targets))
    errors = [
        output_errors(rows, _of_inputs(scale, rows.w, group_size), moments)
        for scale in (solved, scale_OG)
    ]
    return torch.where((errors[0] < errors[1])[:, None], solved, scale_OG)


def _in_groups(values: Tensor, padding: int, group_size: int) -> Tensor:
    """Return (O, I) as (O, G, S), the last group filled up with zeros."""
    return torch.nn.functional.pad(values, (0, padding)).unflatten(1, (-1, group_size))


def _of_inputs(scale_OG: Tensor, w: Tensor, group_size: int) -> Tensor:
    """Return the scale of each weight, (O, I) in fp32."""
    return scale_OG.float().repeat_interleave(group_size, dim=1)[:, : w.shape[1]]


def output_errors(rows: _Rows, scale_OI: Tensor, moments: Tensor) -> Tensor:
    """Return each row's squared error of the outputs, (O,)."""
    difference = rows.w - scale_OI * rows.centred
    return ((difference @ moments) * difference).sum(1)


def _moved_codes(rows: _Rows, scale_OI: Tensor, moments: Tensor) -> _Rows:
    """Move every code once, in the order of the inputs, to the best one for all others."""
    codes = rows.centred.clone()
    gradient = (scale_OI * codes - rows.w) @ moments  # half of the error's, by each w_hat
    for start in range(0, codes.shape[1], _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, codes.shape[1]))
        near, own = gradient[:, columns].clone(), moments[columns, columns]
        moves = torch.zeros_like(near)
        for offset in range(near.shape[1]):
            column = start + offset
            old, scale = codes[:, column], scale_OI[:, column]
            lowest = rows.lowest[:, column]
            best = torch.round(old - near[:, offset] / (own[offset, offset] * scale))
            new = torch.minimum(torch.maximum(best, lowest), lowest + 15)
            if rows.keep is not None:
                new = torch.where(rows.keep[:, column], new, old)
            moves[:, offset] = (new - old) * scale
            codes[:, column] = new
            near += moves[:, offset, None] * own[offset]
        gradient += moves @ moments[columns]
    return rows._replace(centred=codes)
