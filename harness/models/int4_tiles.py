"""Reads int4 codes back out of the tiles that a GPU's kernel wants them in.

`torch._convert_weight_to_int4pack` reorders the codes of a matrix for the tensor cores, tile by
tile, and torch has no way back. Every tile is ordered alike, so one that holds its own indices
tells the order. It is tried on another matrix before it is used.

Legend: O outputs, I inputs, a tile is 8 outputs by 128 inputs.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INNER_TILES = 8  # of 16 inputs, side by side in a tile: the layout that all our weights have
TILE_OUTPUTS, TILE_INPUTS = 8, 16 * INNER_TILES
_CODES = TILE_OUTPUTS * TILE_INPUTS
# the order of a tile's codes, by device; None where tiles are not all alike
_ORDERS: dict[torch.device, Tensor | None] = {}


def pack_tiles(codes: Tensor) -> Tensor:
    """Return the kernel's layout of codes 0..15, (O, I): int32 (O / 8, I / 128, 32, 4)."""
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed: Tensor = torch._convert_weight_to_int4pack(nibbles, INNER_TILES)
    return packed


def unpack_tiles(tiles: Tensor) -> Tensor | None:
    """Return the codes (O, I) as uint8 of a kernel's layout; None where its order is unknown."""
    order = _order_of(tiles)
    return None if order is None else _reordered(tiles, order)


def _order_of(tiles: Tensor) -> Tensor | None:
    """Return the place of each code of a tile among its stored nibbles, (1024,)."""
    if isinstance(tiles, FakeTensor):  # of which only shapes are known
        return _learned_order(tiles.device)
    if tiles.device not in _ORDERS:
        order = _learned_order(tiles.device)
        shape = (2 * TILE_OUTPUTS, 2 * TILE_INPUTS)
        codes = (torch.arange(shape[0] * shape[1], device=tiles.device) * 7 // 3 % 16).view(shape)
        is_right = bool((_reordered(pack_tiles(codes.int()), order) == codes).all())
        _ORDERS[tiles.device] = order if is_right else None
    return _ORDERS[tiles.device]


def _learned_order(device: torch.device) -> Tensor:
    """Pack a tile of indices, four bits at a time, and read where each of them went."""
    indices = torch.arange(_CODES, device=device, dtype=torch.int32).view(TILE_OUTPUTS, TILE_INPUTS)
    held = sum(
        _nibbles(pack_tiles(indices >> shift & 15)).flatten().long() << shift for shift in (0, 4, 8)
    )
    return torch.argsort(held)


def _nibbles(tiles: Tensor) -> Tensor:
    """Return the stored halves of bytes, (O / 8, I / 128, 1024)."""
    stored = tiles.contiguous().view(torch.uint8).flatten(2)
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(2)


def _reordered(tiles: Tensor, order: Tensor) -> Tensor:
    codes = _nibbles(tiles)[..., order].unflatten(-1, (TILE_OUTPUTS, TILE_INPUTS))
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)
