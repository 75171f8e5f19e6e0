"""Distillation losses as pure functions: fp32, summed over trained positions, never averaged.

Legend: N trained positions, V vocabulary. Every function returns a *sum*; the loop divides once, by the number
of trained tokens of the whole optimiser step, so that no split into micro-batches changes the gradient.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_NOTHING = -1e4  # a log-probability whose exponential is 0 in fp32, and which is finite


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of `-log q(label)` over positions (nats)."""
    return F.cross_entropy(student_NV.float(), labels_N, reduction="sum")


def _softened(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log q, log p): log-probabilities at a temperature, in fp32.

    An entry that is masked on both sides (-inf) becomes a very small number: its 0 * (-inf) must reach no product, and
    log(0 + 0) no gradient.
    """
    log_q = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    masked = torch.isneginf(log_q) & torch.isneginf(log_p)
    return log_q.masked_fill(masked, _NOTHING), log_p.masked_fill(masked, _NOTHING)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of KL(a || b); where a is nothing, it adds nothing."""
    difference = torch.where(torch.isneginf(log_a), torch.zeros_like(log_a), log_a - log_b)
    return (log_a.exp() * difference).sum()


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share a + (1 - share) b), never leaving the log domain."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of `tau^2 * KL(p^tau || q^tau)` over positions (Hinton et al., 2015): covers all that the teacher thinks possible.

    tau^2 keeps the gradient's size independent of tau: it is `tau * (q^tau - p^tau)` per position.
    """
    log_q, log_p = _softened(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of `tau^2 * KL(q^tau || p^tau)` over positions: seeks one of the teacher's modes (Gu et al., 2024, MiniLLM)."""
    log_q, log_p = _softened(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(student_NV: Tensor, teacher_NV: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """Sum of `tau^2 * (beta KL(p || m) + (1 - beta) KL(q || m))`, m = beta p + (1 - beta) q (Agarwal et al., 2024, GKD).

    0 < beta < 1. It tends to 0 like beta KL(p || q) at the ends: unlike in trl, beta 0 and 1 are no other names of the KLs.
    """
    log_q, log_p = _softened(student_NV, teacher_NV, temperature)
    log_m = _mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def skew_kl(student_NV: Tensor, teacher_NV: Tensor, *, alpha: float, temperature: float = 1.0) -> Tensor:
    """Sum of `tau^2 * KL(p || alpha p + (1 - alpha) q)`: its gradient stays bounded where q is near 0 (Ko et al., 2024, DistiLLM)."""
    log_q, log_p = _softened(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_p, _mixture(log_p, log_q, alpha))


def top_k_kl(student_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of `tau^2 * KL` over k + 1 outcomes: the teacher's k likeliest tokens and, as one, all others (the tail bucket).

    `log_p_NK` are the teacher's log-probabilities at temperature 1. A lower bound of the dense KL, equal at k = V - 1; it
    keeps the student from moving mass out of the support. At another temperature the tail is softened as one lump.
    """
    log_q_NV = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_q = _with_tail(torch.gather(log_q_NV, 1, ids_NK))
    log_p = torch.log_softmax(_with_tail(log_p_NK.float()) / temperature, dim=-1)
    return temperature**2 * _kl(log_p, log_q)


def _with_tail(log_NK: Tensor) -> Tensor:
    """Append the log of what the k probabilities leave over; never quite nothing."""
    kept = torch.logsumexp(log_NK, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_NK, torch.log(-torch.expm1(kept))], dim=-1)
