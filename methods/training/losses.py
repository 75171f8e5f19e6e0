"""Distillation losses as pure functions: fp32, one value per trained position, never averaged.

Legend: N trained positions, V vocabulary, W another vocabulary, K kept tokens; q is the student's
distribution, p the teacher's. Every function returns (N,), in nats. The loop sums and divides once,
by the number of trained tokens of the whole optimiser step, so that no split into micro-batches
changes the gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LOG_ZERO = -1e4  # a finite log-probability whose exponential is 0 in fp32


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return `-log q(label)`."""
    return F.cross_entropy(student_NV.float(), labels_N, reduction="none")


class _LogProbabilities(NamedTuple):
    student: Tensor  # log q, (N, V)
    teacher: Tensor  # log p, (N, V)


def _log_probabilities(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float
) -> _LogProbabilities:
    """Return both models' log-probabilities at a temperature, in fp32.

    A token that both sides mask (-inf) gets a very small number instead: 0 * (-inf) is NaN in a
    product, and so is the gradient of log(0 + 0).
    """
    log_q = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    masked = torch.isneginf(log_q) & torch.isneginf(log_p)
    return _LogProbabilities(
        student=log_q.masked_fill(masked, _LOG_ZERO), teacher=log_p.masked_fill(masked, _LOG_ZERO)
    )


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b); a token of probability 0 under a adds nothing."""
    difference = torch.where(torch.isneginf(log_a), torch.zeros_like(log_a), log_a - log_b)
    return (log_a.exp() * difference).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share a + (1 - share) b), computed in the log domain."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return `tau^2 * KL(p^tau || q^tau)` (Hinton et al., 2015).

    It covers all that the teacher thinks possible. tau^2 keeps the gradient's size independent of
    tau: it is `tau * (q^tau - p^tau)` per position.
    """
    loss_N: Tensor = _ForwardKL.apply(student_NV, teacher_NV, temperature)
    return loss_N


class _ForwardKL(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """The forward KL with a gradient written by hand, which saves memory.

    One (N, V) tensor is kept for the backward pass; autograd would keep five. As in
    `_log_probabilities`, a token of teacher probability 0 adds nothing, and its gradient is
    `tau q`.
    """

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        log_p = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
        log_q = torch.log_softmax(student_NV.float() / temperature, dim=-1)
        p = log_p.exp()
        difference = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)
        loss_N = temperature**2 * difference.mul_(p).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature))
            ctx.dtype = student_NV.dtype
        return loss_N

    @staticmethod
    # one output, hence one gradient
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [slope_NV] = ctx.saved_tensors
        return (slope_NV * gradients[0][:, None]).to(ctx.dtype), None, None


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return `tau^2 * KL(q^tau || p^tau)` (Gu et al., 2024, MiniLLM).

    It seeks one of the teacher's modes.
    """
    log_q, log_p = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(
    student_NV: Tensor, teacher_NV: Tensor, *, beta: float, temperature: float = 1.0
) -> Tensor:
    """Return `tau^2 * (beta KL(p || m) + (1 - beta) KL(q || m))`, m = beta p + (1 - beta) q.

    Agarwal et al., 2024 (GKD). 0 < beta < 1. Near the ends it goes to 0 like beta KL(p || q):
    unlike in trl, beta 0 and 1 do not mean the two KLs.
    """
    log_q, log_p = _log_probabilities(student_NV, teacher_NV, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def skew_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, alpha: float, temperature: float = 1.0
) -> Tensor:
    """Return `tau^2 * KL(p || alpha p + (1 - alpha) q)` (Ko et al., 2024, DistiLLM).

    Its gradient stays bounded where q is near 0.
    """
    log_q, log_p = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_p, _log_mixture(log_p, log_q, alpha))


def top_k_kl(
    student_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return `tau^2 * KL` over k + 1 outcomes: the teacher's k likeliest tokens and all others.

    `log_p_NK` are the teacher's log-probabilities at temperature 1. The other tokens count as one
    outcome, the tail: it keeps the student from moving mass out of the k tokens.

    Both sides are reduced to k + 1 outcomes at temperature 1 and softened after that, so that equal
    models have no loss at any temperature. (Softened first, a tail of V - k tokens would be
    compared with one softened outcome: 6 nats for equal models of a large vocabulary.) At
    temperature 1 the value is a lower bound of the dense KL; at k = V - 1 it equals the dense KL.
    """
    log_q = _with_tail(torch.gather(torch.log_softmax(student_NV.float(), dim=-1), 1, ids_NK))
    log_p = _with_tail(log_p_NK.float())
    log_q = torch.log_softmax(log_q / temperature, dim=-1)
    log_p = torch.log_softmax(log_p / temperature, dim=-1)
    return temperature**2 * _kl(log_p, log_q)


