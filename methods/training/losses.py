"""Distillation losses as pure functions: fp32, one value a trained position, never averaged.

Legend: N trained positions, V vocabulary, W another vocabulary, K kept tokens. Every function
returns (N,), in nats; the loop sums and divides once, by the number of trained tokens of the whole
optimiser step, so that no split into micro-batches changes the gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LOG_ZERO = -1e4  # a log-probability whose exponential is 0 in fp32, and which is finite


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return `-log q(label)`."""
    return F.cross_entropy(student_NV.float(), labels_N, reduction="none")


def _log_probabilities(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (log q, log p): log-probabilities at a temperature, in fp32.

    An entry that is masked on both sides (-inf) becomes a very small number: its 0 * (-inf) must
    reach no product, and log(0 + 0) no gradient.
    """
    log_q = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    masked = torch.isneginf(log_q) & torch.isneginf(log_p)
    return log_q.masked_fill(masked, _LOG_ZERO), log_p.masked_fill(masked, _LOG_ZERO)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b); where a is nothing, it adds nothing."""
    difference = torch.where(torch.isneginf(log_a), torch.zeros_like(log_a), log_a - log_b)
    return (log_a.exp() * difference).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share a + (1 - share) b), never leaving the log domain."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return `tau^2 * KL(p^tau || q^tau)` (Hinton et al., 2015): covers all that the teacher thinks
    possible.

    tau^2 keeps the gradient's size independent of tau: it is `tau * (q^tau - p^tau)` per position.
    """
    found: Tensor = _ForwardKL.apply(student_NV, teacher_NV, temperature)
    return found


class _ForwardKL(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """The forward KL with its gradient written down: one (N, V) tensor is kept for the backward
    pass, where autograd would keep five.

    As in `_softened`, what the teacher thinks impossible adds nothing, and its gradient is `tau q`.
    """

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        log_p = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
        log_q = torch.log_softmax(student_NV.float() / temperature, dim=-1)
        p = log_p.exp()
        difference = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)
        value = temperature**2 * difference.mul_(p).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature))
            ctx.dtype = student_NV.dtype
        return value

    @staticmethod
    # one output, hence one gradient
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        [slope_NV] = ctx.saved_tensors
        return (slope_NV * grads[0][:, None]).to(ctx.dtype), None, None


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return `tau^2 * KL(q^tau || p^tau)`: seeks one of the teacher's modes (Gu et al., 2024,
    MiniLLM).
    """
    log_q, log_p = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(
    student_NV: Tensor, teacher_NV: Tensor, *, beta: float, temperature: float = 1.0
) -> Tensor:
    """Return `tau^2 * (beta KL(p || m) + (1 - beta) KL(q || m))`, m = beta p + (1 - beta) q
    (Agarwal et al., 2024, GKD).

    0 < beta < 1. It tends to 0 like beta KL(p || q) at the ends: unlike in trl, beta 0 and 1 are no
    other names of the KLs.
    """
    log_q, log_p = _log_probabilities(student_NV, teacher_NV, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def skew_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, alpha: float, temperature: float = 1.0
) -> Tensor:
    """Return `tau^2 * KL(p || alpha p + (1 - alpha) q)`: its gradient stays bounded where q is near
    0 (Ko et al., 2024, DistiLLM).
    """
    log_q, log_p = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_p, _log_mixture(log_p, log_q, alpha))


