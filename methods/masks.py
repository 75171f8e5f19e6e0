"""Pruned weights stay zero in every later stage: how a model says that its zeros are a mask."""

from typing import Any

from torch import Tensor

_CONFIG_KEY = "pruned_weights_stay_zero"  # in config.json of what our pruning methods wrote
# A matrix that another program pruned is recognised from this share of exact zeros on. A file of
# few bits, unpacked, has a tenth.
_PRUNED_SHARE = 0.4


def mark_pruned(config: Any) -> None:
    """Note in a model's configuration that its zeros are a mask, which later stages keep."""
    setattr(config, _CONFIG_KEY, True)


def zeros_stay(config: Any) -> bool:
    """Tell whether a model's configuration says that its zeros are a mask."""
    return bool(getattr(config, _CONFIG_KEY, False))


def kept_weights(config: Any, weight: Tensor) -> Tensor | None:
    """Return which weights of a pruned matrix are kept, as booleans; None where none was pruned."""
    keep_mask = weight != 0
    zero_share = 1 - float(keep_mask.float().mean())
    marked = zero_share > 0 and zeros_stay(config)
    return keep_mask if marked or zero_share >= _PRUNED_SHARE else None
