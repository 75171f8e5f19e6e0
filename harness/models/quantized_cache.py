"""A transformers cache that stores keys and values in int8 or int4. Imports torch and transformers.

Whoever opens a `kv-int8` or `kv-int4` student with transformers alone gives it one:

    model.generate(ids, cache=QuantizedCache.of(model.config))

transformers' own quantized caches are not used. They attend to a prompt in full floats, so a text
that is read at once sees no quantized token; and when their window of recent tokens is full they
quantize again what they have dequantized, so numbers depend on how a text was cut into steps. Here
every token is stored once, when it is read, and is seen as it is stored from then on, by itself
too.

Shapes: B rows, K heads of keys, T tokens, D channels of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from harness.errors import CellFailed
from harness.models.cache_codes import Codes, decode, encode
from harness.models.cache_format import CONFIG_KEY, CacheFormat, cache_format_of
from harness.models.states import CACHE_NAMES, forward_arguments


class QuantizedCache(Cache):  # type: ignore[misc]
    """The cache of a model whose layers all attend to all earlier tokens."""

    def __init__(self, config: Any, cache_format: CacheFormat) -> None:
        """Make an empty cache. Raises `CellFailed` for a model with layers of another kind."""
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        others = sorted(kind.__name__ for kind in kinds - {DynamicLayer})
        if others:
            raise CellFailed(
                f"its cache has layers of transformers' {', '.join(others)}, and only layers that "
                "keep the keys and values of all tokens are quantized"
            )
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[QuantizedLayer(cache_format) for _ in range(count)])

    @classmethod
    def of(cls, config: Any) -> "QuantizedCache":
        """Return an empty cache in the format that a student's configuration states."""
        cache_format = cache_format_of(config)
        if cache_format is None:
            raise CellFailed(
                f"this configuration states no {CONFIG_KEY}; make the student by kv-int8 or kv-int4"
            )
        return cls(config, cache_format)


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The codes of one layer's keys and values; every call of `update` decodes all of them."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache_format: CacheFormat) -> None:
        super().__init__()
        self.cache_format = cache_format
        self.stored: list[Codes] = []  # of keys, and of values; empty before the first token

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember type and device, and store no token."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stored = [
            encode(states[:, :, :0], self.cache_format) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, (B, K, T, D) each; return all as they are stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.stored[0].codes.shape[0] != key_states.shape[0]:  # made for another batch
            self._apply(lambda part: part.expand(key_states.shape[0], *part.shape[1:]))
        new = [encode(states, self.cache_format) for states in (key_states, value_states)]
        self.stored = [
            _joined(before, after) for before, after in zip(self.stored, new, strict=True)
        ]
        keys, values = (decode(part, self.dtype) for part in self.stored)
        return keys, values

    def _apply(self, change: Any) -> None:
        """Change every stored tensor, whose first dimension is rows and third is tokens."""
        self.stored = [
            Codes(*(part if part is None else change(part) for part in codes))
            for codes in self.stored
        ]

    def get_seq_length(self) -> int:
        """Return how many tokens are stored."""
        return int(self.stored[0].codes.shape[-2]) if self.stored else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a query sees with its own, and the place of the first one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no longest text."""
        return -1

    def reset(self) -> None:
        """Forget every token."""
        self.stored, self.is_initialized = [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; as in transformers, their number is negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): the number of tokens must be negative")
        kept = self.get_seq_length() + tokens_to_remove
        self._apply(lambda part: part[:, :, : max(0, kept)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows into another order."""
        self._apply(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._apply(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        self._apply(lambda part: part[indices])

    def offload(self) -> None:
        """Refuse: codes stay on their device."""
        raise NotImplementedError("a quantized cache is not moved between devices")

    prefetch = offload


def _joined(before: Codes, after: Codes) -> Codes:
    """Return the codes of tokens followed by those of later ones."""
    return Codes(
        *(
            None if first is None or second is None else torch.cat([first, second], dim=-2)
            for first, second in zip(before, after, strict=True)
        )
    )


def give_quantized_cache(model: Any) -> None:
    """Let a model that states a cache format make such a cache wherever it is called with none.

    Its attention must be its own: `harness.models.stored_attention` rounds in another place.
    """
    cache_format = cache_format_of(model.config)
    if cache_format is None:
        return
    accepted = forward_arguments(model) or frozenset()
    argument = next((name for name in CACHE_NAMES if name in accepted), "past_key_values")

    def add_cache(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        if named.get("use_cache") and all(named.get(name) is None for name in CACHE_NAMES):
            named[argument] = QuantizedCache(module.config, cache_format)
        return arguments, named

    model.register_forward_pre_hook(add_cache, with_kwargs=True)
