"""Decides which models may take the shared path: by configuration, then by a probe.

The probe compares the path with the model's own attention, in every way in which the path is used.
Exact numbers must agree. In short floats a gap alone proves nothing: the path must be right in
float32, with the same weights, and in its own type it must not round more than the own attention.

Shapes: B texts, T tokens of each, n compared places, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from harness.machine.memory import release_memory
from harness.models.cache_format import cache_format_of
from harness.models.language_model import LanguageModel
from harness.scoring.prefix_sharing import (
    DecodingSlots,
    KeyValues,
    Span,
    TokenTree,
    UnsupportedAttention,
    compute_prefix,
    forward_rows,
    forward_step,
    forward_tree,
    shared_attention,
)
from harness.scoring.rounding import (
    MAX_DEVIATION_RATIO,
    MIN_LOG_PROBABILITY,
    Place,
    at_places,
    fits_in_float32,
    in_float32,
    own_log_probabilities,
    own_rms_deviation,
    rms_deviation,
)

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}  # of a log-probability
# few rows and many rows use different int8 kernels: up to 0.7 on the students of
# results/compression-tiny
_INTEGER_TOLERANCE = 1.0
# What a model's own code may raise.
_MODEL_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def shared_path_refusal(opened: LanguageModel) -> str:
    """Return why a model cannot take the shared path; "" where it can."""
    import torch

    config = opened.text_config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    other_types = layer_types - {"full_attention"}
    if other_types:
        return f"its layers are {', '.join(sorted(other_types))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention slides over a window of {config.sliding_window} tokens"
    if cache := getattr(opened.model.generation_config, "cache_implementation", None):
        return f"its generation config asks for a {cache} cache"
    try:
        return _probe_refusal(opened)
    except UnsupportedAttention as problem:
        return str(problem)
    # The model's code may come from anywhere. Whatever it raises is the reason to take the plain
    # path.
    except _MODEL_ERRORS as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        return (
            f"a probe failed with {type(problem).__name__}: "
            f"{str(problem).splitlines()[0] if str(problem) else 'no message'}"
        )


def _probe_refusal(opened: LanguageModel) -> str:
    """Return why the probe refuses a model; "" where it does not.

    Exact numbers must agree. In short floats the path must be right in float32, with the same
    weights; besides, it must either stay within a fixed gap of the own attention, or round no more
    than the own attention does.
    """
    texts = _probe_texts(opened)
    own_log_p = own_log_probabilities(opened, texts)
    path = _shared_path_logits(opened, texts)
    is_integer = _is_integer_model(opened)
    is_exact = opened.dtype == "float32" and not is_integer
    floor = -math.inf if is_exact else MIN_LOG_PROBABILITY
    gap = _widest_gap(path.logits_nV, at_places(own_log_p, path.places), floor)
    tolerance = _INTEGER_TOLERANCE if is_integer else _TOLERANCE.get(opened.dtype, 0.5)
    is_close = gap <= tolerance
    moved = f"a probe's log-probabilities moved by {gap:.2g}"
    if is_exact or is_integer:
        return "" if is_close else moved
    reference = _float32_reference(opened, texts)
    if reference is None:
        return (
            ""
            if is_close
            else f"{moved}, and its weights cannot be computed in float32 beside them to tell "
            "rounding from a fault"
        )
    if not reference.path_gap <= _TOLERANCE["float32"]:
        return f"a probe's log-probabilities moved by {reference.path_gap:.2g} in float32"
    return "" if is_close else _rounding_refusal(opened, path, reference.log_p_BTV, moved)


def _rounding_refusal(
    opened: LanguageModel, path: "PathLogits", exact_log_p_BTV: "torch.Tensor", moved: str
) -> str:
    """Return why a path that is right in float32 rounds too much; "" where its rounding is usual.

    It may round as much as the model's own attention does. `moved` begins the message.
    """
    path_deviation = rms_deviation(path.logits_nV, at_places(exact_log_p_BTV, path.places))
    texts = _probe_texts(opened)
    own_deviation = own_rms_deviation(opened, texts, exact_log_p_BTV, path.places)
    if path_deviation <= MAX_DEVIATION_RATIO * own_deviation:
        return ""
    return (
        f"{moved}: it rounds by {path_deviation:.2g} on average, and "
        f"its own attention by {own_deviation:.2g}"
    )


class Float32Reference(NamedTuple):
    """What a model computes in float32 with the same weights."""

    log_p_BTV: "torch.Tensor"  # by its own attention
    path_gap: float  # how far the shared path is from that in float32


def _float32_reference(
    opened: LanguageModel, texts: Sequence[Sequence[int]]
) -> Float32Reference | None:
    """Compute a model's own attention and the shared path in float32; None where that fails."""
    from harness.machine.memory import is_out_of_memory

    if not fits_in_float32(opened):
        return None
    try:
        with in_float32(opened) as exact:
            log_p = own_log_probabilities(exact, texts)
            path = _shared_path_logits(exact, texts)
    except _MODEL_ERRORS as problem:  # for example, a model that casts to its own type inside
        if opened.device.startswith("cuda") and is_out_of_memory(problem):
            release_memory(opened.device)
        return None
    gap = _widest_gap(path.logits_nV, at_places(log_p, path.places), MIN_LOG_PROBABILITY)
    return Float32Reference(log_p, gap)


