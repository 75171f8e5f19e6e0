"""The plain path: a model run as transformers runs it, in padded batches where a probe allows them.

Recurrent and hybrid models differ from attention in many ways: their caches have other names, some
carry the padding along in their state, some cannot drop a row from a batch. So every model is
probed once, on random tokens: can it run several rows at once, and can it use its cache? One row
without a cache is always right; the probe compares everything else with that.

Shapes: B rows, T tokens, V vocabulary.
"""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from harness.models.cache_format import cache_format_of
from harness.models.language_model import LanguageModel
from harness.models.states import CACHE_NAMES, cache_arguments

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}  # of a log-probability
# of a log-probability; in other types than float32 only likelier tokens are compared
_MIN_LOG_PROBABILITY = -12.0
# of the probe's rows: beyond the windows of small models, and one of a few tokens
_PROBE_LENGTHS = (29, 18, 5)
_PROBE_STEPS = 3


@dataclass(frozen=True)
class DecodingMode:
    """How a model decodes on the plain path."""

    batched: bool = False  # several rows at once
    # each step gets the mask of all tokens before it; Mamba would take that for its own tokens
    masks_steps: bool = False
    uses_cache: bool = False  # else each step reads the whole text
    reason: str = ""  # why rows are not batched


_SINGLE_ROW_REASONS: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()
_DECODING_MODES: "WeakKeyDictionary[Any, DecodingMode]" = WeakKeyDictionary()


def reason_for_single_rows(opened: LanguageModel) -> str:
    """Return why a model must read one row at a time; "" where padded batches give the same.

    Probed once per model.
    """
    if opened.model not in _SINGLE_ROW_REASONS:
        _SINGLE_ROW_REASONS[opened.model] = _probe_problem(
            opened, lambda: _padding_gaps(opened), "padding"
        )
    return _SINGLE_ROW_REASONS[opened.model]


def decoding_mode(opened: LanguageModel) -> DecodingMode:
    """Return the fastest mode whose steps agree with reading the whole text without a cache.

    Probed once per model.
    """
    if opened.model not in _DECODING_MODES:
        _DECODING_MODES[opened.model] = _probe_modes(opened)
    return _DECODING_MODES[opened.model]


def _probe_modes(opened: LanguageModel) -> DecodingMode:
    reason = reason_for_single_rows(opened)
    for batched in (True, False) if not reason else (False,):
        for masks_steps in (True, False):
            mode = DecodingMode(
                batched=batched,
                masks_steps=masks_steps,
                uses_cache=True,
                reason="" if batched else reason,
            )
            problem = _probe_problem(
                opened,
                partial(_decoding_gaps, opened, mode),
                "decoding" if batched else "decoding from its cache",
            )
            if not problem:
                return mode
            reason = reason or problem
    return DecodingMode(reason=f"{reason}; and each step reads the whole text: {problem}")


def single_row_note(opened: LanguageModel, *, writes: bool) -> str:
    """Return a note where a model runs one row at a time whatever the batch size, else ""."""
    reason = decoding_mode(opened).reason if writes else reason_for_single_rows(opened)
    return (
        reason
        and f"{opened.checkpoint.name} {'writes' if writes else 'is read'} one row at a time, "
        f"whatever the batch size: {reason}"
    )


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: str
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Return ids, attention mask and positions, (B, T) each, with the padding on the left."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def last_logits(opened: LanguageModel, rows: Sequence[Sequence[int]], count: int) -> "torch.Tensor":
    """Run rows and return the logits of their last `count` positions, (B, count, V).

    A single row is run without mask and positions; several are padded on the left.
    """
    import torch

    if len(rows) == 1:
        return plain_forward(
            opened, {"input_ids": torch.tensor([list(rows[0])], device=opened.device)}, count
        ).logits
    ids, mask, positions = left_padded(rows, opened.pad_id, opened.device)
    return plain_forward(
        opened, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, count
    ).logits


@dataclass
class _PlainOutput:
    logits: "torch.Tensor"  # (B, count, V)
    # by the name of the argument with which the next step returns it
    cache: dict[str, Any] = field(default_factory=dict)


def plain_forward(
    opened: LanguageModel, arguments: Mapping[str, Any], count: int, *, use_cache: bool = False
) -> _PlainOutput:
    """Call the model; return the logits of the last `count` positions, and its cache.

    Arguments that the model's forward does not name are left out.
    """
    import torch

    parameters = inspect.signature(opened.model.forward).parameters
    accepted = {
        name: value
        for name, value in arguments.items()
        if name in parameters or name == "input_ids"
    }
    if "use_cache" in parameters:
        accepted["use_cache"] = use_cache
    if "logits_to_keep" in parameters:
        accepted["logits_to_keep"] = count
    with torch.inference_mode():
        output = opened.model(**accepted)
    return _PlainOutput(output.logits[:, -count:], cache_arguments(output, parameters))


