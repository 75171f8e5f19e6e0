"""Decoding that no launch holds up: a cache of fixed size, and steps captured as CUDA graphs.

Launched kernel by kernel, a small batch on a GPU waits for Python: models of 1.5B and 7B take the
same time a step. A graph holds the kernels of one step and is launched at once. It also holds every
Python number of the moment of its capture, so whatever changes between steps (token, position,
mask, the cache's fill) must be a tensor that stays in its place. Two are numbers in transformers:
the fill of a sliding window, which has one path while it fills and another when it is full (so a
graph is captured for each), and masks, which the library makes from that number (so the masks of
all steps are made beforehand, by the library itself, and a step picks its own).

What is captured is shown to be right before it is timed: the same forced tokens must give the
logits of the model's own cache, first step by step, then by replay. Anything else raises
`NotCaptured`. Shapes: B rows, T prompt tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.models.cache_format import cache_format_of
from harness.models.states import (
    CACHE_NAMES,
    cache_arguments,
    decoding_options,
    forward_arguments,
)

if TYPE_CHECKING:
    import torch

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # takes work that is not yet done, returns what does it
# Behind a static cache other kernels of attention round otherwise. They may move logits by so many
# times what reading the whole text anew moves them; by the least where that moves them by nothing,
# and never by the most, as shares of the logits' spread over the vocabulary.
ROUNDINGS, LEAST_ROUNDING, MOST_ROUNDING = 3.0, 1e-4, 0.25
# A replay runs the very kernels that were captured.
REPLAY_TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.02}


class NotCaptured(Exception):
    """Why a model's decoding step was not captured, in words that end a sentence."""


class _Segment(NamedTuple):
    """A captured step that is right from one step on: how it is launched, and its logits (B, V)."""

    launch: Work
    logits: "torch.Tensor"


