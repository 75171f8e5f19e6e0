"""How far a student is from a teacher's distribution, whole or of its likeliest tokens, at each
position.
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
    """Return the forward KL to a teacher's whole distribution, or to its likeliest tokens and their
    rest; (N,).
    """
    if teacher.top is not None:
        return top_k_kl(
            student_NV, teacher.top.ids_NK, teacher.top.log_p_NK, temperature=temperature
        )
    assert teacher.logits_NV is not None
    return forward_kl(student_NV, teacher.logits_NV, temperature=temperature)


def distribution_entropy(teacher: Distribution) -> Tensor:
    """Return a teacher's entropy at each position; (N,)."""
    if teacher.top is not None:
        return top_k_entropy(teacher.top.log_p_NK)
    assert teacher.logits_NV is not None
    return entropy(teacher.logits_NV)


def mixed_kl(at: Positions, weights_NM: Tensor, temperature: float) -> Tensor:
    """Return the forward KL to a mixture of teachers, weights (N, M) by position.

    Whole distributions are mixed as probabilities. Of kept likeliest tokens the supports differ, so
    the weighted KLs are added: the same up to a constant that the student cannot change, exact for
    whole distributions, a lower bound for cut ones.
    """
    whole = [one.logits_NV for one in at.teachers if one.logits_NV is not None and one.top is None]
    if len(whole) == len(at.teachers):
        return forward_kl(
            at.student_NV,
            ensemble(whole, weights_NM, temperature=temperature),
            temperature=temperature,
        )
    apart = torch.stack(
        [distribution_kl(at.student_NV, one, temperature) for one in at.teachers], dim=-1
    )
    return (apart * weights_NM / weights_NM.sum(-1, keepdim=True)).sum(-1)


def label_loss(teacher: Distribution, labels_N: Tensor) -> Tensor:
    """Return the cross-entropy of the labels under a teacher; a label outside the kept tokens
    counts as half of what they leave over.
    """
    if teacher.top is None:
        assert teacher.logits_NV is not None
        return cross_entropy(teacher.logits_NV, labels_N)
    found = teacher.top.ids_NK == labels_N[:, None]
    log_p = teacher.top.log_p_NK.float()
    rest = torch.log(0.5 * -torch.expm1(torch.logsumexp(log_p, -1).clamp(max=-1e-7)))
    return -torch.where(found.any(-1), log_p.masked_fill(~found, -torch.inf).amax(-1), rest)
