"""What floats of few bits do to a model: the same weights computed in float32, and how far its own
attention rounds from that.

A way of running a model in bf16 can be wrong, or it can round: a gap to the own attention does not
tell which. In float32 a right way agrees to the last digits, so that its logic is judged there; and
its rounding is measured as its distance from that computation, beside the distance of the model's
own attention on the same texts, at the same places, among the same likely tokens.

Shapes: n compared places, T tokens of a text, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.machine.memory import free_bytes
from harness.models.language_model import LanguageModel
from harness.scoring.plain import Continuing, Writing, last_logits, own_forward

if TYPE_CHECKING:
    import torch

# log-probability; short floats are judged by likelier tokens: rounded activations move the rest of
# the tail about
LIKELY = -12.0
# Whatever else rounds in a model (its products, norms, residuals) the two ways have in common. A
# way that adds as much rounding
# as all of that together doubles the variance: 1.41 times the deviation.
ROUNDS_WIDER = 1.5
_NOT_ALL_MEMORY = 0.9  # of what is free
_CACHED = 12  # tokens that stand in the cache before the ways that go on from it begin

Place = tuple[int, int]  # which text, and which of its tokens


def _short_floats(model: Any) -> "Iterator[tuple[dict[str, Any], str, torch.Tensor]]":
    """Yield (where it is held, its name, itself) of every parameter and buffer of fewer than four
    bytes a number.
    """
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                    yield held, name, tensor


def fits_in_float32(opened: LanguageModel) -> bool:
    """Tell whether a float32 copy of a model's short weights fits beside them."""
    free = free_bytes(opened.device)
    need = sum(
        {id(tensor): 4 * tensor.numel() for _, _, tensor in _short_floats(opened.model)}.values()
    )
    return free is None or need <= _NOT_ALL_MEMORY * free


@contextlib.contextmanager
def in_float32(opened: LanguageModel) -> Iterator[LanguageModel]:
    """Let a model compute in float32 with the weights that it has; its own tensors come back after,
    untouched.

    Tied weights stay tied. The forward that mixed precision puts on the model itself is taken off
    as long.
    """
    import torch

    longer: dict[int, torch.Tensor] = {}
    before = list(_short_floats(opened.model))
    wrapped = opened.model.__dict__.pop("forward", None) if opened.autocast else None
    try:
        for held, name, tensor in before:
            if id(tensor) not in longer:
                exact = tensor.detach().float()
                longer[id(tensor)] = (
                    torch.nn.Parameter(exact, requires_grad=False)
                    if isinstance(tensor, torch.nn.Parameter)
                    else exact
                )
            held[name] = longer[id(tensor)]
        yield replace(opened, autocast="")
    finally:
        for held, name, tensor in before:
            held[name] = tensor
        if wrapped is not None:
            opened.model.forward = wrapped


def log_probabilities(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    """Return what the model's own attention gives for texts of one length, side by side:
    (B, T, V).
    """
    import torch

    return torch.log_softmax(_together(opened, texts).float(), -1)


def own_ways(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "Iterator[torch.Tensor]":
    """Yield the logits (B, T - 12, V) behind texts of one length, in each way in which the own
    attention computes them.

    Side by side and in the other order, alone, padded on the left and on the right beside a longer
    text, and behind a cache: in one pass and step by step.
    """
    import torch

    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: _together(opened, texts),
        lambda: _together(opened, texts[::-1]).flip(0),
        lambda: torch.cat([_together(opened, [text]) for text in texts]),
        lambda: last_logits(opened, [*texts, _longer(texts)], len(texts[0]))[: len(texts)],
        lambda: _padded_right(opened, texts),
        lambda: _stepped(opened, texts),
        lambda: _continued(opened, texts),
    )
    for way in ways:
        yield way()[:, _CACHED - len(texts[0]) :]


def _together(opened: LanguageModel, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = opened.model(input_ids=_ids(opened, rows), use_cache=False).logits
    return logits


def _ids(opened: LanguageModel, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    return torch.tensor([list(row) for row in rows], device=opened.device)


def _longer(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return a text beside which the others are padded."""
    return [*texts[0], *texts[-1][:8]]


def _padded_right(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    length, beside = len(texts[0]), _longer(texts)
    ids = _ids(
        opened, [*([*text, *[opened.pad_id] * (len(beside) - length)] for text in texts), beside]
    )
    mask = torch.ones_like(ids)
    mask[:-1, length:] = 0
    with torch.inference_mode():
        logits: torch.Tensor = opened.model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).logits
    return logits[: len(texts), :length]


def _stepped(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    import torch

    going = Continuing(
        opened,
        [text[: _CACHED + 1] for text in texts],
        Writing(together=True, masked=True, cached=True),
    )
    later = zip(*(text[_CACHED + 1 :] for text in texts), strict=True)
    steps = [going.begin(), *(going.go_on(range(len(texts)), tokens) for tokens in later)]
    return torch.stack(steps, dim=1)


def _continued(opened: LanguageModel, texts: Sequence[Sequence[int]]) -> "torch.Tensor":
    before = own_forward(
        opened, {"input_ids": _ids(opened, [text[:_CACHED] for text in texts])}, 1, use_cache=True
    )
    after = {"input_ids": _ids(opened, [text[_CACHED:] for text in texts]), **before.cache}
    return own_forward(opened, after, len(texts[0]) - _CACHED, use_cache=True).logits


def deviation(logits_nV: "torch.Tensor", exact_nV: "torch.Tensor") -> float:
    """Return the root mean square distance of logits from float32's log-probabilities, in nats,
    over the likely tokens.

    Not the widest: that grows with the number of values looked at, and one value decides it.
    """
    import torch

    apart = (torch.log_softmax(logits_nV.float(), -1) - exact_nV)[exact_nV >= LIKELY]
    return float(apart.square().mean().sqrt())


def at_places(
    told_BTV: "torch.Tensor", places: Sequence[Place], *, first: int = 0
) -> "torch.Tensor":
    """Return what stands at places, (n, V); `first` is the token that the tensor's first column is
    of.
    """
    return told_BTV[[text for text, _ in places], [token - first for _, token in places]]


def own_deviation(
    opened: LanguageModel,
    texts: Sequence[Sequence[int]],
    exact_BTV: "torch.Tensor",
    places: Sequence[Place],
) -> float:
    """Return how far the own attention rounds from float32 at places behind the cached tokens, over
    all its ways, in nats.
    """
    exact = at_places(exact_BTV, places)
    squares = [
        deviation(at_places(logits, places, first=_CACHED), exact) ** 2
        for logits in own_ways(opened, texts)
    ]
    return float((sum(squares) / len(squares)) ** 0.5)
