"""Silences what a model draws at random while it trains: dropout and other noise.

With noise a gradient would depend on how a step is split into micro-batches. Noise comes in many
forms: dropout modules, numbers on modules or in a configuration that a function reads
(`attention_dropout`, `resid_pdrop`), whole blocks left out (`layerdrop`), noise on routers
(`jitter`). All that go by such a name are set to 0 while training lasts. Then two passes in train
mode must agree, or the model is refused: some noise has a name that is not known here.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.errors import CellFailed, in_one_line
from harness.models.blocks import probe_ids

_NOISE_NAME = re.compile(r"drop|jitter|noise")
MAX_RELATIVE_GAP = 1e-4  # of the largest logit: the order of sums alone


class NoiseValue(NamedTuple):
    """A number that was set to 0: the object that holds it, its name there, and its value."""

    holder: Any  # a module or a configuration
    name: str
    value: float


def silence_noise(model: Any) -> list[NoiseValue]:
    """Set every dropout and noise of a model to 0; return what `restore_noise` needs afterwards."""
    silenced: list[NoiseValue] = []
    holders: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            silenced.append(NoiseValue(module, "p", module.p))
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            if hasattr(holder, "__dict__"):
                holders[id(holder)] = holder
    for holder in holders.values():
        for name, value in list(vars(holder).items()):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if _NOISE_NAME.search(name) and is_number and value:
                silenced.append(NoiseValue(holder, name, value))
                setattr(holder, name, 0.0)
    return silenced


def restore_noise(silenced: list[NoiseValue]) -> None:
    """Give every dropout its value again: the student's configuration then equals its base's."""
    for holder, name, value in silenced:
        setattr(holder, name, value)


def refuse_noise(model: Any) -> None:
    """Raise `CellFailed` for a model whose two passes in train mode differ."""
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
            f"{type(model).__name__} draws something at random while it trains, under a name that "
            f"is not known here (two passes differ by {gap:.2g} of the largest logit), so its "
            "gradient would depend on the batch; use a method that does not train"
        )
