"""How weights move: the learning rate's schedule, the optimizers, and zeros that stay zero."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods.masks import kept_weights
from methods.training.bf16 import adamw_8bit
from methods.training.settings import LoopSettings

ADAMW_BETAS = (0.9, 0.95)


def learning_rate_at(progress: float, settings: LoopSettings) -> float:
    """Return the learning rate at a share of the budget: linear warm-up, then cosine to zero."""
    if progress < settings.warmup_ratio:
        return settings.learning_rate * progress / settings.warmup_ratio
    after_warmup = (progress - settings.warmup_ratio) / (1 - settings.warmup_ratio)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, after_warmup)))


class ScaledOptimizer(NamedTuple):
    """An optimizer, and the share of the learning rate that it gets."""

    optimizer: torch.optim.Optimizer
    share: float


def make_optimizers(model: Any, settings: LoopSettings) -> list[ScaledOptimizer]:
    """Return AdamW, with 8-bit moments where set; or Muon for hidden matrices, AdamW for the rest.

    Muon (Jordan et al., 2024) is for training from random weights: the embedded teachers need half
    the tokens with it.
    """
    embedding = model.get_input_embeddings().weight
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and p is not embedding]
    vectors = [p for p in trained if p.ndim < 2]
    embeddings = [embedding] if embedding.requires_grad else []
    rate, decay = settings.learning_rate, settings.weight_decay
    adamw_options: dict[str, Any] = {"lr": rate, "betas": ADAMW_BETAS, "fused": True}
    if settings.optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay)
        others = [{"params": [*embeddings, *vectors], "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(others, **adamw_options)
        return [ScaledOptimizer(muon, 1.0), ScaledOptimizer(adamw, 0.15)]
    groups = [
        {"params": [*embeddings, *matrices], "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw-8bit":
        device = str(trained[0].device)
        optimizer = adamw_8bit(groups, rate=rate, betas=ADAMW_BETAS, device=device)
        return [ScaledOptimizer(optimizer, 1.0)]
    return [ScaledOptimizer(torch.optim.AdamW(groups, **adamw_options), 1.0)]


def projection_optimizer(projections: Any, settings: LoopSettings) -> ScaledOptimizer:
    """Return the optimizer of projections between two models' widths: they do not decay."""
    parameters, rate = projections.parameters(), settings.learning_rate
    return ScaledOptimizer(torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0), 1.0)


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of one training, prepared by accelerate, and each one's share of the rate."""

    prepared: Sequence[Any]
    shares: Sequence[float]

    def set_rate(self, rate: float) -> None:
        """Give every optimizer its share of the learning rate."""
        for optimizer, share in zip(self.prepared, self.shares, strict=True):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's: another number is not accepted
                    group["lr"].fill_(rate * share)
                else:
                    group["lr"] = rate * share

    def step(self) -> None:
        """Move the weights by their gradients, then drop the gradients."""
        for optimizer in self.prepared:
            optimizer.step()
            optimizer.zero_grad()


def freeze_zeros(model: Any) -> list[Any]:
    """Keep the weights that a pruning method set to zero at zero; return the hooks that do so.

    Their gradient is dropped before it is clipped or used, and weight decay leaves 0 alone.
    """
    hooks = []
    for name, parameter in model.named_parameters():
        # an adapter's second factor begins at zero, and is no pruned matrix
        if parameter.ndim < 2 or not parameter.requires_grad or "lora_" in name:
            continue
        trained_mask = kept_weights(model.config, parameter.detach())
        if trained_mask is not None:
            hooks.append(_mask_gradient(parameter, trained_mask))
    return hooks


def _mask_gradient(parameter: Tensor, trained_mask: Tensor) -> Any:
    """Set the gradient to 0 wherever the mask is false; return the hook."""

    def mask_gradient(weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.mul_(trained_mask)

    return parameter.register_post_accumulate_grad_hook(mask_gradient)
