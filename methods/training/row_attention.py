"""Attention over rows that stand one after another without padding, and masks nobody waits for.

transformers looks up its attention by name. Ours (`harness-rows`) is its `sdpa`, with two
differences. Rows that are packed (`layouts.PackedRows`) are padded again for the attention alone:
every other layer works on real tokens, no token sees another row, and no mask is made. (A dense
block-diagonal mask over all rows is several times slower on a CPU.) For rows that are padded, the
mask is that of `sdpa`; whether there is padding is known from the rows' lengths and is not read
back from the device.

A model may use it where its layers are attention over all earlier tokens, and a probe of two rows
agrees with the model's own attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from harness.errors import CellFailed, in_one_line
from harness.models.blocks import probe_ids
from methods.training.layouts import PackedRows, PaddedRows, RowLayout
from methods.training.rows import Batch, TokenRow, batch_of

ATTENTION_NAME = "harness-rows"

_OWN = "sdpa"  # what it may replace
_PACKED_MODELS: "WeakSet[Any]" = WeakSet()
_HAS_PADDING: ContextVar[bool | None] = ContextVar("has_padding", default=None)
# arguments of an attention function that say that a token does not see all earlier ones alike
_UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "sliding_window", "position_bias")
# of the largest logit: another order of sums in float32; rounding in 16 bits
_TOLERANCE, _COARSE_TOLERANCE = 1e-4, 5e-2
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx")


class UnpackableAttention(Exception):
    """The model's attention does what ours does not compute; see message."""


def layout_of(model: Any, batch: Batch) -> RowLayout:
    """Return how a model reads a batch: packed where it can and shall, else padded."""
    if model in _PACKED_MODELS:
        return batch.packed
    return batch.padded(most=_longest_row(model))


