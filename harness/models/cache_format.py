"""How a model stores the keys and values of its cache, as its `config.json` says it. No torch.

The setting belongs to the model: it travels in the student's folder, beside weights that may be
floats or packed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import HarnessError
from harness.models.checkpoint import read_model_json

CONFIG_KEY = "kv_cache_quantization"  # of config.json
_SCALE_BYTES = 2  # scales and offsets are float16
_KEYS = {"bits", "group"}


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """Keys and values in few bits: each token's and each head's by itself, in groups of channels.

    8 bits: symmetric, a scale a group. 4 bits: a scale and an offset a group.
    """

    bits: Literal[4, 8]
    group: int  # channels that share a scale; a head of another multiple is cut into equal parts

    @property
    def label(self) -> str:
        """A short name, such as int8-64."""
        return f"int{self.bits}-{self.group}"

    def group_of(self, head_size: int) -> int:
        """Return how many channels of a head share a scale: the largest number that divides both.

        A head of 80 channels in groups of 64 has groups of 16.
        """
        return math.gcd(self.group, head_size)

    def vector_bytes(self, head_size: int) -> int:
        """Return the bytes of one token's key, or value, in one head: codes, scales, offsets."""
        numbers = 2 if self.bits == 4 else 1  # of a group beside its codes
        groups = head_size // self.group_of(head_size)
        return math.ceil(head_size * self.bits / 8) + groups * numbers * _SCALE_BYTES


def cache_format_of(config: Any) -> CacheFormat | None:
    """Return the cache format that an opened model's configuration states; None for full floats.

    Raises `HarnessError` for a format that is not known here.
    """
    return _parsed(getattr(config, CONFIG_KEY, None), "config.json")


def stored_cache_format(folder: Path) -> CacheFormat | None:
    """Return the cache format that a model folder states; None for full floats."""
    path = folder / "config.json"
    return cache_format_in(read_model_json(path), str(path))


def cache_format_in(config: Mapping[str, Any], place: str) -> CacheFormat | None:
    """Return the cache format that the contents of a `config.json` state; `place` names the file.

    Raises `HarnessError` for a format that is not known here.
    """
    return _parsed(config.get(CONFIG_KEY), place)


def with_cache_format(config: Mapping[str, Any], cache_format: CacheFormat) -> dict[str, Any]:
    """Return the contents of a `config.json` with a cache format stated in it."""
    return {**config, CONFIG_KEY: asdict(cache_format)}


def _parsed(stated: object, place: str) -> CacheFormat | None:
    if stated is None:
        return None
    if isinstance(stated, Mapping) and set(stated) == _KEYS:
        bits, group = stated["bits"], stated["group"]
        is_number = type(bits) is int and type(group) is int
        if is_number and bits in (4, 8) and group >= 1:
            return CacheFormat(bits=bits, group=group)
    raise HarnessError(
        f"{place}: {CONFIG_KEY} is {stated!r:.80}, and must be an object of bits (4 or 8) and "
        "group (1 or more); make the student again with kv-int8 or kv-int4"
    )
