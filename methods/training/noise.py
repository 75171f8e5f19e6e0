"""Silences what a model draws at random while it trains: a gradient must not depend on how a step
is split into micro-batches.

Dropout comes in many forms: modules, numbers on modules or in a configuration that a function reads
(`attention_dropout`, `resid_pdrop`), whole blocks left out (`layerdrop`), noise on routers
(`jitter`). All that go by such a name are set to 0 while training lasts; then two passes in train
mode must agree, or the model is refused: whatever is left was found by no name.
"""

import re
from typing import Any

import torch
from torch import nn

from harness.errors import CellFailed, in_one_line
from harness.models.blocks import probe_ids

_NOISE = re.compile(r"drop|jitter|noise")
MAX_RELATIVE_GAP = 1e-4  # of the largest logit: the order of sums alone


def silence_noise(model: Any) -> list[tuple[Any, str, Any]]:
    """Set every dropout and noise of a model to 0; return what to give to `restored` when training
    is over.
    """
    before: list[tuple[Any, str, Any]] = []
    holders: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            before.append((module, "p", module.p))
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            if hasattr(holder, "__dict__"):
                holders[id(holder)] = holder
    for holder in holders.values():
        for name, value in list(vars(holder).items()):
            if (
                _NOISE.search(name)
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and value
            ):
                before.append((holder, name, value))
                setattr(holder, name, 0.0)
    return before


def restore_noise(before: list[tuple[Any, str, Any]]) -> None:
    """Give every dropout its own value again: a student's configuration says what its
    base's did.
    """
    for holder, name, value in before:
        setattr(holder, name, value)


def refuse_noise(model: Any) -> None:
    """Raise `CellFailed` for a model of which two passes in train mode do not agree."""
    ids = probe_ids(model)
    was_training = model.training
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.train()
            first, second = (model(input_ids=ids, use_cache=False).logits.float() for _ in range(2))
    except Exception as problem:  # whatever its class raises in train mode alone
        raise CellFailed(
            f"{type(model).__name__} cannot be trained on text alone ({in_one_line(problem)})"
        ) from problem
    finally:
        model.train(was_training)
    gap = float((first - second).abs().max()) / max(float(first.abs().max()), 1e-6)
    if gap > MAX_RELATIVE_GAP:
        raise CellFailed(
            f"{type(model).__name__} draws something at random while it trains that goes by no "
            "name known here (two passes differ by "
            f"{gap:.2g} of the largest logit), so its gradient would depend on the batch; use a "
            "method that does not train"
        )
