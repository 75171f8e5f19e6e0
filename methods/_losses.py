"""Distillation losses as pure functions: fp32, summed over trained positions, never averaged.

Legend: N trained positions, V vocabulary. Every function returns a *sum*; the loop divides once, by the number
of trained tokens of the whole optimiser step, so that no split into micro-batches changes the gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of `-log q(label)` over positions (nats)."""
    return F.cross_entropy(student_NV.float(), labels_N, reduction="sum")


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of `tau^2 * KL(p^tau || q^tau)` over positions (Hinton et al., 2015).

    tau^2 keeps the gradient's size independent of tau: it is `tau * (q^tau - p^tau)` per position.
    """
    log_q = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    # A masked vocabulary entry is -inf on both sides: its 0 * (-inf) must not reach the product.
    difference = torch.where(torch.isneginf(log_p), torch.zeros_like(log_p), log_p - log_q)
    return temperature**2 * (log_p.exp() * difference).sum()
