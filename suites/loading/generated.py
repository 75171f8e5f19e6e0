"""Fixed, disjoint splits for tasks whose items are made by a seeded generator.

An item belongs to the split that the digest of its own text names, so two splits cannot share an
item whatever the generator does; a split is the first `size` distinct items of its bucket in a
seeded stream.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

# Buckets of 32: 26 train, 2 validation, 3 test, 1 dev (few-shot examples).
_BUCKETS = {
    "train": range(26),
    "validation": range(26, 28),
    "test": range(28, 31),
    "dev": range(31, 32),
}

Item = dict[str, Any]


def bucket(text: str) -> int:
    """Return which of the 32 buckets a text falls into, the same on every platform."""
    return hashlib.sha256(text.encode()).digest()[0] % 32


def generate_split(
    name: str,
    *,
    generate: Callable[[random.Random], Item],
    identity: Callable[[Item], str],
    sizes: Mapping[str, int],
    seed: str,
) -> Iterator[Item]:
    """Yield the items of split `name`, lazily and always in the same order.

    `identity` is the text by which two items are the same question; it decides the bucket and drops
    repeats.
    """
    wanted = _BUCKETS[name]
    stream = random.Random(f"{seed}/{name}")
    seen: set[str] = set()

    def items() -> Iterator[Item]:
        while True:
            item = generate(stream)
            text = identity(item)
            if bucket(text) in wanted and text not in seen:
                seen.add(text)
                yield item

    return islice(items(), sizes[name])