class StaticDecoder:
    """Decodes greedily behind a cache of fixed size, in tensors that stay where they are."""

    def __init__(self, model: Any, ids_BT: "torch.Tensor", new_tokens: int) -> None:
        """Make room for the prompts and `new_tokens`. Raises `NotCaptured` where that cannot be."""
        import torch

        names = forward_arguments(model)
        if names is None or not {"position_ids", "attention_mask"} <= names:
            raise NotCaptured("its forward takes no positions and masks from outside")
        self.model, self.ids_BT = model, ids_BT
        self.steps = new_tokens - 1
        self.cache = _static_cache(model, ids_BT.shape[1] + new_tokens)
        cache_name = next((name for name in CACHE_NAMES if name in names), "past_key_values")
        self._options = {**decoding_options(names), cache_name: self.cache}
        self.token_B1 = torch.zeros_like(ids_BT[:, :1])
        self._number = torch.zeros(1, dtype=torch.long, device=ids_BT.device)  # of the next step
        self._masks: dict[str, torch.Tensor | None] = {}  # (steps, B, 1, 1, cache), by layer type
        self._segments: dict[int, _Segment] = {}  # by the first step that they are right for
        self.logits_BV = torch.empty(0, device=ids_BT.device)  # of the newest step

    def prefill(self) -> None:
        """Empty the cache and read the prompts; the first written tokens become the next input."""
        self.cache.reset()
        self._number.zero_()
        output = self.model(input_ids=self.ids_BT, **self._options)
        self._choose(output.logits[:, -1])

    def walk(self, tokens: "Sequence[torch.Tensor]") -> "Iterator[torch.Tensor]":
        """Force `tokens`, (B, 1) each, step by step; yield each step's logits (B, V).

        The library's mask of each step is kept for the captured ones.
        """
        import torch

        self.prefill()
        masks: list[dict[str, Any]] = []
        for token_B1 in tokens:
            self.token_B1.copy_(token_B1)
            masks.append(self._library_masks())
            self._step(masks[-1])
            yield self.logits_BV
        self._masks = {
            layer_type: None if mask is None else torch.stack([step[layer_type] for step in masks])
            for layer_type, mask in masks[0].items()
        }

    def capture(self, capture: Capture) -> None:
        """Capture a step for each state of the windows; `walk` must have come to its end."""
        self.prefill()
        starts = self._segment_starts()
        for number in range(self.steps):
            if number not in starts:
                self._step(self._masks_of_step())  # Python's numbers move on with the tensors
                continue
            launch = capture(lambda: self._step(self._masks_of_step()))
            self._segments[number] = _Segment(launch, self.logits_BV)
            launch()  # a capture runs nothing

    def replay(self, tokens: "Sequence[torch.Tensor]") -> "Iterator[torch.Tensor]":
        """Do as `walk` does, by launching what was captured."""
        self.prefill()
        for segment, token_B1 in zip(self._launches(), tokens, strict=True):
            self.token_B1.copy_(token_B1)
            segment.launch()
            yield segment.logits

    def run(self, stamp: Callable[[], None]) -> None:
        """Read the prompts and write all tokens; `stamp` is called at the start and at each."""
        stamp()
        self.prefill()
        stamp()
        for segment in self._launches():
            segment.launch()
            stamp()

    def _launches(self) -> Iterator[_Segment]:
        segment = self._segments[0]
        for number in range(self.steps):
            segment = self._segments.get(number, segment)
            yield segment

    def _segment_starts(self) -> frozenset[int]:
        """Return the steps at which a window has become full, and 0."""
        sizes = (getattr(layer, "max_cache_len", 0) for layer in self.cache.layers)
        return frozenset({0, *(size - self.ids_BT.shape[1] for size in sizes)})

    def _step(self, masks: Mapping[str, Any]) -> None:
        """Feed the next token, and choose the one after it."""
        output = self.model(
            input_ids=self.token_B1,
            position_ids=(self._number + self.ids_BT.shape[1])[None],
            attention_mask=masks[""] if "" in masks else dict(masks),
            **self._options,
        )
        self.logits_BV = output.logits[:, -1]
        self._choose(self.logits_BV)
        self._number.add_(1)

    def _choose(self, logits_BV: "torch.Tensor") -> None:
        self.token_B1.copy_(logits_BV.argmax(dim=-1, keepdim=True))

    def _masks_of_step(self) -> dict[str, Any]:
        return {
            layer_type: None if mask is None else mask.index_select(0, self._number)[0]
            for layer_type, mask in self._masks.items()
        }

    def _library_masks(self) -> dict[str, Any]:
        """Return the masks of the next step by layer type; under "" that of a model with one."""
        import torch
        from transformers import masking_utils

        create = getattr(
            self.model, "create_masks_for_generate", masking_utils.create_masks_for_generate
        )
        names = inspect.signature(create).parameters
        rows, device = len(self.ids_BT), self.ids_BT.device
        masks = create(
            config=self.model.config,
            inputs_embeds=torch.empty((rows, 1, 0), dtype=self.model.dtype, device=device),
            attention_mask=None,
            position_ids=None,
            **{"cache" if "cache" in names else "past_key_values": self.cache},
        )
        return dict(masks) if isinstance(masks, dict) else {"": masks}


