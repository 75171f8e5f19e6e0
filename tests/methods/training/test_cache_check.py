"""When a cache agrees with its teacher: at every size of the logits, and never with another one."""

import pytest
import torch

from harness.scoring.backend import TopK
from methods.training.cache_check import differences, verdict

POSITIONS, VOCABULARY, WIDTH = 400, 3_000, 64


def logits_of(scale=1.0, shift=0.0, seed=0):
    """Return logits (N, V) in bf16, of a head over random states."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(POSITIONS, WIDTH, generator=generator)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator) * 3 / WIDTH**0.5
    return (states @ head.T) * scale + shift


def read_in_bf16(logits, noise, seed):
    """Return what a pass in bf16 makes of logits: states that are a little off, and a rounding."""
    generator = torch.Generator().manual_seed(seed)
    off = torch.randn(logits.shape, generator=generator) * noise * logits.std(1, keepdim=True)
    return (logits + off).to(torch.bfloat16).float()


def whole(logits):
    log_p = torch.log_softmax(logits, -1)
    return TopK(torch.arange(logits.shape[1]).expand_as(log_p), log_p, logits[:, 0] - log_p[:, 0])


def judged(cached_logits, live_logits, is_bf16=True):
    cached, live = whole(cached_logits), whole(live_logits)
    kept = cached.log_p_NK.half().float()
    steps = torch.zeros(len(kept), 1)
    return verdict([differences(kept, live.log_p_NK, live, steps)], is_bf16=is_bf16)


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("shift", [0.0, -90.0])
def test_a_right_cache_of_a_teacher_with_large_logits_is_kept(scale, shift):
    """GPT-2's logits lie near -90; trained heads reach a spread of 10 and more."""
    logits = logits_of(scale, shift)
    passes = [read_in_bf16(logits, noise=2**-8, seed=seed) for seed in (1, 2)]
    result = judged(*passes)
    assert result.agrees, result.text


def test_the_count_of_roundings_does_not_change_with_the_scale_and_nats_do():
    counts, nats = [], []
    for scale in (1.0, 8.0):
        logits = logits_of(scale)
        cached, live = (read_in_bf16(logits, 2**-8, seed) for seed in (1, 2))
        live = whole(live)
        cached_log_p = whole(cached).log_p_NK
        row = differences(cached_log_p, live.log_p_NK, live, torch.zeros(POSITIONS, 1))
        counts.append(float(row.roundings.mean()))
        nats.append(float(row.nats.mean()))
    assert nats[1] > 4 * nats[0] and nats[1] > 0.05  # more than a limit in nats once allowed
    assert counts[1] == pytest.approx(counts[0], rel=0.5) and max(counts) < 0.6


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("wrong", ["shifted", "another teacher", "another prompt"])
def test_a_wrong_cache_is_refused_at_every_scale(scale, wrong):
    logits = logits_of(scale)
    live = read_in_bf16(logits, 2**-8, 1)
    if wrong == "shifted":
        cached = live.roll(1, 0)
    elif wrong == "another teacher":
        cached = read_in_bf16(logits_of(scale, seed=5), 2**-8, 1)
    else:  # states that moved by a fifth of their size
        off = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        cached = logits + 0.2 * off * logits.std(1, keepdim=True)
    result = judged(cached, live)
    assert not result.agrees and "roundings to bf16" in result.text


def test_in_float32_nats_count():
    logits = logits_of()
    assert judged(logits, logits, is_bf16=False).agrees
    assert not judged(logits + 0.05 * torch.randn_like(logits), logits, is_bf16=False).agrees


def test_what_the_form_of_the_cache_rounds_away_is_no_difference():
    live = whole(logits_of())
    cached = live.log_p_NK + 0.05
    steps = torch.full((POSITIONS, 1), 0.06)
    row = differences(cached, live.log_p_NK, live, steps)
    assert float(row.nats.max()) == 0 and verdict([row], is_bf16=False).agrees
    row = differences(cached, live.log_p_NK, live, steps / 4)
    assert float(row.nats.max()) == pytest.approx(0.035, abs=1e-5)


def test_nothing_to_compare_is_no_disagreement():
    live = whole(torch.zeros(1, 10**6))  # every token is rarer than what is compared
    row = differences(live.log_p_NK + 1, live.log_p_NK, live, torch.zeros(1, 1))
    assert verdict([row], is_bf16=True).agrees and not len(row.nats)
