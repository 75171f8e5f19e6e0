"""How far a student is from a teacher's distribution at each position.

The distribution is complete, or cut to its likeliest tokens.
"""

import torch
from torch import Tensor

from methods.training.losses import (
    cross_entropy,
    ensemble,
    entropy,
    forward_kl,
    top_k_entropy,
    top_k_kl,
)
from methods.training.positions import Distribution, Positions


def distribution_kl(student_NV: Tensor, teacher: Distribution, temperature: float) -> Tensor:
    """Return the forward KL to a teacher's distribution, complete or cut to k tokens, (N,)."""
    if teacher.top is not None:
        return top_k_kl(
            student_NV, teacher.top.ids_NK, teacher.top.log_p_NK, temperature=temperature
        )
    assert teacher.logits_NV is not None
    return forward_kl(student_NV, teacher.logits_NV, temperature=temperature)


def distribution_entropy(teacher: Distribution) -> Tensor:
    """Return a teacher's entropy at each position, (N,)."""
    if teacher.top is not None:
        return top_k_entropy(teacher.top.log_p_NK)
    assert teacher.logits_NV is not None
    return entropy(teacher.logits_NV)


def mixed_kl(positions: Positions, weights_NM: Tensor, temperature: float) -> Tensor:
    """Return the forward KL to a mixture of M teachers, with weights (N, M) by position; (N,).

    Complete distributions are mixed as probabilities. Cut ones keep different tokens, so the
    weighted KLs are added instead. That differs by a constant that the student cannot change for
    complete distributions, and is a lower bound for cut ones.
    """
    logits = [
        teacher.logits_NV
        for teacher in positions.teachers
        if teacher.logits_NV is not None and teacher.top is None
    ]
    if len(logits) == len(positions.teachers):
        mixture_NV = ensemble(logits, weights_NM, temperature=temperature)
        return forward_kl(positions.student_NV, mixture_NV, temperature=temperature)
    divergences = [
        distribution_kl(positions.student_NV, teacher, temperature)
        for teacher in positions.teachers
    ]
    divergences_NM = torch.stack(divergences, dim=-1)
    return (divergences_NM * weights_NM / weights_NM.sum(-1, keepdim=True)).sum(-1)


def label_loss(teacher: Distribution, labels_N: Tensor) -> Tensor:
    """Return the cross-entropy of the labels under a teacher, (N,).

    A label outside the kept tokens counts as half of the probability that they leave over.
    """
    if teacher.top is None:
        assert teacher.logits_NV is not None
        return cross_entropy(teacher.logits_NV, labels_N)
    is_label_NK = teacher.top.ids_NK == labels_N[:, None]
    log_p_NK = teacher.top.log_p_NK.float()
    log_kept = torch.logsumexp(log_p_NK, -1).clamp(max=-1e-7)
    log_half_tail = torch.log(0.5 * -torch.expm1(log_kept))
    log_p_label = log_p_NK.masked_fill(~is_label_NK, -torch.inf).amax(-1)
    return -torch.where(is_label_NK.any(-1), log_p_label, log_half_tail)
