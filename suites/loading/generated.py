"""Fixed, disjoint splits for tasks whose items a seeded generator makes.

The digest of an item's text decides its split, so that two splits never share an item, whatever the
generator does. A split is the first `size` distinct items of its buckets in a seeded stream.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

# 32 buckets: 26 train, 2 validation, 3 test, 1 dev (few-shot examples).
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

    Two items with the same `identity` text are the same question: it decides the bucket, and the
    second one is dropped.
    """
    buckets = _BUCKETS[name]
    stream = random.Random(f"{seed}/{name}")
    yielded: set[str] = set()

    def items() -> Iterator[Item]:
        while True:
            item = generate(stream)
            text = identity(item)
            if bucket(text) in buckets and text not in yielded:
                yielded.add(text)
                yield item

    return islice(items(), sizes[name])
