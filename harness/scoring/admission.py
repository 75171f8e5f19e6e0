"""Which models may take the shared path: by their configuration, then by a probe against the
model's own attention.

The probe asks the same tokens in every way in which the path is used. Exact numbers must agree.
Where floats are short, a gap tells nothing by itself: the path must be right in float32, with the
same weights, and in its own type it must round no wider than the own attention does.

Shapes: B texts, T tokens of each, n compared places, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.machine.memory import release_memory
from harness.models.language_model import LanguageModel
from harness.scoring.prefix_sharing import (
    KeyValues,
    Slots,
    Tree,
    Unshareable,
    forward_rows,
    forward_step,
    forward_tree,
    prefix_of,
    shared_attention,
)
from harness.scoring.rounding import (
    LIKELY,
    ROUNDS_WIDER,
    Place,
    at_places,
    deviation,
    fits_in_float32,
    in_float32,
    log_probabilities,
    own_deviation,
)

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}  # of a log-probability
# few rows and many take two kernels of int8: up to 0.7 on the students of results/compression-tiny
_PACKED_TOLERANCE = 1.0
# What unknown code may raise.
_OF_A_MODEL = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def refusal(opened: LanguageModel) -> str:
    """Return why a model cannot take the shared path, "" when it can: by its configuration, then by
    a probe.
    """
    import torch

    config = opened.text_config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"its layers are {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention slides over a window of {config.sliding_window} tokens"
    if getattr(opened.model.generation_config, "cache_implementation", None):
        return (
            "its generation config asks for a "
            f"{opened.model.generation_config.cache_implementation} cache"
        )
    try:
        return _by_probe(opened)
    except Unshareable as problem:
        return str(problem)
    # Models of any origin come by here: whatever one of them raises means that it takes the plain
    # path, with this reason.
    except _OF_A_MODEL as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        return (
            f"a probe failed with {type(problem).__name__}: "
            f"{str(problem).splitlines()[0] if str(problem) else 'no message'}"
        )


def _by_probe(opened: LanguageModel) -> str:
    """Return why the probe refuses a model, "" where it does not.

    Exact numbers must agree. Where floats are short the path must be right in float32, with the
    same weights; then it may part from the own attention by a fixed gap, or round as the own
    attention does.
    """
    texts = _probed(opened)
    own, (places, logits) = log_probabilities(opened, texts), _answers(opened, texts)
    packed = _is_packed(opened)
    exact = opened.dtype == "float32" and not packed
    gap = _widest(logits, at_places(own, places), -math.inf if exact else LIKELY)
    allowed = _PACKED_TOLERANCE if packed else _TOLERANCE.get(opened.dtype, 0.5)
    if exact or packed:
        return "" if gap <= allowed else f"a probe's log-probabilities moved by {gap:.2g}"
    in_full = _in_float32(opened, texts)
    if in_full is None:
        more = (
            ", and its weights cannot be computed in float32 beside them to tell rounding from a "
            "fault"
        )
        return "" if gap <= allowed else f"a probe's log-probabilities moved by {gap:.2g}{more}"
    truth, fault = in_full
    if not fault <= _TOLERANCE["float32"]:
        return f"a probe's log-probabilities moved by {fault:.2g} in float32"
    return (
        ""
        if gap <= allowed
        else _by_rounding(opened, gap, deviation(logits, at_places(truth, places)), truth, places)
    )


def _by_rounding(
    opened: LanguageModel,
    gap: float,
    ours: float,
    truth_BTV: "torch.Tensor",
    places: Sequence[Place],
) -> str:
    """Return why a path that is right rounds too far, "" where it rounds as the model's own
    attention does; both in nats from float32.
    """
    own = own_deviation(opened, _probed(opened), truth_BTV, places)
    if ours <= ROUNDS_WIDER * own:
        return ""
    return (
        f"a probe's log-probabilities moved by {gap:.2g}: it rounds by {ours:.2g} on average, and "
        f"its own attention by {own:.2g}"
    )


def _in_float32(
    opened: LanguageModel, texts: Sequence[Sequence[int]]
) -> "tuple[torch.Tensor, float] | None":
    """Return float32's log-probabilities (B, T, V) and how far the shared path is from them in
    float32; None where that cannot be had.
    """
    from harness.machine.memory import is_out_of_memory

    if not fits_in_float32(opened):
        return None
    try:
        with in_float32(opened) as exact:
            truth, (places, logits) = log_probabilities(exact, texts), _answers(exact, texts)
    except _OF_A_MODEL as problem:  # a model that casts to its own type inside
        if opened.device.startswith("cuda") and is_out_of_memory(problem):
            release_memory(opened.device)
        return None
    return truth, _widest(logits, at_places(truth, places), LIKELY)


def _is_packed(opened: LanguageModel) -> bool:
    """Tell whether a model rounds its activations, and few rows by another kernel than many."""
    return bool(getattr(opened.model, "is_quantized", False))


def _probed(opened: LanguageModel) -> tuple[list[int], list[int]]:
    """Return the two texts of the probe, 24 tokens each, which part after 16."""
    ids = [index % (opened.vocabulary - 1) for index in range(3, 3 + 7 * 24, 7)]
    ids = [token if token not in opened.placeholders else 3 for token in ids]
    return ids, [*ids[:16], *reversed(ids[16:])]


def _widest(logits_nV: "torch.Tensor", own_nV: "torch.Tensor", floor: float) -> float:
    """Return the widest gap between logits and log-probabilities among tokens likelier than
    `floor`; NaN where one is.
    """
    import torch

    gap = torch.log_softmax(logits_nV.float(), -1) - own_nV
    return float(gap.masked_fill(own_nV < floor, 0.0).abs().max())


def _answers(
    opened: LanguageModel, texts: Sequence[Sequence[int]]
) -> "tuple[list[Place], torch.Tensor]":
    """Return the logits (n, V) that the shared path gives behind tokens of the probe, in every way
    we use it, and which tokens they are.
    """
    import torch

    places: list[Place] = []
    logits: list[torch.Tensor] = []
    with shared_attention(opened):
        prefix = prefix_of(opened, texts[0][:12], most=8)
        for answer in (
            _by_tree(opened, texts, prefix),
            *_by_slots(opened, texts, prefix),
            _by_rows(opened, texts),
        ):
            places += answer[0]
            logits.append(answer[1])
    return places, torch.cat(logits)


def _by_tree(
    opened: LanguageModel, texts: Sequence[Sequence[int]], prefix: KeyValues
) -> "tuple[list[Place], torch.Tensor]":
    """Read both texts behind their prefix as one tree."""
    tree = Tree.of([text[12:23] for text in texts])
    logits, _ = forward_tree(opened, tree, prefix, [node for path in tree.paths for node in path])
    return [(text, token) for text in range(2) for token in range(12, 23)], logits


def _by_slots(
    opened: LanguageModel, texts: Sequence[Sequence[int]], prefix: KeyValues
) -> "Iterator[tuple[list[Place], torch.Tensor]]":
    """Decode rows of different ages and texts in slots; the second one leaves after a step, and the
    last takes its place.
    """
    import torch

    ages = [(0, 22), (1, 23), (0, 20)]  # text, and its tokens that are already read
    tree = Tree.unmerged([texts[text][12:age] for text, age in ages])
    _, computed = forward_tree(opened, tree, prefix, ())
    slots = Slots(prefix, len(ages), 12, torch.zeros(0, dtype=torch.long, device=opened.device))
    slots.admit(computed, [(0, path[0], path[-1] + 1) for path in tree.paths])
    yield ages, forward_step(opened, [texts[text][age] for text, age in ages], slots)
    going = [(ages[slot][0], ages[slot][1] + 1) for slot in slots.retire([1])]
    yield going, forward_step(opened, [texts[text][age] for text, age in going], slots)


def _by_rows(
    opened: LanguageModel, texts: Sequence[Sequence[int]]
) -> "tuple[list[Place], torch.Tensor]":
    """Read rows of two lengths side by side, with no prefix."""
    ends, _ = forward_rows(opened, [texts[0][:20], texts[1]])
    return [(0, 19), (1, 23)], ends
