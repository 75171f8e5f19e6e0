"""Decodes prompts: the queue, the choice of each next token, and the two ways to decode.

`SlotDecoder` keeps rows of different ages in slots after one copy of the prompts' common prefix.
`decode_padded_batch` uses the model's own attention and cache.

Shapes: B rows, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.machine.memory import is_out_of_memory
from harness.models.language_model import LanguageModel
from harness.scoring.backend import Generation, Sampling
from harness.scoring.batch_sizes import tokens_per_pack, worthwhile_prefix_length
from harness.scoring.finite import NonFiniteLogits
from harness.scoring.forbidden import ForbiddenTokens
from harness.scoring.plain import PaddedDecoder, decoding_mode
from harness.scoring.prefix_sharing import (
    DecodingSlots,
    KeyValues,
    Span,
    TokenTree,
    compute_prefix,
    forward_rows,
    forward_step,
    forward_tree,
)
from harness.scoring.stopping import StopRule

if TYPE_CHECKING:
    import torch


@dataclass
class DecodingCall:
    """The rows of one call: those that wait, those being decoded, and those that have ended."""

    opened: LanguageModel
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stops: StopRule
    sampling: Sampling | None
    size: int  # rows at once
    finished: Callable[[int, Generation], None]
    answers: dict[int, Generation] = field(default_factory=dict)
    waiting: "deque[int]" = field(default_factory=deque)
    written: dict[int, list[int]] = field(default_factory=dict)
    generators: "dict[int, torch.Generator]" = field(default_factory=dict)
    forbidden: ForbiddenTokens = field(default_factory=ForbiddenTokens)

    def __post_init__(self) -> None:
        self.forbidden = ForbiddenTokens.of(self.opened)
        self.requeue_unfinished()

    def requeue_unfinished(self) -> None:
        """Put every unfinished row back into the queue, longest prompt first."""
        rows = [row for row in range(len(self.prompts)) if row not in self.answers]
        self.waiting = deque(sorted(rows, key=lambda row: len(self.prompts[row]), reverse=True))
        self.written, self.generators = {}, {}

    def decode_all(
        self, decode: "Callable[[DecodingCall], None]", say: Callable[[str], None]
    ) -> None:
        """Decode until no row waits; each time memory runs out, halve the rows at once."""
        while self.waiting:
            try:
                decode(self)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem) or self.size == 1:
                    raise
                size_before, self.size = self.size, max(1, self.size // 2)
                self.requeue_unfinished()
                say(f"out of memory: {size_before} rows at once became {self.size}")

    def begin(self, rows: Sequence[int]) -> None:
        """Start decoding rows: no token is written yet, and each has its own random stream."""
        import torch

        for row in rows:
            self.written[row] = []
            if self.sampling:
                self.generators[row] = torch.Generator(self.opened.device).manual_seed(
                    self.sampling.stream_of(row)
                )

    def choose(self, logits_BV: "torch.Tensor", rows: Sequence[int]) -> list[int]:
        """Choose each row's next token: the likeliest one, or one sampled from the row's stream.

        Raises `NonFiniteLogits` for NaN or infinite logits. The device reports those as a token id
        below 0: a separate question would make the CPU wait for the device once more a step.
        """
        import torch

        logits_BV = self.forbidden.mask_logits(
            logits_BV, [self.prompts[row] for row in rows], [self.written[row] for row in rows]
        )
        chosen = logits_BV.argmax(dim=-1)
        # argmax takes a NaN for the largest value, so the chosen logit shows whether there is one
        is_finite = torch.isfinite(logits_BV.gather(-1, chosen[:, None])[:, 0])
        if self.sampling is not None:
            chosen = self._sample(
                logits_BV.masked_fill(~is_finite[:, None], 0.0), rows, self.sampling.temperature
            )
        tokens: list[int] = chosen.masked_fill(~is_finite, -1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if token < 0:
                raise NonFiniteLogits([*self.prompts[row], *self.written[row]])
        return tokens

    def _sample(
        self, logits_BV: "torch.Tensor", rows: Sequence[int], temperature: float
    ) -> "torch.Tensor":
        """Sample a token for each row, (B,), on the device."""
        import torch

        weights = torch.softmax(logits_BV.float() / temperature, dim=-1)
        return torch.cat(
            [
                torch.multinomial(weights[index], 1, generator=self.generators[row])
                for index, row in enumerate(rows)
            ]
        )

    def append_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Append a token to each row; store the rows that end, and return their indices."""
        for row, token in zip(rows, tokens, strict=True):
            self.written[row].append(token)
        ended = self.stops.ended([self.written[row] for row in rows], self.max_new_tokens)
        for index in ended:
            ids = self.written.pop(rows[index])
            self.answers[rows[index]] = self.stops.finish(ids)
            self.finished(rows[index], self.answers[rows[index]])
        return ended


def decode_in_slots(call: DecodingCall) -> None:
    """Decode all waiting rows in slots after their common prefix, inside `shared_attention`."""
    SlotDecoder(call).run()


