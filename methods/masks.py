"""Zeros that are a mask: how a pruned model says so, and which of its weights stay zero through
every later stage.
"""

from typing import Any

from torch import Tensor

_CONFIG_KEY = "pruned_weights_stay_zero"  # in config.json of what our pruning methods wrote
# share of exact zeros from which a matrix from elsewhere counts as pruned; a file of few bits,
# unpacked, has a tenth
_PRUNED_SHARE = 0.4


def mark_pruned(config: Any) -> None:
    """Say in a model's configuration that its zeros are a mask; every later stage keeps them."""
    setattr(config, _CONFIG_KEY, True)


def kept_weights(config: Any, weight: Tensor) -> Tensor | None:
    """Return which weights of a matrix stay, as booleans, where its zeros are a mask; else None."""
    stays = weight != 0
    share = 1 - float(stays.float().mean())
    return (
        stays
        if share >= _PRUNED_SHARE or (share > 0 and getattr(config, _CONFIG_KEY, False))
        else None
    )