class PaddedDecoder:
    """Decodes a left-padded batch by the model's own attention and cache; rows may leave it."""

    def __init__(
        self, opened: LanguageModel, rows: Sequence[Sequence[int]], mode: DecodingMode
    ) -> None:
        self.opened, self.mode = opened, mode
        self.rows = [list(row) for row in rows]
        self._arguments: dict[str, Any] = {}

    def prefill(self) -> "torch.Tensor":
        """Read the prompts; return the logits after them, (B, V)."""
        if not self.mode.uses_cache:
            return self._read_whole_rows()
        ids, mask, positions = left_padded(self.rows, self.opened.pad_id, self.opened.device)
        self._arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self._forward()

    def step(self, kept: Sequence[int], tokens: Sequence[int]) -> "torch.Tensor":
        """Drop all rows but `kept`, append a token to each of these; return the next logits (B, V).

        `tokens` holds one token for each kept row, in the same order.
        """
        import torch

        drops_rows = len(kept) < len(self.rows)
        self.rows = [[*self.rows[index], token] for index, token in zip(kept, tokens, strict=True)]
        if not self.mode.uses_cache:
            return self._read_whole_rows()
        device = self.opened.device
        if drops_rows:
            self._select(torch.tensor(list(kept), device=device))
        arguments = self._arguments
        arguments["input_ids"] = torch.tensor(list(tokens), device=device)[:, None]
        mask = arguments["attention_mask"]
        arguments["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        arguments["position_ids"] = arguments["position_ids"][:, -1:] + 1
        return self._forward()

    def _select(self, kept: "torch.Tensor") -> None:
        for name in ("attention_mask", "position_ids"):
            self._arguments[name] = self._arguments[name][kept]
        for name in CACHE_NAMES:
            # batch_select_indices leaves the states of recurrent layers as they are, or lacks them
            if name in self._arguments:
                self._arguments[name].reorder_cache(kept)

    def _forward(self) -> "torch.Tensor":
        arguments = dict(self._arguments)
        if not self.mode.masks_steps and any(name in arguments for name in CACHE_NAMES):
            del arguments["attention_mask"]
        output = plain_forward(self.opened, arguments, 1, use_cache=True)
        if not output.cache:
            raise NotImplementedError("its forward returns no cache that it accepts as an argument")
        self._arguments |= output.cache
        return output.logits[:, -1]

    def _read_whole_rows(self) -> "torch.Tensor":
        """Return the logits (B, V) after each row, read alone and without a cache."""
        import torch

        return torch.cat([last_logits(self.opened, [row], 1)[:, -1] for row in self.rows])


def _probe_rows(opened: LanguageModel) -> list[list[int]]:
    """Return the probe's rows: random tokens, of several lengths."""
    longest = max(2, opened.context - _PROBE_STEPS - 1)
    return [_random_tokens(opened, min(length, longest), seed=length) for length in _PROBE_LENGTHS]


def _random_tokens(opened: LanguageModel, count: int, *, seed: int) -> list[int]:
    """Return random tokens, without placeholders of images."""
    generator, placeholders = random.Random(f"probe/{seed}"), opened.placeholders
    ids = (generator.randrange(opened.vocabulary) for _ in range(100 * count + 1_000))
    return list(islice((token for token in ids if token not in placeholders), count))


def _probe_problem(
    opened: LanguageModel, compute_gaps: "Callable[[], list[torch.Tensor]]", what: str
) -> str:
    """Return why a way of running a model is wrong; "" where its log-probabilities agree.

    `compute_gaps` runs the model that way, and returns how far log-probabilities move.
    """
    import torch

    from harness.machine.memory import is_out_of_memory

    try:
        widest = float(torch.stack(compute_gaps()).max())
    # The model's code may come from anywhere. Whatever it raises is the reason not to run it this
    # way.
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        lines = str(problem).splitlines() or ["no message"]
        return f"{what} fails with {type(problem).__name__}: {lines[0][:100]}"
    tolerance = 1.0 if _is_quantized(opened) else _TOLERANCE.get(opened.dtype, 0.5)
    return "" if widest <= tolerance else f"{what} moves its log-probabilities by {widest:.2g}"


def _is_quantized(opened: LanguageModel) -> bool:
    """Tell whether a model computes or stores integers: a number between two codes takes either."""
    is_packed = bool(getattr(opened.model, "is_quantized", False))
    return is_packed or cache_format_of(opened.model.config) is not None


def _single_row_log_p(opened: LanguageModel, row: Sequence[int], count: int) -> "torch.Tensor":
    """Return the log-probabilities (count, V) at the end of a row that is read alone."""
    import torch

    return torch.log_softmax(last_logits(opened, [row], count)[0].float(), -1)


def _widest_gap(
    opened: LanguageModel, logits: "torch.Tensor", expected_log_p: "torch.Tensor"
) -> "torch.Tensor":
    """Return the widest gap between logits and the expected log-probabilities, a scalar tensor.

    In other types than float32 only likely tokens are compared.
    """
    import torch

    is_exact = opened.dtype == "float32" and not _is_quantized(opened)
    floor = -torch.inf if is_exact else _MIN_LOG_PROBABILITY
    gaps = torch.log_softmax(logits.float(), -1) - expected_log_p
    return gaps.masked_fill(expected_log_p < floor, 0.0).abs().max()


def _padding_gaps(opened: LanguageModel) -> "list[torch.Tensor]":
    """Return how far a padded batch moves the log-probabilities of each row."""
    rows = _probe_rows(opened)
    expected = [_single_row_log_p(opened, row, min(len(row), 4)) for row in rows]
    logits = last_logits(opened, rows, 4)
    return [
        _widest_gap(opened, row_logits[len(row_logits) - len(log_p) :], log_p)
        for row_logits, log_p in zip(logits, expected, strict=True)
    ]


def _decoding_gaps(opened: LanguageModel, mode: DecodingMode) -> "list[torch.Tensor]":
    """Decode random tokens, drop the middle row on the way; compare each step with a full read."""
    decoder = PaddedDecoder(opened, _probe_rows(opened)[: None if mode.batched else 1], mode)
    logits, gaps = decoder.prefill(), []
    for step in range(_PROBE_STEPS + 1):
        gaps += [
            _widest_gap(opened, row_logits[None], _single_row_log_p(opened, row, 1))
            for row_logits, row in zip(logits, decoder.rows, strict=True)
        ]
        if step < _PROBE_STEPS:
            kept = [row for row in range(len(decoder.rows)) if not (step == 1 and row == 1)]
            logits = decoder.step(kept, _random_tokens(opened, len(kept), seed=-step))
    return gaps