class SlotDecoder:
    """Slots that are refilled: when a row ends, the next one in the queue takes its place."""

    def __init__(self, call: DecodingCall) -> None:
        import torch

        self.call, self.opened = call, call.opened
        prompts = [call.prompts[row] for row in call.waiting]
        self.common = worthwhile_prefix_length(prompts)
        prefix = compute_prefix(
            self.opened, prompts[0][: self.common], most=tokens_per_pack(self.opened)
        )
        capacity = max(map(len, prompts)) - self.common + call.max_new_tokens
        self.size = min(call.size, len(prompts))
        no_lengths = torch.zeros(0, dtype=torch.long, device=self.opened.device)
        self.slots = DecodingSlots(prefix, self.size, capacity, no_lengths)
        self.active: list[int] = []  # the row in each slot
        self.last: list[int] = []  # the newest token in each slot

    def run(self) -> None:
        """Decode until no row is active and none waits."""
        while self.active or self.call.waiting:
            free = self.size - len(self.active)
            # A refill costs one forward, so it waits until an eighth of the slots is free.
            if self.call.waiting and (not self.active or free >= max(1, self.size // 8)):
                self._refill(free)
                if not self.active:
                    continue
            self._step()

    def _step(self) -> None:
        """Decode one token in each slot; free the slots of rows that end, and close the gaps."""
        logits = forward_step(self.opened, self.last, self.slots)
        self.last = self.call.choose(logits, self.active)
        ended = self.call.append_tokens(self.active, self.last)
        if ended:
            order = self.slots.retire(ended)
            self.active = [self.active[slot] for slot in order]
            self.last = [self.last[slot] for slot in order]

    def _refill(self, free: int) -> None:
        """Read waiting prompts into free slots, a pack at a time.

        A row that ends with its first token needs no slot.
        """
        while self.call.waiting and free > 0:
            free -= self._admit(self._next_pack(free))

    def _next_pack(self, free: int) -> list[int]:
        """Take rows from the queue: at most `free`, and as many tokens as fit into one forward."""
        waiting, rows, tokens = self.call.waiting, list[int](), 0
        while waiting and len(rows) < free:
            length = len(self.call.prompts[waiting[0]]) - self.common
            if rows and tokens + length > tokens_per_pack(self.opened):
                break
            rows.append(waiting.popleft())
            tokens += length
        return rows

    def _admit(self, rows: Sequence[int]) -> int:
        """Read prompts and choose their first tokens; return how many rows got a slot."""
        logits, computed, spans = self._read_prompts(
            [self.call.prompts[row][self.common :] for row in rows]
        )
        self.call.begin(rows)
        tokens = self.call.choose(logits, rows)
        ended = set(self.call.append_tokens(rows, tokens))
        going_on = [index for index in range(len(rows)) if index not in ended]
        self.active += [rows[index] for index in going_on]
        self.last += [tokens[index] for index in going_on]
        if going_on:
            self.slots.admit(computed, [spans[index] for index in going_on])
        return len(going_on)

    def _read_prompts(
        self, prompts: Sequence[Sequence[int]]
    ) -> "tuple[torch.Tensor, KeyValues, list[Span]]":
        """Run prompts after the prefix.

        Returns the logits at their ends (B, V), the keys and values that were computed, and the
        span of each prompt in these.
        """
        prefix, most = self.slots.prefix, tokens_per_pack(self.opened)
        if len(prompts) == 1 and len(prompts[0]) > most:
            all_but_last = compute_prefix(self.opened, prompts[0][:-1], most=most, preceding=prefix)
            logits, last = forward_tree(
                self.opened, TokenTree.of([prompts[0][-1:]]), all_but_last, [0]
            )
            computed = all_but_last.extended(last).after(prefix.length)
            return logits, computed, [Span(0, 0, len(prompts[0]))]
        # without a prefix, rows sorted by length need little padding and no mask
        if not prefix.layers:
            logits, computed = forward_rows(self.opened, prompts)
            return logits, computed, [Span(row, 0, len(ids)) for row, ids in enumerate(prompts)]
        tree = TokenTree.unmerged(prompts)
        last_nodes = [path[-1] for path in tree.paths]
        logits, computed = forward_tree(self.opened, tree, prefix, last_nodes)
        return logits, computed, [Span(0, path[0], path[-1] + 1) for path in tree.paths]


def decode_padded_batch(call: DecodingCall) -> None:
    """Decode the next rows of the queue to their ends, by the model's own attention and cache.

    A batch has as many rows as the model can take at once; rows that end leave it.
    """
    mode = decoding_mode(call.opened)
    count = call.size if mode.batched else 1
    rows = [call.waiting.popleft() for _ in range(min(count, len(call.waiting)))]
    call.begin(rows)
    decoder = PaddedDecoder(call.opened, [call.prompts[row] for row in rows], mode)
    logits = decoder.prefill()
    while True:
        tokens = call.choose(logits, rows)
        ended = set(call.append_tokens(rows, tokens))
        going_on = [index for index in range(len(rows)) if index not in ended]
        rows = [rows[index] for index in going_on]
        if not rows:
            return
        logits = decoder.step(going_on, [tokens[index] for index in going_on])
