"""Attention that sees keys and values as a quantized cache stores them. Imports no torch itself.

A model that states a cache format computes with them everywhere, with and without a cache: a
stored number depends on its own token alone, so a text that is read at once, padded, packed or
token by token is attended to as if it were decoded. Reading, scoring and training need no cache
for it. The scorer's own attention (`harness/scoring/prefix_sharing.py`) rounds too, and its slots
hold the floats that codes stand for: the same numbers, in the memory of floats. What codes take is
measured in the process that times a model, which has `quantized_cache` and its own attention.

Shapes: B rows, K heads of keys, T tokens, D channels of a head.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import CellFailed
from harness.models.cache_format import CacheFormat, cache_format_of

if TYPE_CHECKING:
    import torch

_PREFIX = "harness-kv-"
_OWN = "sdpa"  # the attention that computes with what is stored
_FORMATS: dict[str, CacheFormat] = {}  # by the name of the attention


class KeysAndValues(NamedTuple):
    """Keys and values of tokens, (B, K, T, D) each."""

    keys: "torch.Tensor"
    values: "torch.Tensor"


def attend_to_stored(model: Any) -> None:
    """Let a model that states a cache format attend to what that cache would store.

    Nothing is done to another model. Raises `CellFailed` where its attention cannot be replaced.
    """
    cache_format = cache_format_of(model.config)
    if cache_format is None:
        return
    name = _registered(cache_format)
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == name:
        return
    if config._attn_implementation not in (_OWN, *_FORMATS):
        raise CellFailed(
            f"its attention is {config._attn_implementation}, and a quantized cache is computed "
            f"with {_OWN}; open it with attn_implementation={_OWN!r}, or leave kv-int8 and kv-int4"
        )
    model.set_attn_implementation(name)
    if config._attn_implementation != name:
        raise CellFailed(
            f"the attention of {type(model).__name__} cannot be replaced, so no quantized cache "
            "can be computed with; leave kv-int8 and kv-int4"
        )


def format_of_attention(name: str | None) -> CacheFormat | None:
    """Return the cache format that an attention of this name rounds to; None if it does not."""
    return _FORMATS.get(name or "")


def as_attended(name: str | None, keys: "torch.Tensor", values: "torch.Tensor") -> KeysAndValues:
    """Return keys and values as an attention of this name sees them."""
    cache_format = format_of_attention(name)
    return (
        KeysAndValues(keys, values) if cache_format is None else stored(keys, values, cache_format)
    )


def stored(
    keys: "torch.Tensor", values: "torch.Tensor", cache_format: CacheFormat
) -> KeysAndValues:
    """Return keys and values as a cache of this format gives them back."""
    from harness.models.cache_codes import as_stored

    return KeysAndValues(as_stored(keys, cache_format), as_stored(values, cache_format))


def _registered(cache_format: CacheFormat) -> str:
    """Register the attention of a format with transformers; return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = f"{_PREFIX}{cache_format.label}"
    if name not in _FORMATS:
        AttentionInterface.register(name, partial(_attend, cache_format))
        AttentionMaskInterface.register(name, sdpa_mask)
        _FORMATS[name] = cache_format
    return name


def _attend(
    cache_format: CacheFormat,
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: Any,
    **options: Any,
) -> Any:
    """Round keys and values to what is stored of them, then attend as transformers does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    keys, values = stored(key, value, cache_format)
    return ALL_ATTENTION_FUNCTIONS[_OWN](module, query, keys, values, attention_mask, **options)
