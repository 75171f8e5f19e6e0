"""Rows that are being written: the queue, the choice of each next token, and the two ways to go
from token to token.

`SharedDecoding` keeps rows of different ages in slots behind one copy of what their prompts share;
`padded` lets the model's own attention and cache do it.

Shapes: B rows, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.machine.memory import is_out_of_memory
from harness.models.language_model import LanguageModel
from harness.scoring.backend import Generation, Sampling
from harness.scoring.batch_sizes import common_beginning, pack_tokens
from harness.scoring.finite import NoNumber
from harness.scoring.forbidden import Forbidden
from harness.scoring.plain import Continuing, writing_of
from harness.scoring.prefix_sharing import (
    KeyValues,
    Slots,
    Tree,
    forward_rows,
    forward_step,
    forward_tree,
    prefix_of,
)
from harness.scoring.stopping import StopRule

if TYPE_CHECKING:
    import torch


@dataclass
class Decoding:
    """The rows of one call: those that wait, those being written, and those that are over."""

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
    draws: "dict[int, torch.Generator]" = field(default_factory=dict)
    forbidden: Forbidden = field(default_factory=Forbidden)

    def __post_init__(self) -> None:
        self.forbidden = Forbidden.of(self.opened)
        self.start_over()

    def start_over(self) -> None:
        """Put every unfinished row back into the queue, longest prompt first."""
        rows = [row for row in range(len(self.prompts)) if row not in self.answers]
        self.waiting = deque(sorted(rows, key=lambda row: len(self.prompts[row]), reverse=True))
        self.written, self.draws = {}, {}

    def all_rows(self, run: "Callable[[Decoding], None]", say: Callable[[str], None]) -> None:
        """Decode until nothing waits; where memory runs out, half as many rows at once."""
        while self.waiting:
            try:
                run(self)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem) or self.size == 1:
                    raise
                before, self.size = self.size, max(1, self.size // 2)
                self.start_over()
                say(f"out of memory: {before} rows at once became {self.size}")

    def begin(self, rows: Sequence[int]) -> None:
        """Start writing rows: nothing yet, each with its own stream of draws."""
        import torch

        for row in rows:
            self.written[row] = []
            if self.sampling:
                self.draws[row] = torch.Generator(self.opened.device).manual_seed(
                    self.sampling.stream_of(row)
                )

    def choose(self, logits_BV: "torch.Tensor", rows: Sequence[int]) -> list[int]:
        """Choose each row's next token: the likeliest, or one drawn from the row's own stream.

        Raises `NoNumber` for logits that are none. Whether they are comes with the tokens, as an id
        below 0: asking the device by itself would wait for it once more at every step.
        """
        import torch

        logits_BV = self.forbidden.masked(
            logits_BV, [self.prompts[row] for row in rows], [self.written[row] for row in rows]
        )
        chosen = logits_BV.argmax(dim=-1)
        # a NaN counts as the largest
        finite = torch.isfinite(logits_BV.gather(-1, chosen[:, None])[:, 0])
        if self.sampling is not None:
            chosen = self._drawn(
                logits_BV.masked_fill(~finite[:, None], 0.0), rows, self.sampling.temperature
            )
        tokens: list[int] = chosen.masked_fill(~finite, -1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if token < 0:
                raise NoNumber([*self.prompts[row], *self.written[row]])
        return tokens

    def _drawn(
        self, logits_BV: "torch.Tensor", rows: Sequence[int], temperature: float
    ) -> "torch.Tensor":
        """Draw a token for each row, (B,), on the device."""
        import torch

        weights = torch.softmax(logits_BV.float() / temperature, dim=-1)
        return torch.cat(
            [
                torch.multinomial(weights[index], 1, generator=self.draws[row])
                for index, row in enumerate(rows)
            ]
        )

    def take(self, rows: Sequence[int], chosen: Sequence[int]) -> list[int]:
        """Note each row's new token; return the indices of the rows that are over, which leave."""
        for row, token in zip(rows, chosen, strict=True):
            self.written[row].append(token)
        over = self.stops.ended([self.written[row] for row in rows], self.max_new_tokens)
        for index in over:
            ids = self.written.pop(rows[index])
            self.answers[rows[index]] = self.stops.finish(ids)
            self.finished(rows[index], self.answers[rows[index]])
        return over


def shared(decoding: Decoding) -> None:
    """Decode everything that waits, in slots behind the prompts' common beginning. Must run inside
    `shared_attention`.
    """
    SharedDecoding(decoding).run()