def top_k_kl(
    student_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return `tau^2 * KL` over k + 1 outcomes: the teacher's k likeliest tokens and, as one, all
    others (the tail bucket).

    `log_p_NK` are the teacher's log-probabilities at temperature 1. The tail keeps the student from
    moving mass out of the support. Both sides are gathered to k + 1 outcomes at temperature 1 and
    softened after that, so that equal models have no loss at any temperature (a tail of V - k
    softened tokens against one softened lump would be 6 nats for equal models of a large
    vocabulary). At temperature 1 it is a lower bound of the dense KL; at k = V - 1 it equals it.
    """
    log_q = _with_tail(torch.gather(torch.log_softmax(student_NV.float(), dim=-1), 1, ids_NK))
    log_p = _with_tail(log_p_NK.float())
    log_q, log_p = (torch.log_softmax(one / temperature, dim=-1) for one in (log_q, log_p))
    return temperature**2 * _kl(log_p, log_q)


def _with_tail(log_NK: Tensor) -> Tensor:
    """Append the log of what the k probabilities leave over; never quite nothing."""
    kept = torch.logsumexp(log_NK, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_NK, torch.log(-torch.expm1(kept))], dim=-1)


def ensemble(teachers: Sequence[Tensor], weights: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return logits (N, V) whose softmax at `temperature` is the arithmetic mean `sum_k w_k
    p_k^tau`.

    `teachers` are K tensors (N, V), `weights` (N, K) or (K,), normalised here. Averaging logits
    instead gives the normalised geometric mean, where one teacher's veto or larger scale decides.
    The forward KL to this mean is the weighted sum of the forward KLs less a constant.
    """
    log_w = torch.log(weights.float() / weights.float().sum(-1, keepdim=True)).expand(
        len(teachers[0]), len(teachers)
    )
    logs = [
        torch.log_softmax(one.float() / temperature, dim=-1) + log_w[:, k, None]
        for k, one in enumerate(teachers)
    ]
    return temperature * torch.logsumexp(torch.stack(logs), dim=0)


def entropy(logits_NV: Tensor) -> Tensor:
    """Return `-sum p log p` of each position's distribution."""
    log_p = torch.log_softmax(logits_NV.float(), dim=-1)
    return -(log_p.exp() * torch.where(torch.isneginf(log_p), torch.zeros_like(log_p), log_p)).sum(
        -1
    )


def top_k_entropy(log_p_NK: Tensor) -> Tensor:
    """Return the entropy over k + 1 outcomes: the kept tokens and, as one, the rest."""
    return entropy(_with_tail(log_p_NK.float()))


def universal_logit(student_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """Return `sum_i |sort(q)_i - sort(p)_i|`, the shorter side padded with 0 (Boizard et al., 2024,
    ULD).

    For vocabularies that have nothing in common: it compares shapes of distributions and knows no
    token.
    """
    sorted_q, sorted_p = (
        torch.softmax(one.float(), dim=-1).sort(dim=-1, descending=True).values
        for one in (student_NV, teacher_NW)
    )
    width = max(sorted_q.shape[-1], sorted_p.shape[-1])
    sorted_q, sorted_p = (F.pad(one, (0, width - one.shape[-1])) for one in (sorted_q, sorted_p))
    return (sorted_q - sorted_p).abs().sum(-1)


def hidden_distance(student_NH: Tensor, teacher_NH: Tensor, *, kind: str) -> Tensor:
    """Return the distance of hidden states: `mse` after each is divided by its own root mean
    square, `cosine` (1 - cos), or `plain-mse`.

    The first equals 2 (1 - cos) and ignores scale, which differs by layer; the plain one is
    dominated by a few huge activations.
    """
    student, teacher = student_NH.float(), teacher_NH.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    if kind == "mse":
        student, teacher = (
            F.rms_norm(one, one.shape[-1:], eps=1e-12) for one in (student, teacher)
        )
    return (student - teacher).square().mean(-1)


def attention_kl(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    """Return KL(a_T || a_S) of attention rows, mean over heads: scores (B, R, T, T) before softmax,
    `allowed` (B, 1, T, T) keys; (B, T).

    Row 0 attends to itself alone and is always 0. Keys that a query may not see take no part in
    softmax, product or gradient. Where the numbers of heads differ, each side's heads are averaged
    first: the mean of distributions is one.
    """
    logs = [
        torch.log_softmax(one.float().masked_fill(~allowed, _LOG_ZERO), dim=-1)
        for one in (student, teacher)
    ]
    if student.shape[1] != teacher.shape[1]:
        logs = [torch.logsumexp(one, dim=1, keepdim=True) - math.log(one.shape[1]) for one in logs]
    log_s, log_t = (one.masked_fill(~allowed, _LOG_ZERO) for one in logs)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean(1)
