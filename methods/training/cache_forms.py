"""How a teacher's cache keeps token ids and log-probabilities in files. Numpy alone.

Ids take the fewest bits that hold the vocabulary: 17 for 100,000 tokens, where a whole type takes
32. Log-probabilities have one of three forms. `float32` is exact: what is read is what the teacher
computed, bit by bit. `float16` keeps 11 bits. `int8` keeps 256 steps between the smallest and the
largest log-probability of each position. How far a form is from the teacher is measured on all that
is written (`rounding_kl`).

Shapes: N positions, K tokens.
"""

from typing import Any

import numpy as np

from methods.training.cache_dtype import CacheDtype

_RANGE_BYTES = 8  # of int8: the smallest and the step of a position, in float32
_VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_STEPS = 255  # of int8
_LOWEST = -30.0  # int8 keeps nothing rarer: a step would be too wide for all others


def id_bits(vocabulary: int) -> int:
    """Return the fewest bits that hold every id of a vocabulary."""
    return max(1, (vocabulary - 1).bit_length())


def pack_ids(ids_NK: Any, bits: int) -> Any:
    """Return ids (N, K) as bytes (N, B), each position's bits behind one another."""
    as_bytes = np.ascontiguousarray(ids_NK, dtype="<u4")[..., None].view(np.uint8)
    bits_NKb = np.unpackbits(as_bytes, axis=2, bitorder="little")[..., :bits]
    bits_NB = bits_NKb.reshape(len(ids_NK), ids_NK.shape[1] * bits)
    return np.packbits(bits_NB, axis=1, bitorder="little")


def unpack_ids(packed_NB: Any, bits: int, tokens: int) -> Any:
    """Return the ids (N, K) of packed bytes, as int64; `tokens` is K."""
    bits_N = np.unpackbits(packed_NB, axis=1, count=tokens * bits, bitorder="little")
    bits_NKb = np.zeros((len(packed_NB), tokens, 32), dtype=np.uint8)
    bits_NKb[..., :bits] = bits_N.reshape(len(packed_NB), tokens, bits)
    as_bytes = np.packbits(bits_NKb, axis=2, bitorder="little")
    return as_bytes.view("<u4")[..., 0].astype(np.int64)


def pack_log_p(log_p_NK: Any, form: CacheDtype) -> dict[str, Any]:
    """Return the arrays that keep log-probabilities (N, K; float32), by the names of their files.

    In `int8`, a value is the smallest of its position plus its code times the position's step.
    """
    if form != "int8":
        return {"log_p": log_p_NK.astype(form)}
    log_p_NK = np.maximum(log_p_NK, np.float32(_LOWEST))
    lowest_N1 = log_p_NK.min(axis=1, keepdims=True)
    step_N1 = (log_p_NK.max(axis=1, keepdims=True) - lowest_N1) / np.float32(_STEPS)
    codes = np.rint((log_p_NK - lowest_N1) / np.where(step_N1 > 0, step_N1, 1))
    ranges = np.concatenate([lowest_N1, step_N1], axis=1).astype(np.float32)
    return {"log_p": codes.astype(np.uint8), "range": ranges}


def unpack_log_p(arrays: dict[str, Any], form: CacheDtype) -> Any:
    """Return the log-probabilities (N, K; float32) of packed arrays."""
    values_NK = arrays["log_p"].astype(np.float32)
    if form != "int8":
        return values_NK
    return arrays["range"][:, :1] + values_NK * arrays["range"][:, 1:]


def rounding_steps(arrays: dict[str, Any], form: CacheDtype) -> Any:
    """Return how far a packed log-probability of each position may be from the exact one, (N, 1).

    Half a step for `int8`. Of the others it is 0: the tolerance of the check holds float16's.
    """
    if form != "int8":
        return np.zeros((len(arrays["log_p"]), 1), dtype=np.float32)
    return arrays["range"][:, 1:] / 2


def rounding_kl(exact_NK: Any, kept_NK: Any, *, dense: bool) -> Any:
    """Return the KL divergence in nats, (N,), of what is kept from what the teacher computed.

    Both are log-probabilities, `exact_NK` of a sum of 1 with the rest. Where not all tokens are
    kept, the others are one more token, of the probability that is left. With d = log q - log p and
    q brought to sum 1, KL(p || q) = log(sum p e^d) - sum p d; e^d - 1 - d is taken by its series,
    so that a KL of 1e-10 keeps its digits.
    """
    p_NK = np.exp(exact_NK)
    gap_NK = np.zeros_like(p_NK)
    np.subtract(kept_NK, exact_NK, out=gap_NK, where=np.isfinite(exact_NK))
    curve_NK = gap_NK * gap_NK * (0.5 + gap_NK / 6 + gap_NK * gap_NK / 24)
    linear_N = (p_NK * gap_NK).sum(axis=1, dtype=np.float64)
    curved_N = (p_NK * curve_NK).sum(axis=1, dtype=np.float64)
    if not dense:
        rest_N = _rest(p_NK)
        gap_N = np.log(_rest(np.exp(kept_NK)) / rest_N)
        linear_N += rest_N * gap_N
        curved_N += rest_N * (np.expm1(gap_N) - gap_N)
    return np.maximum(np.log1p(linear_N + curved_N) - linear_N, 0)


def _rest(p_NK: Any) -> Any:
    """Return the probability that kept tokens leave over, at least 1e-9, (N,)."""
    return np.maximum(1 - p_NK.sum(axis=1, dtype=np.float64), 1e-9)


def position_bytes(vocabulary: int, tokens: int | None, form: CacheDtype) -> int:
    """Return the bytes that a cache takes for each position; `tokens` None: it keeps all."""
    kept = vocabulary if tokens is None else tokens
    ids = 0 if tokens is None else -(-tokens * id_bits(vocabulary) // 8)
    return ids + kept * _VALUE_BYTES[form] + (_RANGE_BYTES if form == "int8" else 0)
