"""A cache of codes in transformers: the same answers as reading a text at once, and its bytes."""

import pytest
import torch

from harness.errors import CellFailed
from harness.measuring.runs import generate_greedily
from harness.measuring.weighing import cache_bytes
from harness.models.cache_format import CacheFormat
from harness.models.quantized_cache import QuantizedCache, QuantizedLayer, give_quantized_cache
from harness.models.shape import Shape
from harness.models.stored_attention import attend_to_stored

FORMATS = (CacheFormat(bits=8, group=64), CacheFormat(bits=4, group=32))


def marked(small, cache_format, kind="Llama"):
    model = small(kind).model
    model.config.kv_cache_quantization = {"bits": cache_format.bits, "group": cache_format.group}
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPTNeoX"])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_decoding_from_codes_is_reading_the_text_at_once(small, cache_format, kind):
    model = marked(small, cache_format, kind)
    ids = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = QuantizedCache.of(model.config)
        pieces = [ids[:, :7], ids[:, 7:8], ids[:, 8:20], *ids[:, 20:].split(1, dim=1)]
        decoded = torch.cat([model(part, cache=cache, use_cache=True).logits for part in pieces], 1)
        attend_to_stored(model)
        at_once = model(ids, use_cache=False).logits
    assert (decoded - at_once).abs().max() < 2e-5
    assert (full - at_once).abs().max() > 1e-4  # the cache of floats is another model


@pytest.mark.parametrize("cache_format", FORMATS)
def test_a_timed_run_stores_codes_and_they_are_counted_to_the_byte(small, cache_format):
    model = marked(small, cache_format)
    give_quantized_cache(model)
    output = generate_greedily(model, torch.arange(5, 25)[None].repeat(3, 1), 5)
    shape = Shape.of_config(model.config.to_dict(), name="marked")
    assert shape.cache == cache_format
    assert cache_bytes(output) == shape.kv_bytes(batch=3, tokens=24, item=4)
    assert shape.kv_bytes(batch=3, tokens=24, item=2) < shape.in_floats().kv_bytes(
        batch=3, tokens=24, item=2
    )


def test_generate_of_transformers_takes_the_cache(small):
    model = marked(small, FORMATS[1])
    ids = torch.arange(5, 25)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    written = model.generate(ids, cache=QuantizedCache.of(model.config), **options)
    attend_to_stored(model)
    assert torch.equal(written, model.generate(ids, **options))


def test_rows_and_tokens_leave_the_codes():
    layer, draw = QuantizedLayer(FORMATS[1]), torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 6, 32, generator=draw), torch.randn(3, 2, 6, 32, generator=draw)
    keys, _ = layer.update(*states)
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-2)
    layer.batch_repeat_interleave(2)
    assert layer.get_seq_length() == 4 and layer.get_mask_sizes(3) == (7, 0)
    again, _ = layer.update(
        states[0][:1, :, :1].repeat(4, 1, 1, 1), states[1][:1, :, :1].repeat(4, 1, 1, 1)
    )
    assert torch.equal(again[:, :, :4], keys[[2, 2, 0, 0], :, :4])
    layer.reset()
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match="must be negative"):
        layer.crop(1)


def test_a_cache_of_windows_is_refused_by_name():
    from families import random_family

    model = random_family("Mistral")
    with pytest.raises(CellFailed, match=r"DynamicSlidingWindowLayer.*all tokens are quantized"):
        QuantizedCache(model.config, FORMATS[0])
    with pytest.raises(CellFailed, match="states no kv_cache_quantization"):
        QuantizedCache.of(model.config)