def _static_cache(model: Any, tokens: int) -> Any:
    """Return transformers' cache of a fixed size. Raises `NotCaptured` where a family has none."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticSlidingWindowLayer

    if cache_format_of(model.config) is not None:
        raise NotCaptured("its quantized cache grows from step to step")
    try:
        cache = StaticCache(config=model.config, max_cache_len=tokens)
    except Exception as problem:  # an unknown kind of layer: the library has no name for it
        raise NotCaptured(f"its family has no static cache ({type(problem).__name__})") from problem
    if not cache.is_compileable:
        raise NotCaptured("its cache changes its size from step to step")
    for layer in cache.layers:
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.update = partial(_update_window, layer)
    return cache


def _update_window(
    layer: Any, keys: "torch.Tensor", values: "torch.Tensor", *arguments: Any, **named: Any
) -> Any:
    """Add a token to a full window by moving the others, as the library does; else let it do so.

    It names the last place by a tensor that it makes of a Python number, which no capture allows.
    """
    import torch

    is_full = layer.is_initialized and layer.get_seq_length() >= layer.max_cache_len
    if not is_full or keys.shape[-2] != 1:
        return type(layer).update(layer, keys, values, *arguments, **named)
    layer.cumulative_length_int += 1
    for held, added in ((layer.keys, keys), (layer.values, values)):
        held.copy_(torch.cat((held[:, :, 1:], added), dim=-2))
    return layer.keys, layer.values


def captured_decoder(
    model: Any, ids_BT: "torch.Tensor", new_tokens: int, *, capture: Capture, dtype: str
) -> StaticDecoder:
    """Return a decoder whose captured steps were shown to give the model's own logits.

    Raises `NotCaptured` where they differ by more than rounding, or the family has no static cache.
    """
    import torch

    with torch.inference_mode():
        tokens, expected = _own_logits(model, ids_BT, new_tokens)
        rounding = ROUNDINGS * _distance(_logits_read_anew(model, ids_BT, tokens), expected)
        tolerance = min(max(rounding, LEAST_ROUNDING), MOST_ROUNDING)
        decoder = StaticDecoder(model, ids_BT, new_tokens)
        walked = [_kept_rows(logits) for logits in decoder.walk(tokens)]
        _require_equal(walked, expected, tolerance, "behind a static cache")
        decoder.capture(capture)
        replayed = [_kept_rows(logits) for logits in decoder.replay(tokens)]
        _require_equal(replayed, walked, REPLAY_TOLERANCE[dtype], "in the captured graph")
    return decoder


def _own_logits(
    model: Any, ids_BT: "torch.Tensor", new_tokens: int
) -> "tuple[list[torch.Tensor], list[torch.Tensor]]":
    """Return a greedy run's inputs after the prompt, (B, 1) each, and what each gave."""
    names = forward_arguments(model)
    options = decoding_options(names)
    output = model(input_ids=ids_BT, **options)
    tokens, logits = [], []
    for _ in range(new_tokens - 1):
        cache = cache_arguments(output, names)
        if not cache:
            raise NotCaptured("it hands no cache from step to step")
        tokens.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
        output = model(input_ids=tokens[-1], **cache, **options)
        logits.append(_kept_rows(output.logits[:, -1]))
    return tokens, logits


def _kept_rows(logits_BV: "torch.Tensor") -> "torch.Tensor":
    """Return a copy of the first and last row: all rows of a large vocabulary fill the memory."""
    return logits_BV[[0, -1]].float()


def _logits_read_anew(
    model: Any, ids_BT: "torch.Tensor", tokens: "Sequence[torch.Tensor]"
) -> "list[torch.Tensor]":
    """Return the logits of the forced steps, the whole text read at once without a cache."""
    import torch

    text = torch.cat([ids_BT, *tokens], dim=1)[[0, -1]]
    names = forward_arguments(model) or frozenset()
    kept = {"logits_to_keep": len(tokens)} if "logits_to_keep" in names else {}
    logits = model(input_ids=text, use_cache=False, **kept).logits[:, -len(tokens) :]
    return list(logits.float().unbind(dim=1))


def _distance(logits: "Sequence[torch.Tensor]", expected: "Sequence[torch.Tensor]") -> float:
    """Return how far a step's logits lie from the expected at most, as a share of their spread."""
    largest = 0.0
    for step, step_expected in zip(logits, expected, strict=True):
        spread = (step_expected - step_expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
        shares = (step - step_expected).norm(dim=-1) / spread
        largest = max(largest, float(shares.nan_to_num(nan=float("inf")).max()))
    return largest


def _require_equal(
    logits: "Sequence[torch.Tensor]",
    expected: "Sequence[torch.Tensor]",
    tolerance: float,
    place: str,
) -> None:
    """Raise `NotCaptured` where a step's logits lie further from the expected than `tolerance`."""
    distance = _distance(logits, expected)
    if not distance <= tolerance:
        raise NotCaptured(
            f"{place} its logits differ by {distance:.2g} of their spread, and {tolerance:.2g} is "
            "rounding"
        )


def capture_on_cuda(work: Work) -> Work:
    """Capture work as a CUDA graph. What it allocates is the graph's own memory."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    launch: Work = graph.replay
    return launch