def _is_integer_model(opened: LanguageModel) -> bool:
    """Tell whether a model computes or stores integers, so that few rows and many differ.

    A number that lies at the edge of two codes takes either.
    """
    is_packed = bool(getattr(opened.model, "is_quantized", False))
    return is_packed or cache_format_of(opened.model.config) is not None


def _probe_texts(opened: LanguageModel) -> tuple[list[int], list[int]]:
    """Return the two texts of the probe, 24 tokens each; their first 16 tokens are the same."""
    ids = [index % (opened.vocabulary - 1) for index in range(3, 3 + 7 * 24, 7)]
    ids = [token if token not in opened.placeholders else 3 for token in ids]
    return ids, [*ids[:16], *reversed(ids[16:])]


def _widest_gap(logits_nV: "torch.Tensor", log_p_nV: "torch.Tensor", floor: float) -> float:
    """Return the widest gap between logits and log-probabilities; NaN where one is NaN.

    Only tokens with a log-probability of at least `floor` are compared.
    """
    import torch

    gaps = torch.log_softmax(logits_nV.float(), -1) - log_p_nV
    return float(gaps.masked_fill(log_p_nV < floor, 0.0).abs().max())


class PathLogits(NamedTuple):
    """Logits of the shared path, and the places in the probe's texts that they belong to."""

    places: list[Place]
    logits_nV: "torch.Tensor"


def _shared_path_logits(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> PathLogits:
    """Run the probe's texts in every way in which the shared path is used."""
    import torch

    places: list[Place] = []
    logits: list[torch.Tensor] = []
    with shared_attention(opened):
        prefix = compute_prefix(opened, texts[0][:12], most=8)
        for part in (
            _tree_logits(opened, texts, prefix),
            *_slot_logits(opened, texts, prefix),
            _row_logits(opened, texts),
        ):
            places += part.places
            logits.append(part.logits_nV)
    return PathLogits(places, torch.cat(logits))


def _tree_logits(
    opened: LanguageModel, texts: Sequence[Sequence[int]], prefix: KeyValues
) -> PathLogits:
    """Read both texts after their prefix as one tree."""
    tree = TokenTree.of([text[12:23] for text in texts])
    logits, _ = forward_tree(opened, tree, prefix, [node for path in tree.paths for node in path])
    return PathLogits([Place(text, token) for text in range(2) for token in range(12, 23)], logits)


def _slot_logits(
    opened: LanguageModel, texts: Sequence[Sequence[int]], prefix: KeyValues
) -> Iterator[PathLogits]:
    """Decode three rows of different lengths in slots for two steps.

    The second row leaves after the first step, and the last row moves into its slot.
    """
    import torch

    # each row's text, and how many of its tokens are already read
    rows = [Place(0, 22), Place(1, 23), Place(0, 20)]
    tree = TokenTree.unmerged([texts[text][12:length] for text, length in rows])
    _, computed = forward_tree(opened, tree, prefix, ())
    no_lengths = torch.zeros(0, dtype=torch.long, device=opened.device)
    slots = DecodingSlots(prefix, len(rows), 12, no_lengths)
    slots.admit(computed, [Span(0, path[0], path[-1] + 1) for path in tree.paths])
    tokens = [texts[text][position] for text, position in rows]
    yield PathLogits(rows, forward_step(opened, tokens, slots))
    remaining = [Place(rows[slot].text, rows[slot].token + 1) for slot in slots.retire([1])]
    tokens = [texts[text][position] for text, position in remaining]
    yield PathLogits(remaining, forward_step(opened, tokens, slots))


def _row_logits(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> PathLogits:
    """Read rows of two lengths side by side, without a prefix."""
    logits, _ = forward_rows(opened, [texts[0][:20], texts[1]])
    return PathLogits([Place(0, 19), Place(1, 23)], logits)
