"""What a model keeps between two steps, by whatever name it hands it back: keys and values, windows
of them, states of recurrent layers.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# as transformers' versions and families call it
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")


def forward_arguments(model: Any) -> frozenset[str] | None:
    """Return the names of the arguments that a model's forward takes, None where a wrapper hides
    them.
    """
    for forward in (model.forward, type(model).forward):
        named = inspect.signature(forward).parameters
        if "input_ids" in named:
            return frozenset(named)
    return None


def cache_arguments(out: Any, named: Collection[str] | None) -> dict[str, Any]:
    """Return the cache in a model's output, by the name under which the next step hands it back; {}
    where there is none.

    An output may show one cache under several names, of which the forward takes one.
    """
    names = (
        name
        for name in CACHE_NAMES
        if (named is None or name in named) and name in out and out[name] is not None
    )
    return {name: out[name] for name in (names if named is not None else islice(names, 1))}


def cache_tensors(cache: Any) -> "Iterator[torch.Tensor]":
    """Yield every tensor that a cache holds, in layers of whatever kind, in dictionaries and lists,
    each object once.
    """
    import torch

    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            yield part
        elif id(part) not in seen and not isinstance(part, str | type | torch.nn.Module):
            seen.add(id(part))
            waiting += _children(part)


def _children(part: Any) -> list[Any]:
    """Return what a container or an object of a cache's own classes holds."""
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, list | tuple | set):
        return list(part)
    return list(getattr(part, "__dict__", {}).values())
