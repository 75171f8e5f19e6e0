"""Measures how much short floats make a model round, against the same weights in float32.

A way of running a model in bf16 may be wrong, or it may only round: the gap to the model's own
attention does not tell which. In float32 a correct way agrees to the last digits, so its logic is
judged there. Its rounding is measured as its distance from that float32 computation, and compared
with the same distance of the model's own attention: on the same texts, at the same places, among
the same likely tokens.

Shapes: n compared places, B texts, T tokens of a text, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.machine.memory import free_bytes
from harness.models.language_model import LanguageModel
from harness.scoring.plain import DecodingMode, PaddedDecoder, last_logits, plain_forward

if TYPE_CHECKING:
    import torch

# of a log-probability; in short floats only likelier tokens are compared, because rounded
# activations move the rest of the tail about
MIN_LOG_PROBABILITY = -12.0
# The two ways have all other rounding in a model in common (its products, norms, residuals). A way
# that adds as much rounding as all of that together doubles the variance: 1.41 times the deviation.
MAX_DEVIATION_RATIO = 1.5
_MEMORY_SHARE = 0.9  # of the free memory
_CACHED_TOKENS = 12  # in the cache, in those ways that continue from a cache


class Place(NamedTuple):
    """A compared position: which text, and which of its tokens."""

    text: int
    token: int


def _short_floats(model: Any) -> "Iterator[tuple[dict[str, Any], str, torch.Tensor]]":
    """Yield every parameter and buffer of fewer than four bytes a number.

    Each comes as (the module's dictionary that has it, its name, the tensor).
    """
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                    yield tensors, name, tensor


def fits_in_float32(opened: LanguageModel) -> bool:
    """Tell whether a float32 copy of a model's short weights fits into memory beside them."""
    free = free_bytes(opened.device)
    needed = sum(
        {id(tensor): 4 * tensor.numel() for _, _, tensor in _short_floats(opened.model)}.values()
    )
    return free is None or needed <= _MEMORY_SHARE * free


@contextlib.contextmanager
def in_float32(opened: LanguageModel) -> Iterator[LanguageModel]:
    """Make a model compute in float32 inside the block; restore its own tensors afterwards.

    Tied weights stay tied. Inside the block the model is without the forward function that mixed
    precision puts on it.
    """
    import torch

    copies: dict[int, torch.Tensor] = {}
    originals = list(_short_floats(opened.model))
    mixed_forward = opened.model.__dict__.pop("forward", None) if opened.autocast else None
    try:
        for tensors, name, tensor in originals:
            if id(tensor) not in copies:
                copy = tensor.detach().float()
                copies[id(tensor)] = (
                    torch.nn.Parameter(copy, requires_grad=False)
                    if isinstance(tensor, torch.nn.Parameter)
                    else copy
                )
            tensors[name] = copies[id(tensor)]
        yield replace(opened, autocast="")
    finally:
        for tensors, name, tensor in originals:
            tensors[name] = tensor
        if mixed_forward is not None:
            opened.model.forward = mixed_forward


def own_log_probabilities(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    """Return the own attention's log-probabilities of texts of one length, (B, T, V)."""
    import torch

    return torch.log_softmax(_batch_logits(opened, texts).float(), -1)


def own_attention_logits(
    opened: LanguageModel, texts: Sequence[Sequence[int]]
) -> "Iterator[torch.Tensor]":
    """Yield the logits (B, T - 12, V) of texts of one length, in each way of the own attention.

    The ways: side by side, in the other order, alone, padded on the left and on the right beside a
    longer text, and from a cache in one pass and step by step.
    """
    import torch

    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: _batch_logits(opened, texts),
        lambda: _batch_logits(opened, texts[::-1]).flip(0),
        lambda: torch.cat([_batch_logits(opened, [text]) for text in texts]),
        lambda: last_logits(opened, [*texts, _longer_text(texts)], len(texts[0]))[: len(texts)],
        lambda: _right_padded_logits(opened, texts),
        lambda: _stepwise_logits(opened, texts),
        lambda: _cached_logits(opened, texts),
    )
    for compute in ways:
        yield compute()[:, _CACHED_TOKENS - len(texts[0]) :]


def _batch_logits(opened: LanguageModel, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = opened.model(input_ids=_ids(opened, rows), use_cache=False).logits
    return logits


def _ids(opened: LanguageModel, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    return torch.tensor([list(row) for row in rows], device=opened.device)


def _longer_text(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return a text beside which the others need padding."""
    return [*texts[0], *texts[-1][:8]]


def _right_padded_logits(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    length, longer = len(texts[0]), _longer_text(texts)
    padding = [opened.pad_id] * (len(longer) - length)
    ids = _ids(opened, [*([*text, *padding] for text in texts), longer])
    mask = torch.ones_like(ids)
    mask[:-1, length:] = 0
    with torch.inference_mode():
        logits: torch.Tensor = opened.model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).logits
    return logits[: len(texts), :length]


def _stepwise_logits(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    decoder = PaddedDecoder(
        opened,
        [text[: _CACHED_TOKENS + 1] for text in texts],
        DecodingMode(batched=True, masks_steps=True, uses_cache=True),
    )
    next_tokens = zip(*(text[_CACHED_TOKENS + 1 :] for text in texts), strict=True)
    all_rows = range(len(texts))
    steps = [decoder.prefill(), *(decoder.step(all_rows, tokens) for tokens in next_tokens)]
    return torch.stack(steps, dim=1)


def _cached_logits(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    beginnings = _ids(opened, [text[:_CACHED_TOKENS] for text in texts])
    cached = plain_forward(opened, {"input_ids": beginnings}, 1, use_cache=True)
    rest = {"input_ids": _ids(opened, [text[_CACHED_TOKENS:] for text in texts]), **cached.cache}
    return plain_forward(opened, rest, len(texts[0]) - _CACHED_TOKENS, use_cache=True).logits


def rms_deviation(logits_nV: "torch.Tensor", exact_nV: "torch.Tensor") -> float:
    """Return how far logits are from float32's log-probabilities: root mean square, in nats.

    Likely tokens only. Not the widest gap: that grows with the number of values, and one value
    decides it.
    """
    import torch

    gaps = (torch.log_softmax(logits_nV.float(), -1) - exact_nV)[exact_nV >= MIN_LOG_PROBABILITY]
    return float(gaps.square().mean().sqrt())


def at_places(
    values_BTV: "torch.Tensor", places: Sequence[Place], *, first: int = 0
) -> "torch.Tensor":
    """Return the values at places, (n, V); column 0 of the tensor belongs to token `first`."""
    return values_BTV[[text for text, _ in places], [token - first for _, token in places]]


def own_rms_deviation(
    opened: LanguageModel,
    texts: Sequence[Sequence[int]],
    exact_BTV: "torch.Tensor",
    places: Sequence[Place],
) -> float:
    """Return how far the own attention rounds from float32, over all its ways, in nats.

    All places must be after the tokens in the cache.
    """
    exact = at_places(exact_BTV, places)
    squares = [
        rms_deviation(at_places(logits, places, first=_CACHED_TOKENS), exact) ** 2
        for logits in own_attention_logits(opened, texts)
    ]
    return float((sum(squares) / len(squares)) ** 0.5)
