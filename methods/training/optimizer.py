"""How weights move: the learning rate's schedule, the optimizers, and zeros of pruned weights that
stay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.masks import kept_weights
from methods.training.settings import LoopSettings


def learning_rate_at(progress: float, settings: LoopSettings) -> float:
    """Return the learning rate at a share of the budget: linear warm-up, then cosine to zero."""
    if progress < settings.warmup_ratio:
        return settings.learning_rate * progress / settings.warmup_ratio
    after = (progress - settings.warmup_ratio) / (1 - settings.warmup_ratio)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))


def make_optimizers(
    model: Any, settings: LoopSettings
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimizer, share of the learning rate) pairs: AdamW, or Muon for the hidden matrices
    and AdamW beside it.

    Muon (Jordan et al., 2024) is for training from random weights: the embedded teachers need half
    the tokens with it.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2]
    rate, decay = settings.learning_rate, settings.weight_decay
    adam: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.95), "fused": True}
    if settings.optimizer == "muon":
        plain = [{"params": [embedding, *others], "weight_decay": 0.0}]
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay)
        return [(muon, 1.0), (torch.optim.AdamW(plain, **adam), 0.15)]
    groups = [
        {"params": [embedding, *matrices], "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [(torch.optim.AdamW(groups, **adam), 1.0)]


def projection_optimizer(
    projections: Any, settings: LoopSettings
) -> tuple[torch.optim.Optimizer, float]:
    """Return the (optimizer, share) pair of projections between two models' widths: they do not
    decay.
    """
    rate = settings.learning_rate
    return torch.optim.AdamW(projections.parameters(), lr=rate, weight_decay=0.0), 1.0


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of one training, as accelerate prepared them, and each one's share of the
    rate.
    """

    prepared: Sequence[Any]
    shares: Sequence[float]

    def set_rate(self, rate: float) -> None:
        """Give every optimizer its share of the learning rate."""
        for optimizer, share in zip(self.prepared, self.shares, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share

    def step(self) -> None:
        """Move the weights by their gradients, which are dropped."""
        for optimizer in self.prepared:
            optimizer.step()
            optimizer.zero_grad()


def freeze_zeros(model: Any) -> list[Any]:
    """Keep what a pruning method set to zero at zero; return the hooks that do so.

    The gradient there is dropped before it is clipped or used, and decay leaves 0 alone.
    """
    handles = []
    for parameter in model.parameters():
        if parameter.ndim < 2 or not parameter.requires_grad:
            continue
        stays = kept_weights(model.config, parameter.detach())
        if stays is not None:
            handles.append(_drop_gradient(parameter, stays))
    return handles


def _drop_gradient(parameter: Tensor, stays: Tensor) -> Any:
    def drop(weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.mul_(stays)

    return parameter.register_post_accumulate_grad_hook(drop)
