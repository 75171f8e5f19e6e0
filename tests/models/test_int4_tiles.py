"""Codes come back out of a kernel's tiles: out of CUDA's order, written down here by its rule."""

import pytest
import torch

from harness.models import int4_tiles
from harness.models.packed import GPU_KERNEL_ROWS
from methods.compression.rounding import packed_layer, round_to_nearest


def as_cuda_orders(nibbles, inner):
    """Order codes as CUDA's kernel for tensor cores of m16n8k16 does.

    A lane holds of each pair of inner tiles eight codes of one output: of both tiles the inputs
    2 * (lane % 4) + (0, 1, 8, 9), in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits.
    """
    codes = torch.stack((nibbles >> 4, nibbles & 15), dim=-1).flatten(1).long()
    outputs, inputs = codes.shape
    tiles = torch.zeros((outputs // 8, inputs // (16 * inner), 32, inner // 2), dtype=torch.int64)
    for lane in range(32):
        rows = torch.arange(outputs // 8) * 8 + lane // 4
        for pair in range(inner // 2):
            for block in range(inputs // (16 * inner)):
                start = (block * inner + 2 * pair) * 16 + 2 * (lane % 4)
                places = [start + tile + step for tile in (0, 16) for step in (0, 1, 8, 9)]
                for shift, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    tiles[:, block, lane, pair] |= codes[rows, places[which]] << 4 * shift
    signed = torch.where(tiles >= 2**31, tiles - 2**32, tiles)
    return signed.to(torch.int32)


@pytest.fixture
def cuda_order(monkeypatch):
    """Let torch lay codes out as CUDA does; forget orders learned before and afterwards."""
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", as_cuda_orders, raising=False)
    monkeypatch.setattr(int4_tiles, "_ORDERS", {})


def test_codes_come_back_out_of_the_order_of_cuda(cuda_order):
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (40, 384), dtype=torch.int32)
    tiles = int4_tiles.pack_tiles(codes)
    assert tiles.shape == (5, 3, 32, 4) and tiles.dtype == torch.int32
    assert int4_tiles.unpack_tiles(tiles).equal(codes.to(torch.uint8))


def test_a_layout_whose_tiles_are_not_alike_is_never_read(monkeypatch):
    def row_by_row(nibbles, inner):
        outputs, half = nibbles.shape
        shape = (outputs // 8, 2 * half // (16 * inner), 32, inner // 2)
        return nibbles.contiguous().view(torch.int32).reshape(shape)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", row_by_row, raising=False)
    monkeypatch.setattr(int4_tiles, "_ORDERS", {})
    tiles = int4_tiles.pack_tiles(torch.ones((16, 256), dtype=torch.int32))
    assert int4_tiles.unpack_tiles(tiles) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [256, 200])
def test_many_rows_on_a_gpu_multiply_with_what_the_codes_stand_for(cuda_order, symmetric, width):
    from harness.models.packed import packed_module

    torch.manual_seed(1)
    w = torch.randn(44, width)
    rounded = round_to_nearest(w, bits=4, group_size=32, symmetric=symmetric)
    spec, tensors = packed_layer("m", rounded, None, kind="int4")
    module = packed_module(spec, torch.float32)
    for leaf, tensor in tensors.items():
        getattr(module, leaf.removeprefix("m.")).data = tensor.clone()
    expected = rounded.dequantized()
    module._lay_out("cuda")
    unpacked = module.unpacked()
    assert unpacked.dtype == torch.bfloat16 and unpacked.shape == (48, -(-width // 128) * 128)
    assert (unpacked[:44, :width].float() - expected).abs().max() < 0.01 * expected.abs().max()
    assert not unpacked[44:].any()
    rows = torch.randn(GPU_KERNEL_ROWS["int4"] + 1, unpacked.shape[1], dtype=torch.bfloat16)
    rows[:, width:] = 0  # as the layer pads its input
    out = module._product(rows)
    assert (out[:, :44].float() - rows[:, :width].float() @ expected.T).abs().max() < 0.5