def _longest_row(model: Any) -> int | None:
    """Return how many positions a model has: no row may be padded beyond."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text_config = config.get_text_config()
    lengths = (getattr(text_config, name, None) for name in _CONTEXTS)
    return next((int(length) for length in lengths if length is not None), None)


@contextmanager
def padding_of(layout: RowLayout) -> Iterator[None]:
    """Tell our masks whether the rows that a model reads inside are padded."""
    token = _HAS_PADDING.set(layout.has_padding if isinstance(layout, PaddedRows) else None)
    try:
        yield
    finally:
        _HAS_PADDING.reset(token)


class RowAttention:
    """Our attention in a model; `close` gives the model its own again.

    `refusal` says why the model does not read packed rows, "" where it does. Where it does not, or
    with `pack=False`, waiting for masks is saved all the same, if its attention can be replaced.
    """

    def __init__(self, model: Any, *, pack: bool) -> None:
        self.model, self.refusal = model, ""
        was_training = model.training
        model.eval()
        try:
            self._replace(pack=pack)
        finally:
            model.train(was_training)

    def _replace(self, *, pack: bool) -> None:
        """Put our attention into the model, and let it read packed rows where a probe agrees."""
        implementation = _text_config(self.model)._attn_implementation
        if implementation != _OWN:
            self.refusal = f"its attention is {implementation}, not {_OWN}"
            return
        batch = _probe_batch(self.model)
        padded = batch.padded(most=_longest_row(self.model))
        expected = _logits(self.model, padded)
        _register()
        self.model.set_attn_implementation(ATTENTION_NAME)
        if _text_config(self.model)._attn_implementation != ATTENTION_NAME:
            self.refusal = "its attention cannot be replaced"
            return
        self.refusal = _probe_refusal(self.model, padded, expected)
        if self.refusal:
            self.close()
        elif pack:
            self.refusal = _refusal_by_configuration(self.model) or _probe_refusal(
                self.model, batch.packed, expected
            )
            if not self.refusal:
                _PACKED_MODELS.add(self.model)

    def close(self) -> None:
        """Restore the model."""
        _PACKED_MODELS.discard(self.model)
        if _text_config(self.model)._attn_implementation == ATTENTION_NAME:
            self.model.set_attn_implementation(_OWN)


def packs_by_default(device: torch.device) -> bool:
    """Tell whether `packing=auto` packs rows: on a GPU.

    A CPU gains 7 % at most, and its students keep the bytes that they had: packed rows are summed
    in another order.
    """
    return bool(device.type == "cuda")


def attend_by_rows(
    models: Sequence[Any],
    packing: Literal["auto", "on", "off"],
    *,
    device: torch.device,
    compares_attention: bool,
) -> list[RowAttention]:
    """Let a student and the teachers beside it read packed rows, where `packing` and they allow it.

    Rows stay padded where attention is compared: its maps are one square a row. With `on` a student
    that cannot is refused; a teacher then reads padded rows, which changes no loss.
    """
    if packing == "off" or (packing == "auto" and not packs_by_default(device)):
        return []
    attentions = [RowAttention(model, pack=not compares_attention) for model in models]
    reason = attentions[0].refusal or (
        "attention is compared of padded rows" if compares_attention else ""
    )
    if packing == "on" and reason:
        for attention in attentions:
            attention.close()
        raise CellFailed(
            f"packing=on: rows of {type(models[0]).__name__} cannot be packed ({reason}); type "
            "--set METHOD.packing=auto"
        )
    return attentions


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _refusal_by_configuration(model: Any) -> str:
    config = _text_config(model)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other_types := layer_types - {"full_attention"}:
        return f"its layers are {', '.join(sorted(other_types))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention slides over a window of {config.sliding_window} tokens"
    return ""


def _probe_batch(model: Any) -> Batch:
    """Return two rows of unequal length, the second one longer."""
    [ids] = probe_ids(model).tolist()
    short = max(1, len(ids) // 2 - 1)
    rows = [TokenRow(tuple(reversed(ids[:short])), 1), TokenRow(tuple(ids), 1)]
    return batch_of(rows, ids[0], next(model.parameters()).device)


def _logits(model: Any, layout: RowLayout) -> Tensor:
    """Return the logits of every token, row by row, (tokens, V)."""
    with torch.no_grad(), padding_of(layout):
        logits = model(input_ids=layout.ids, use_cache=False, **layout.inputs).logits
    by_place: Tensor = logits.flatten(0, 1).float()
    if isinstance(layout, PaddedRows):
        return by_place[layout.attention.bool().flatten()]
    assert isinstance(layout, PackedRows)
    return by_place[: layout.tokens]


def _probe_refusal(model: Any, layout: RowLayout, expected: Tensor) -> str:
    """Return why our attention is not the model's own over a layout; "" where it is."""
    coarse = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    tolerance = (_COARSE_TOLERANCE if coarse else _TOLERANCE) * float(expected.abs().max())
    try:
        gap = float((_logits(model, layout) - expected).abs().max())
    except UnpackableAttention as problem:
        return str(problem)
    # the model's code may come from anywhere: whatever it raises is the reason
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        return f"a probe failed ({in_one_line(problem)})"
    return "" if gap <= tolerance else f"a probe's logits moved by {gap:.2g}"


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """Attend as `sdpa` does; over packed rows, each for itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend_as_usual = ALL_ATTENTION_FUNCTIONS[_OWN]
    layout = options.pop("packed_rows", None)
    if layout is None:
        usual: tuple[Tensor, Any] = attend_as_usual(
            module, query, key, value, attention_mask, **options
        )
        return usual
    unsupported = [name for name in _UNSUPPORTED_ARGUMENTS if options.get(name) is not None]
    if unsupported:
        raise UnpackableAttention(f"its attention uses {unsupported[0]}")
    padded = (layout.pad(states) for states in (query, key, value))
    attended, weights = attend_as_usual(module, *padded, None, **options)
    return layout.pack(attended), weights


def _mask(
    *, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options: Any
) -> Tensor | None:
    """Return the mask that `sdpa` would get, without reading whether any row is padded."""
    from transformers.masking_utils import sdpa_mask

    has_padding = _HAS_PADDING.get()
    if has_padding is not None and attention_mask is not None:
        attention_mask = attention_mask if has_padding else None
        allow_is_causal_skip = allow_is_causal_skip and not has_padding
    mask: Tensor | None = sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options
    )
    return mask
