"""How ids and log-probabilities are kept: every bit of exact forms, and what a lossy one loses."""

import numpy as np
import pytest

from methods.training.cache_forms import (
    id_bits,
    pack_ids,
    pack_log_p,
    position_bytes,
    rounding_kl,
    rounding_steps,
    unpack_ids,
    unpack_log_p,
)


def distributions(positions=200, vocabulary=5_000, scale=4.0, seed=0):
    logits = np.random.default_rng(seed).normal(0, scale, (positions, vocabulary))
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def likeliest(log_p, k):
    return -np.sort(-log_p, axis=1)[:, :k]


@pytest.mark.parametrize(
    ("vocabulary", "bits"),
    [(2, 1), (3, 2), (256, 8), (257, 9), (49_152, 16), (65_536, 16), (65_537, 17), (151_936, 18)],
)
def test_ids_take_the_fewest_bits_that_hold_the_vocabulary(vocabulary, bits):
    assert id_bits(vocabulary) == bits and 2 ** (bits - 1) < vocabulary <= 2**bits
    ids = np.random.default_rng(1).integers(0, vocabulary, (37, 50), dtype=np.int32)
    ids[0, :2] = 0, vocabulary - 1
    packed = pack_ids(ids, bits)
    assert packed.dtype == np.uint8 and packed.shape == (37, -(-50 * bits // 8))
    assert np.array_equal(unpack_ids(packed, bits, 50), ids)


def test_no_positions_are_no_bytes():
    empty = pack_ids(np.zeros((0, 7), dtype=np.int32), 18)
    assert len(empty) == 0 and unpack_ids(empty, 18, 7).shape == (0, 7)


def test_the_exact_form_gives_every_bit_back():
    log_p = likeliest(distributions(), 50)
    kept = unpack_log_p(pack_log_p(log_p, "float32"), "float32")
    assert kept.tobytes() == log_p.tobytes()
    assert rounding_kl(log_p, kept, dense=False).max() == 0


@pytest.mark.parametrize("scale", [0.5, 4.0, 20.0])
def test_eight_bits_are_within_half_a_step_of_what_they_keep(scale):
    log_p = likeliest(distributions(scale=scale), 50)
    arrays = pack_log_p(log_p, "int8")
    assert arrays["log_p"].dtype == np.uint8 and arrays["range"].shape == (200, 2)
    kept = unpack_log_p(arrays, "int8")
    steps = rounding_steps(arrays, "int8")
    likely = log_p > -30  # what is rarer is kept as e^-30
    assert (np.abs(kept - log_p) <= steps * 1.001 + 1e-6)[likely].all()
    width = log_p.clip(-30).max(axis=1) - log_p.clip(-30).min(axis=1)
    assert np.allclose(steps[:, 0], width / 510, rtol=1e-4)
    assert (np.diff(kept, axis=1) <= 1e-6).all()  # the likeliest stays first


def test_equal_log_probabilities_are_kept_as_they_are():
    log_p = np.full((3, 8), -2.0, dtype=np.float32)
    assert np.array_equal(unpack_log_p(pack_log_p(log_p, "int8"), "int8"), log_p)


def exact_kl(p, q):
    """The definition, in float64, over outcomes that are all there."""
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return (p * (np.log(p) - np.log(q))).sum(1)


@pytest.mark.parametrize("form", ["float16", "int8"])
@pytest.mark.parametrize("dense", [True, False])
def test_the_stated_kl_is_that_of_the_definition(form, dense):
    log_p = distributions(vocabulary=600, scale=2.0)
    if not dense:
        log_p = likeliest(log_p, 40)
    kept = unpack_log_p(pack_log_p(log_p, form), form)
    p, q = np.exp(log_p.astype(np.float64)), np.exp(kept.astype(np.float64))
    if not dense:
        p = np.concatenate([p, 1 - p.sum(1, keepdims=True)], axis=1)
        q = np.concatenate([q, 1 - q.sum(1, keepdims=True)], axis=1)
    stated = rounding_kl(log_p, kept, dense=dense)
    expected = exact_kl(p, q)
    assert stated.mean() == pytest.approx(expected.mean(), rel=2e-3)
    assert np.allclose(stated, expected, rtol=2e-2, atol=2e-10)


def test_a_wrong_distribution_has_a_large_kl():
    log_p = likeliest(distributions(), 50)
    assert rounding_kl(log_p, np.roll(log_p, 1, axis=1), dense=False).mean() > 0.05


def test_a_token_that_cannot_be_costs_nothing():
    log_p = distributions(vocabulary=64)
    log_p[:, 5] = -np.inf
    for form in ("float16", "int8"):
        kept = unpack_log_p(pack_log_p(log_p, form), form)
        assert np.isfinite(rounding_kl(log_p, kept, dense=True)).all()


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "form", "size"),
    [
        (151_936, 50, "float16", 113 + 100),  # was 4 + 2 bytes a token: 300
        (151_936, 50, "float32", 113 + 200),
        (151_936, 50, "int8", 113 + 50 + 8),
        (49_152, 64, "float16", 128 + 128),
        (1_024, None, "float16", 2_048),
    ],
)
def test_bytes_of_a_position_are_those_of_the_arrays(vocabulary, tokens, form, size):
    assert position_bytes(vocabulary, tokens, form) == size
    log_p = distributions(positions=4, vocabulary=tokens or vocabulary)
    arrays = pack_log_p(log_p, form)
    if tokens is not None:
        ids = np.zeros((4, tokens), dtype=np.int32)
        arrays["ids"] = pack_ids(ids, id_bits(vocabulary))
    assert sum(array.nbytes for array in arrays.values()) == 4 * size