def _with_tail(log_NK: Tensor) -> Tensor:
    """Append the log of the probability that the k tokens leave over; it is kept above 0."""
    kept = torch.logsumexp(log_NK, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_NK, torch.log(-torch.expm1(kept))], dim=-1)


def ensemble(teachers: Sequence[Tensor], weights: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return logits (N, V) whose softmax at `temperature` is the mean `sum_k w_k p_k^tau`.

    `teachers` are K tensors of logits (N, V); `weights` are (N, K) or (K,), normalised here. A mean
    of logits would be the normalised geometric mean, where one teacher's veto or larger scale
    decides. The forward KL to this mean is the weighted sum of the forward KLs less a constant.
    """
    log_weights = torch.log(weights.float() / weights.float().sum(-1, keepdim=True))
    log_weights_NK = log_weights.expand(len(teachers[0]), len(teachers))
    weighted = [
        torch.log_softmax(logits_NV.float() / temperature, dim=-1) + log_weights_NK[:, k, None]
        for k, logits_NV in enumerate(teachers)
    ]
    return temperature * torch.logsumexp(torch.stack(weighted), dim=0)


def entropy(logits_NV: Tensor) -> Tensor:
    """Return `-sum p log p` of each position's distribution."""
    log_p = torch.log_softmax(logits_NV.float(), dim=-1)
    finite_log_p = torch.where(torch.isneginf(log_p), torch.zeros_like(log_p), log_p)
    return -(log_p.exp() * finite_log_p).sum(-1)


def top_k_entropy(log_p_NK: Tensor) -> Tensor:
    """Return the entropy over k + 1 outcomes: the kept tokens, and all others as one."""
    return entropy(_with_tail(log_p_NK.float()))


def universal_logit(student_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """Return `sum_i |sort(q)_i - sort(p)_i|` (Boizard et al., 2024, ULD).

    The shorter side is padded with 0. For vocabularies that have nothing in common: it compares the
    shapes of the distributions and ignores which token has which probability.
    """
    sorted_q, sorted_p = (
        torch.softmax(logits.float(), dim=-1).sort(dim=-1, descending=True).values
        for logits in (student_NV, teacher_NW)
    )
    width = max(sorted_q.shape[-1], sorted_p.shape[-1])
    padded_q = F.pad(sorted_q, (0, width - sorted_q.shape[-1]))
    padded_p = F.pad(sorted_p, (0, width - sorted_p.shape[-1]))
    return (padded_q - padded_p).abs().sum(-1)


def hidden_distance(student_NH: Tensor, teacher_NH: Tensor, *, kind: str) -> Tensor:
    """Return the distance of hidden states by `kind`: mse, cosine or plain-mse.

    mse: each state is first divided by its own root mean square. This equals 2 (1 - cos) and
    ignores scale, which differs by layer. cosine: 1 - cos. plain-mse: without that division; a few
    huge activations dominate it.
    """
    student, teacher = student_NH.float(), teacher_NH.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    if kind == "mse":
        student, teacher = unit_rms(student), unit_rms(teacher)
    return (student - teacher).square().mean(-1)


def unit_rms(states: Tensor) -> Tensor:
    """Return states (..., H), each divided by its own root mean square."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-12)


def attention_kl(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    """Return KL(a_T || a_S) of attention rows, the mean over heads, (B, T).

    `student` and `teacher` are scores before softmax, (B, R, T, T). `allowed`, (B, 1, T, T), is
    true for the keys that a query may see; the others take no part in softmax, product or gradient.
    Row 0 attends to itself alone and is always 0. Where the numbers of heads differ, each side's
    heads are averaged first: a mean of distributions is a distribution.
    """
    log_s, log_t = (
        torch.log_softmax(scores.float().masked_fill(~allowed, _LOG_ZERO), dim=-1)
        for scores in (student, teacher)
    )
    if student.shape[1] != teacher.shape[1]:
        log_s, log_t = _mean_over_heads(log_s), _mean_over_heads(log_t)
    log_s, log_t = log_s.masked_fill(~allowed, _LOG_ZERO), log_t.masked_fill(~allowed, _LOG_ZERO)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean(1)


def _mean_over_heads(log_attention: Tensor) -> Tensor:
    """Return the log of the mean attention of all heads, (B, 1, T, T)."""
    heads = log_attention.shape[1]
    return torch.logsumexp(log_attention, dim=1, keepdim=True) - math.log(heads)