class SharedDecoding:
    """Slots that are refilled: a finished row leaves, and the next in the queue is read into its
    place.
    """

    def __init__(self, decoding: Decoding) -> None:
        import torch

        self.decoding, self.opened = decoding, decoding.opened
        prompts = [decoding.prompts[row] for row in decoding.waiting]
        self.common = common_beginning(prompts)
        prefix = prefix_of(self.opened, prompts[0][: self.common], most=pack_tokens(self.opened))
        capacity = max(map(len, prompts)) - self.common + decoding.max_new_tokens
        self.size = min(decoding.size, len(prompts))
        self.slots = Slots(
            prefix, self.size, capacity, torch.zeros(0, dtype=torch.long, device=self.opened.device)
        )
        self.active: list[int] = []  # the row in each slot
        self.last: list[int] = []  # its newest token

    def run(self) -> None:
        """Go on until nothing is active and nothing waits."""
        while self.active or self.decoding.waiting:
            free = self.size - len(self.active)
            # A refill costs one forward: it waits until an eighth of the slots is free.
            if self.decoding.waiting and (not self.active or free >= max(1, self.size // 8)):
                self._refill(free)
                if not self.active:
                    continue
            self._step()

    def _step(self) -> None:
        """Write one token in each slot; rows that are over leave, and the last ones move into their
        places.
        """
        self.last = self.decoding.choose(
            forward_step(self.opened, self.last, self.slots), self.active
        )
        over = self.decoding.take(self.active, self.last)
        if over:
            order = self.slots.retire(over)
            self.active = [self.active[slot] for slot in order]
            self.last = [self.last[slot] for slot in order]

    def _refill(self, free: int) -> None:
        """Read waiting prompts into free slots, a pack at a time; a row that ends with its first
        token needs none.
        """
        while self.decoding.waiting and free > 0:
            free -= self._admit(self._next_pack(free))

    def _next_pack(self, free: int) -> list[int]:
        waiting, rows, tokens = self.decoding.waiting, list[int](), 0
        while waiting and len(rows) < free:
            length = len(self.decoding.prompts[waiting[0]]) - self.common
            if rows and tokens + length > pack_tokens(self.opened):
                break
            rows.append(waiting.popleft())
            tokens += length
        return rows

    def _admit(self, rows: Sequence[int]) -> int:
        """Read prompts and choose their first tokens; return how many rows go on, each in a
        slot.
        """
        ends, computed, places = self._read(
            [self.decoding.prompts[row][self.common :] for row in rows]
        )
        self.decoding.begin(rows)
        chosen = self.decoding.choose(ends, rows)
        over = set(self.decoding.take(rows, chosen))
        kept = [index for index in range(len(rows)) if index not in over]
        self.active += [rows[index] for index in kept]
        self.last += [chosen[index] for index in kept]
        if kept:
            self.slots.admit(computed, [places[index] for index in kept])
        return len(kept)

    def _read(
        self, rows: Sequence[Sequence[int]]
    ) -> "tuple[torch.Tensor, KeyValues, list[tuple[int, int, int]]]":
        """Run prompts; return the logits at their ends (B, V), keys and values, and where each
        row's stand in them.
        """
        prefix, most = self.slots.prefix, pack_tokens(self.opened)
        if len(rows) == 1 and len(rows[0]) > most:
            held = prefix_of(self.opened, rows[0][:-1], most=most, behind=prefix)
            ends, last = forward_tree(self.opened, Tree.of([rows[0][-1:]]), held, [0])
            return ends, held.extended(last).after(prefix.length), [(0, 0, len(rows[0]))]
        # rows of their own: sorted by length, they need little padding and no mask
        if not prefix.layers:
            return *forward_rows(self.opened, rows), [
                (index, 0, len(row)) for index, row in enumerate(rows)
            ]
        side_by_side = Tree.unmerged(rows)
        ends, computed = forward_tree(
            self.opened, side_by_side, prefix, [path[-1] for path in side_by_side.paths]
        )
        return ends, computed, [(0, path[0], path[-1] + 1) for path in side_by_side.paths]


def padded(decoding: Decoding) -> None:
    """Decode the next rows by the model's own attention, as many at once as it can be asked;
    finished rows leave.
    """
    way = writing_of(decoding.opened)
    count = decoding.size if way.together else 1
    rows = [decoding.waiting.popleft() for _ in range(min(count, len(decoding.waiting)))]
    decoding.begin(rows)
    going = Continuing(decoding.opened, [decoding.prompts[row] for row in rows], way)
    logits = going.begin()
    while True:
        chosen = decoding.choose(logits, rows)
        over = set(decoding.take(rows, chosen))
        kept = [index for index in range(len(rows)) if index not in over]
        rows = [rows[index] for index in kept]
        if not rows:
            return
        logits = going.go_on(kept, [chosen[index] for index in kept])
