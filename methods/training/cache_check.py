"""Compares a teacher's cache with a live forward pass, as finely as the teacher computes.

In float32 two passes agree to the digits that are kept. In bf16 they do not: a logit is rounded to
8 bits, in another way for each shape of a batch, so two passes differ in proportion to the logits'
size, and a limit in nats refuses good caches of teachers with large logits. So the differences are
counted in roundings: 2^-8 of the largest logit of the position is the most that one rounding to
bf16 moves any of its logits. Multiplied logits have multiplied roundings, and the count stays.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.scoring.backend import TopK

TOLERANCE = 0.02  # nats, in float32: fp16 keeps a log-probability of -16 to 0.008
LIKELY = -12.0  # log-probabilities above it are compared: the loss hardly reads others
_BF16_ROUNDING = 2.0**-8  # the most by which rounding to 8 bits moves a number, as a share of it
# Roundings, by mean and by 99.9th percentile. Two passes whose logits are rounded independently,
# and are right else, differ by 1/3 to 2/3 on average where all logits are as large as the largest.
# Measured (docs/design.md): right caches 0.0 to 0.4 and 0.8 to 6.7, the latter with 80 blocks;
# a teacher whose weights moved by a hundredth 1.6 and 11, another teacher 71 and 220.
MEAN_ROUNDINGS, LARGEST_ROUNDINGS = 1.0, 16.0


class Differences(NamedTuple):
    """How far cached log-probabilities are from live ones."""

    nats: Tensor  # (M,), of M likely tokens of several positions
    roundings: Tensor  # (M,), the same in roundings to bf16 of the position's largest logit


def differences(cached_NK: Tensor, live_NK: Tensor, live: TopK, steps_N1: Tensor) -> Differences:
    """Return how far cached log-probabilities (N, K) are from live ones of the same tokens.

    `live` is the whole distribution. `steps_N1` is what the cache's own form may have moved a
    value by; only what goes beyond it counts.
    """
    is_likely = live_NK > LIKELY
    gap_NK = ((cached_NK - live_NK).abs() - steps_N1).clamp(min=0)
    normaliser_N1 = 0.0 if live.normaliser_N is None else live.normaliser_N[:, None]
    logits_NV = torch.where(live.log_p_NK > LIKELY, live.log_p_NK + normaliser_N1, 0.0)
    # and 1: what float16, in which log-probabilities are kept, rounds away
    size_N1 = logits_NV.abs().amax(1, keepdim=True) + 1
    roundings_NK = gap_NK / (_BF16_ROUNDING * size_N1)
    return Differences(gap_NK[is_likely].cpu(), roundings_NK[is_likely].cpu())


class CacheVerdict(NamedTuple):
    """Whether a cache agrees with the teacher, and how far it is from it."""

    agrees: bool
    text: str


def verdict(rows: list[Differences], *, is_bf16: bool) -> CacheVerdict:
    """Judge the differences of several rows.

    For bf16 the 99.9th percentile and the mean are judged, not the largest one: among so many
    values, one or two always round far away.
    """
    nats = torch.cat([row.nats for row in rows]).double()
    roundings = torch.cat([row.roundings for row in rows]).double()
    if not len(nats):
        return CacheVerdict(True, "")
    if not is_bf16:
        gap = float(nats.max())
        return CacheVerdict(
            gap <= TOLERANCE,
            f"by {gap:.3f} nats at most and by {float(nats.mean()):.3f} on average",
        )
    most, mean = _quantile(roundings), float(roundings.mean())
    text = (
        f"by {_quantile(nats):.3f} nats at the 99.9th percentile and by {float(nats.mean()):.3f} "
        f"on average ({most:.1f} and {mean:.2f} roundings to bf16; {LARGEST_ROUNDINGS:g} and "
        f"{MEAN_ROUNDINGS:g} are allowed)"
    )
    return CacheVerdict(most <= LARGEST_ROUNDINGS and mean <= MEAN_ROUNDINGS, text)


def _quantile(values: Tensor) -> float:
    """Return the 99.9th percentile, as numpy takes it."""
    return float(np.quantile(values.numpy(), 0.999))
