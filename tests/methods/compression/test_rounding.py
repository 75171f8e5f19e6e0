"""Scales that are searched by their squared error; what else rounds is in models/test_packed.py."""

import pytest
import torch

from harness.models.packed import packed_module
from methods.compression.rounding import (
    packed_layer,
    round_to_nearest,
    round_with_gptq,
    round_with_searched_gptq,
    searched_grid,
)


def test_a_group_of_all_sixteen_codes_is_found_exactly_on_either_side():
    group = torch.arange(-8, 8).float() * 0.5  # the longer side is the negative one
    grid = searched_grid(torch.stack([group, -group]), torch.ones(16), symmetric=True)
    assert grid.scale.flatten().tolist() == [0.5, -0.5]
    assert grid.zero_point.flatten().tolist() == [8, 8]
    # absmax has no code for -8 half steps: its step is 4 / 7
    plain = round_to_nearest(group[None], bits=4).dequantized()
    assert not torch.allclose(plain, group[None], atol=0.05)


def test_a_weight_that_does_not_count_is_clipped():
    # 12 of 7 is kept by a step of 12 / 7, in which 7 is 4.08: the error is 0.14^2; where the 12
    # does not count a step of 12 / 12 = 1 takes it to 7, or to 8 on the longer side, and 7 is exact
    group = torch.tensor([[12.0, 7.0]])
    alike = searched_grid(group, torch.ones(2), symmetric=True)
    clipped = searched_grid(group, torch.tensor([0.0, 1.0]), symmetric=True)
    assert float(alike.scale.abs()) > 1.4 and float(clipped.scale.abs()) <= 1.0625
    step = float(clipped.scale)
    assert abs(round(7 / step) * step - 7) < abs(round(7 / (12 / 7)) * (12 / 7) - 7)


# a range with a zero point uses all 16 codes without a search too, so that less is gained
@pytest.mark.parametrize(("symmetric", "share"), [(True, 0.8), (False, 0.98)])
def test_a_search_leaves_less_error_in_every_group_and_zeros_where_they_were(symmetric, share):
    torch.manual_seed(0)
    w = torch.randn(24, 96)
    w[:, 32:64] = 0
    errors = {}
    for scales in ("absmax", "mse"):
        rounded = round_to_nearest(w, bits=4, group_size=32, symmetric=symmetric, scales=scales)
        errors[scales] = (rounded.dequantized() - w).square().unflatten(1, (3, 32)).sum(-1)
        assert not rounded.dequantized()[:, 32:64].any()
        assert rounded.codes.min() >= 0 and rounded.codes.max() <= 15
    assert (errors["mse"] <= errors["absmax"] + 1e-6).all()
    assert errors["mse"].sum() < share * errors["absmax"].sum()


@pytest.mark.parametrize(("symmetric", "share"), [(True, 0.85), (False, 0.98)])
@pytest.mark.parametrize("group_size", [32, 64])
def test_gptq_loses_less_with_searched_scales(group_size, symmetric, share):
    torch.manual_seed(1)
    x = torch.randn(400, 96) @ torch.randn(96, 96)
    w, gram = torch.randn(24, 96), x.T @ x
    options = {"group_size": group_size, "symmetric": symmetric}
    errors = [
        float(((rounded.dequantized() - w) @ x.T).square().sum())
        for rounded in (
            round_with_gptq(w, gram, bits=4, **options),
            round_with_searched_gptq(w, gram, **options),
        )
    ]
    assert errors[1] < share * errors[0]


def test_kernels_multiply_with_negative_scales_and_the_lowest_code():
    torch.manual_seed(2)
    w = torch.randn(16, 64)
    rounded = round_to_nearest(w, bits=4, group_size=32, scales="mse")
    assert (rounded.scale < 0).any() and (rounded.codes == 0).any()
    spec, tensors = packed_layer("m", rounded, None, kind="int4")
    module = packed_module(spec, torch.float32)
    for name, tensor in tensors.items():
        setattr(module, name.removeprefix("m."), torch.nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(module.dequantized(), rounded.dequantized())
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = x.bfloat16().float() @ rounded.dequantized().T
        assert torch.allclose(module(x), expected, atol=0.02 * float(expected.abs().max()))
