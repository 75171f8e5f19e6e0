"""What a model keeps between two steps: keys and values, windows of them, recurrent states."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The cache's name in outputs of transformers' versions and families.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")


def forward_arguments(model: Any) -> frozenset[str] | None:
    """Return the names of the arguments of a model's forward, None where a wrapper hides them."""
    for forward in (model.forward, type(model).forward):
        parameters = inspect.signature(forward).parameters
        if "input_ids" in parameters:
            return frozenset(parameters)
    return None


def decoding_options(accepted: Collection[str] | None) -> dict[str, Any]:
    """Return what every forward pass of a decoding asks for: a cache, and one position's logits.

    `accepted` are the names that the forward takes, None where a wrapper hides them.
    """
    return {
        name: value
        for name, value in (("use_cache", True), ("logits_to_keep", 1))
        if accepted is None or {name, "kwargs"} & set(accepted)
    }


def cache_arguments(output: Any, accepted: Collection[str] | None) -> dict[str, Any]:
    """Return the cache in a model's output as keyword arguments of the next step, {} without one.

    An output may hold one cache under several names, of which the forward accepts one.
    """
    names = [name for name in CACHE_NAMES if name in output and output[name] is not None]
    if accepted is None:
        names = names[:1]
    return {name: output[name] for name in names if accepted is None or name in accepted}


def cache_tensors(cache: Any) -> "Iterator[torch.Tensor]":
    """Yield every tensor in a cache, in layers of any kind, dictionaries and lists.

    Each object is visited once.
    """
    import torch

    visited: set[int] = set()
    pending = [cache]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif id(value) not in visited and not isinstance(value, str | type | torch.nn.Module):
            visited.add(id(value))
            pending += _children(value)


def _children(value: Any) -> list[Any]:
    """Return what a container, or an object of a cache's own classes, holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())
