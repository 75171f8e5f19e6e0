"""Keys and values as codes: numbers by hand, half a step, a second implementation in numpy."""

import numpy as np
import pytest
import torch

from harness.models.cache_codes import as_stored, decode, encode
from harness.models.cache_format import CacheFormat

INT8, INT4 = (CacheFormat(bits=bits, group=group) for bits, group in ((8, 64), (4, 32)))


def test_int8_of_a_2x4_tensor_by_hand():
    # scales 2/127... are no floats of 16 bits; these are: 127 and 254 over 127
    states = torch.tensor([[127.0, -63.4, 0.4, 1.6], [-254.0, 3.1, 2.9, 0.0]])
    stored = encode(states, INT8)
    assert stored.codes.tolist() == [[127, -63, 0, 2], [-127, 2, 1, 0]]
    assert stored.scales.tolist() == [[1.0], [2.0]] and stored.offsets is None
    expected = [[127.0, -63.0, 0.0, 2.0], [-254.0, 4.0, 2.0, 0.0]]
    assert decode(stored, torch.float32).tolist() == expected


def test_int4_of_a_2x4_tensor_by_hand():
    states = torch.tensor([[-1.0, 14.0, 2.4, 2.6], [0.5, 8.0, 0.7, 0.8]])
    stored = encode(states, INT4)
    # offsets are the lowest numbers, scales a fifteenth of the ranges 15 and 7.5
    assert stored.offsets.tolist() == [[-1.0], [0.5]] and stored.scales.tolist() == [[1.0], [0.5]]
    # codes 0, 15, 3, 4 and 0, 15, 0, 1; the first of two lies in the low half of a byte
    assert stored.codes.tolist() == [[0 + 16 * 15, 3 + 16 * 4], [0 + 16 * 15, 0 + 16 * 1]]
    expected = [[-1.0, 14.0, 2.0, 3.0], [0.5, 8.0, 0.5, 1.0]]
    assert decode(stored, torch.float32).tolist() == expected


def numbers(kind):
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 50, 64, generator=draw)
    return {
        "usual": states,
        "far from zero": states * 0.01 - 37.3,
        "an outlier": states * torch.where(torch.arange(64) == 5, 300.0, 1.0),
        "smaller than float16": states * 1e-7,
        "zeros": states * 0,
    }[kind]


KINDS = ("usual", "far from zero", "an outlier", "smaller than float16", "zeros")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_format", [INT8, INT4])
def test_every_number_is_within_half_a_step_of_its_own(kind, cache_format):
    states = numbers(kind)
    stored = encode(states, cache_format)
    steps = stored.scales.float().repeat_interleave(cache_format.group_of(64), dim=-1)
    errors = (decode(stored, torch.float64) - states.double()).abs()
    # float32's own rounding of the offset and of the product beside half a step
    assert (errors <= 0.5 * steps + 4e-7 * states.abs()).all()
    if kind == "usual":  # the bound is met: a finer format would be another one
        assert float((errors / steps).max()) > 0.49


def in_numpy(states, bits, group):
    """Round in numpy alone, group by group, as KIVI's formulas say, without a tensor library."""
    result = np.empty_like(states)
    for row in np.ndindex(states.shape[:-1]):
        for start in range(0, states.shape[-1], group):
            part = states[row][start : start + group]
            low = np.float16(0) if bits == 8 else np.float16(part.min())
            if bits == 4 and np.float32(low) > part.min():
                low = np.nextafter(low, np.float16(-np.inf))
            reach = np.abs(part).max() if bits == 8 else part.max() - np.float32(low)
            wanted = np.float32(reach) / np.float32(127 if bits == 8 else 15)
            scale = np.float16(wanted)
            if np.float32(scale) < wanted:
                scale = np.nextafter(scale, np.float16(np.inf))
            step = np.float32(scale) if scale else np.float32(1)
            codes = np.rint((part - np.float32(low)) / step)
            codes = np.clip(codes, -127, 127) if bits == 8 else np.clip(codes, 0, 15)
            result[row][start : start + group] = codes * np.float32(scale) + np.float32(low)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_format", [INT8, INT4])
def test_a_second_implementation_gives_the_same_numbers(kind, cache_format):
    states = numbers(kind)[:1, :, :9].contiguous()
    expected = in_numpy(states.numpy(), cache_format.bits, cache_format.group_of(64))
    assert np.array_equal(as_stored(states, cache_format).numpy(), expected)


@pytest.mark.parametrize("cache_format", [INT8, INT4])
def test_a_token_is_stored_alike_whatever_stands_beside_it(cache_format):
    states = numbers("usual")
    together = as_stored(states, cache_format)
    alone = torch.stack([as_stored(states[1, :, token], cache_format) for token in range(50)], 1)
    assert torch.equal(together[1], alone)


@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("cache_format", [INT8, INT4])
def test_the_bytes_of_a_vector_are_those_that_are_stored(head_size, cache_format):
    stored = encode(torch.randn(5, head_size), cache_format)
    counted = sum(part.numel() * part.element_size() for part in stored.tensors)
    assert counted == 5 * cache_format.vector_bytes(head_size)
    if head_size == 64:  # by hand: 64 codes and a scale; 32 bytes of codes, two scales, two offsets
        assert counted // 5 == (64 + 2 if cache_format.bits == 8 else 32 + 4 + 4)


def test_gradients_pass_as_if_nothing_were_rounded():
    states = torch.randn(2, 3, 32, requires_grad=True)
    rounded = as_stored(states, INT4)
    assert torch.equal(rounded, decode(encode(states.detach(), INT4), torch.float32))
    (rounded * torch.arange(32)).sum().backward()
    assert torch.equal(states.grad, torch.arange(32.0).expand(2, 3, 32))
