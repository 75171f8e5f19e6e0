"""FP8, NVFP4 and MXFP4: numbers by hand, laws of the formats, and other libraries' values."""

import pytest
import torch

from methods.compression.float_formats import (
    fp8_values,
    mxfp4_values,
    nvfp4_values,
    round_to_e2m1,
    round_to_e4m3,
)


def weights(seed=0, *, inputs=128, spread=1.0):
    """Return a matrix whose rows and blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(24, inputs, generator=generator)
    sizes = torch.randn(24, inputs // 16, generator=generator).mul(spread).exp()
    return w * sizes.repeat_interleave(16, dim=1) * 0.02


def test_e2m1_has_eight_magnitudes_and_ties_go_to_the_even_code():
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 7.9, -0.26, -2.5])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -0.5, -2.0])
    assert torch.equal(round_to_e2m1(values), expected)
    # no other element is nearer, over the whole range
    grid = torch.linspace(-7, 7, 2801)
    elements = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    elements = torch.cat([-elements, elements])
    nearest = (grid.clamp(-6, 6)[:, None] - elements).abs().amin(1)
    assert torch.allclose((round_to_e2m1(grid) - grid.clamp(-6, 6)).abs(), nearest, atol=1e-6)


def test_e4m3_has_three_bits_of_mantissa_and_ends_at_448():
    values = torch.tensor([448.0, 1e6, -460.0, 17.0, 19.0, 2**-9, 2**-11])
    # steps of 2 from 16 to 32: 17 lies between 16 and 18, 19 between 18 and 20
    expected = torch.tensor([448.0, 448.0, -448.0, 16.0, 20.0, 2**-9, 0.0])
    assert torch.equal(round_to_e4m3(values), expected)


def test_a_channel_of_fp8_by_hand():
    # the scale is 4.48 / 448 = 0.01; 0.1875 is 18.75 steps of it, between 18 and 20: 18
    w = torch.tensor([[4.48, 0.1875, -0.05], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[4.48, 0.18, -0.05], [0.0, 0.0, 0.0]])
    assert torch.allclose(fp8_values(w), expected, rtol=1e-6, atol=0)


def test_a_block_of_mxfp4_by_hand():
    # 7 lies in [4, 8): the exponent is 2 - 2 = 0, the scale 1, and 7 becomes E2M1's largest
    # 0.9 lies in [0.5, 1): the exponent is -1 - 2, the scale 1/8; 0.9 is 7.2 of it, 0.2 is 1.6
    w = torch.zeros(1, 64)
    w[0, :3], w[0, 32:34] = torch.tensor([7.0, 2.6, -0.3]), torch.tensor([0.9, 0.2])
    values = mxfp4_values(w)
    assert values[0, :3].tolist() == [6.0, 3.0, -0.5]
    assert values[0, 32:34].tolist() == [0.75, 0.1875] and int((values != 0).sum()) == 5


def test_a_block_of_nvfp4_by_hand():
    # the matrix's scale is 2688 / (448 * 6) = 1; the second block's is 7 / 6 = 1.1667, in E4M3's
    # steps of 1/8 1.125; 7 / 1.125 = 6.2 becomes 6, and 2 / 1.125 = 1.78 becomes 2
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 16:18] = 2688.0, torch.tensor([7.0, 2.0])
    values = nvfp4_values(w)
    assert values[0, 0] == 2688 and values[0, 16:18].tolist() == [6.75, 2.25]


@pytest.mark.parametrize("rounded", [fp8_values, nvfp4_values, mxfp4_values])
def test_a_format_holds_its_own_values_keeps_zeros_and_takes_any_width(rounded):
    w = weights(inputs=112)[:, :107]  # no multiple of a block
    w[3] = 0
    w[5, 40:] = 0
    values = rounded(w)
    assert values.shape == w.shape and values.dtype == torch.float32
    assert torch.equal(values[3], w[3]) and not values[5, 40:].any()
    assert torch.allclose(rounded(values), values, rtol=1e-6, atol=0)
    assert torch.equal(rounded(-w), -values)
    assert not rounded(torch.zeros(2, 40)).any()


@pytest.mark.parametrize(("rounded", "size"), [(nvfp4_values, 16), (mxfp4_values, 32)])
def test_a_block_has_the_values_of_one_scaled_e2m1(rounded, size):
    for block in rounded(weights(1)).unflatten(1, (-1, size)).flatten(0, 1):
        magnitudes = block.abs().unique()
        assert len(magnitudes) <= 8
    # as many bits, less error than no scale for blocks would leave
    w = weights(1, spread=2.0)
    assert (rounded(w) - w).square().mean() < 0.05 * w.square().mean()


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_torch_casts_to_the_same_fp8(spread):
    w = weights(2, spread=spread)
    for row, values in zip(w, fp8_values(w), strict=True):
        scale = row.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        assert torch.equal((row / scale).to(torch.float8_e4m3fn).float() * scale, values)


@pytest.mark.peer
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_torchao_stores_the_same_mxfp4(spread):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    w = weights(3, spread=spread)
    stored = mx.MXTensor.to_mx(w, torch.float4_e2m1fn_x2, block_size=32)
    assert torch.equal(stored.dequantize(torch.float32), mxfp4_values(w))


@pytest.mark.peer
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_torchao_stores_the_same_nvfp4(spread):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = weights(4, spread=spread)
    scale = nvfp4.per_tensor_amax_to_scale(w.abs().max())
    stored = nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale).dequantize(torch.float32)
    # it multiplies by a reciprocal, so a tie may fall to the other side and no more
    gap = (stored - nvfp4_values(w)).abs()
    assert (gap > 1e-6 * w.abs().max()).float().mean() <= 1e-3


@pytest.mark.peer
def test_compressed_tensors_rounds_to_the_same_elements():
    fp4 = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    values = torch.cat([torch.linspace(-8, 8, 1025), weights(5).flatten() * 100])
    assert torch.equal(fp4.cast_to_fp4(values), round_to_e2m1(values))
