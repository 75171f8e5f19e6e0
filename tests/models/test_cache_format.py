"""The cache format in a configuration: read back, and refused in one line where it is none."""

import pytest
from transformers import LlamaConfig

from harness.errors import HarnessError
from harness.models.cache_format import (
    CacheFormat,
    cache_format_in,
    cache_format_of,
    with_cache_format,
)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_format_is_read_as_it_was_stated(bits):
    cache_format = CacheFormat(bits=bits, group=48)
    contents = with_cache_format({"hidden_size": 64}, cache_format)
    assert cache_format_in(contents, "x") == cache_format and contents["hidden_size"] == 64
    assert cache_format_of(LlamaConfig(**contents)) == cache_format
    assert cache_format_in({}, "x") is None and cache_format_of(LlamaConfig()) is None


@pytest.mark.parametrize(
    "stated",
    [
        {"bits": 2, "group": 32},
        {"bits": "8", "group": 32},
        {"bits": 8, "group": 0},
        {"bits": 8, "group": True},
        {"bits": 8},
        {"bits": 8, "group": 64, "axis": 0},
        "int8",
        [8, 64],
    ],
)
def test_a_format_that_is_not_known_is_refused_in_one_line(stated):
    with pytest.raises(HarnessError, match=r"^here: kv_cache_quantization is .*must be") as problem:
        cache_format_in({"kv_cache_quantization": stated}, "here")
    assert "\n" not in str(problem.value)
