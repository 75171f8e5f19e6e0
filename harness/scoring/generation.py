"""Decodes prompts: every row stops for itself, a finished row leaves and the next in the queue takes its place.

Used by the scorer and by methods that let a teacher write. What the prompts share at their beginning is computed
once. In fp32 the batch size does not change an answer. Models that the shared path refuses are decoded in
left-padded batches by their own attention, with the same rules for stopping.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from harness.machine.memory import is_out_of_memory
from harness.models.encoding import shared_length
from harness.models.language_model import LanguageModel
from harness.models.shape import CPU_CACHE, ROWS_AT_ONCE
from harness.scoring.admission import refusal
from harness.scoring.finite import NoNumber, not_finite
from harness.scoring.forbidden import Forbidden
from harness.scoring.plain import Continuing, note_of, writing_of
from harness.scoring.prefix_sharing import KeyValues, Slots, Tree, forward_rows, forward_step, forward_tree, prefix_of, shared_attention

if TYPE_CHECKING:
    import torch

StopReason = Literal["eos", "stop", "length"]
BatchSize = int | Literal["auto"]
PACK_TOKENS = {"cpu": 768, "cuda": 4096}  # of one packed forward: enough to fill the device, few enough to mask cheaply
WORTH_SHARING = 32  # tokens of a common beginning

_REFUSALS: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()


def why_plain(opened: LanguageModel) -> str:
    """Return why a model is run by its own attention in padded batches, "" where it shares; asked once a model."""
    if opened.model not in _REFUSALS:
        _REFUSALS[opened.model] = refusal(opened)
    return _REFUSALS[opened.model]


def pack_tokens(opened: LanguageModel) -> int:
    """Return how many tokens one packed forward takes on this device."""
    return PACK_TOKENS["cuda" if opened.device.startswith("cuda") else "cpu"]


def rows_by_memory(opened: LanguageModel, tokens: int) -> int:
    """Return how many rows of `tokens` tokens may be decoded at once: by the device's free memory, and no more than helps."""
    import torch

    row = max(1, _bytes_of_row(opened, tokens))
    if opened.device.startswith("cuda"):
        free, most = torch.cuda.mem_get_info()[0], ROWS_AT_ONCE["cuda"]
    else:
        free, most = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), ROWS_AT_ONCE["cpu"]
    share = int(free * 0.4) if opened.device.startswith("cuda") else min(int(free * 0.4), CPU_CACHE)
    return max(1, min(most, share // row))


def _bytes_of_row(opened: LanguageModel, tokens: int) -> int:
    """Return the bytes of a row's keys and values; of models without heads, whose state does not grow, what heads of their width would."""
    config = opened.text_config
    layers, hidden = int(getattr(config, "num_hidden_layers", 0) or 1), int(getattr(config, "hidden_size", 0) or 1)
    all_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(all_heads, int) or not all_heads:
        return int(2 * layers * hidden * tokens * opened.model.dtype.itemsize)
    heads = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or hidden // all_heads
    return int(2 * layers * (heads if isinstance(heads, int) else all_heads) * width * tokens * opened.model.dtype.itemsize)


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt: text cut before its stop string, token count with the ending one."""

    text: str
    tokens: int
    stop: StopReason
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)  # as they were chosen, the ending one among them


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw instead of taking the likeliest token. Row r always draws from the stream of (seed, r), or (seed, numbers[r]) where given."""

    temperature: float
    seed: int
    numbers: Sequence[int] = ()


def generate(
    opened: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: BatchSize = "auto",
    sampling: Sampling | None = None,
    progress: Callable[[int], None] = lambda _: None,
    finished: Callable[[int, Generation], None] = lambda row, one: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Generation]:
    """Continue each prompt (token ids) until EOS, a stop string or `max_new_tokens`; answers in the given order.

    `finished` is called as soon as a row is over. Out of memory halves the rows decoded at once and tells `say`;
    with one row left it raises.
    """
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max_new_tokens - (0 if why_plain(opened) else _common(prompts))
    size = rows_by_memory(opened, longest) if batch_size == "auto" else batch_size
    decoding = _Decoding(opened, prompts, max_new_tokens, _StopRule.of(opened, stop), sampling, size, progress, finished)
    run, inside = (decoding.padded, nullcontext()) if why_plain(opened) else (decoding.shared, shared_attention(opened))
    if why_plain(opened) and (note := note_of(opened, writes=True)):
        say(note)
    try:
        with inside:
            decoding.all_rows(run, say)
    except NoNumber as problem:  # the text is read once more to find the place, by the model's own attention
        raise not_finite(opened, problem.ids) from None
    return [decoding.answers[row] for row in range(len(prompts))]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts share at their beginning, 0 where it is not worth a pass; a token of each is left."""
    first, *others = prompts
    common = min((shared_length(first, other) for other in others), default=0)
    common = min(common, min(map(len, prompts)) - 1)
    return common if common >= WORTH_SHARING else 0


@dataclass
class _Decoding:
    """The rows of one call: those that wait, those being written, and those that are over."""

    opened: LanguageModel
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stops: "_StopRule"
    sampling: Sampling | None
    size: int
    progress: Callable[[int], None]
    finished: Callable[[int, Generation], None]
    answers: dict[int, Generation] = field(default_factory=dict)
    waiting: "deque[int]" = field(default_factory=deque)
    active: list[int] = field(default_factory=list)
    written: dict[int, list[int]] = field(default_factory=dict)
    draws: "dict[int, torch.Generator]" = field(default_factory=dict)
    forbidden: Forbidden = field(default_factory=Forbidden)

    def __post_init__(self) -> None:
        self.forbidden = Forbidden.of(self.opened)
        self.start_over(halve=False)

    def start_over(self, *, halve: bool = True) -> None:
        """Put every unfinished row back into the queue, longest prompt first."""
        if halve:
            self.size = max(1, self.size // 2)
        rows = [row for row in range(len(self.prompts)) if row not in self.answers]
        self.waiting = deque(sorted(rows, key=lambda row: len(self.prompts[row]), reverse=True))
        self.active, self.written, self.draws = [], {}, {}

    def all_rows(self, run: Callable[[], None], say: Callable[[str], None]) -> None:
        """Decode until nothing waits; where memory runs out, fewer rows at once."""
        while self.waiting:
            try:
                run()
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem) or self.size == 1:
                    raise
                before = self.size
                self.start_over()
                say(f"out of memory: {before} rows at once became {self.size}")

    def begin(self, rows: Sequence[int]) -> None:
        self.active += rows
        for row in rows:
            self.written[row] = []
            if self.sampling:
                self.draws[row] = _stream(self.sampling, row, self.opened.device)

    def choose(self, logits_BV: "torch.Tensor", rows: Sequence[int]) -> list[int]:
        """Choose each row's next token: the likeliest, or one drawn from the row's own stream.

        Raises `NoNumber` for logits that are none. Whether they are comes with the tokens, as an id below 0: asking the device
        by itself would wait for it once more at every step.
        """
        import torch

        logits_BV = self.forbidden.masked(logits_BV, [self.prompts[row] for row in rows], [self.written[row] for row in rows])
        chosen = logits_BV.argmax(dim=-1)
        finite = torch.isfinite(logits_BV.gather(-1, chosen[:, None])[:, 0])  # a NaN counts as the largest
        if self.sampling is not None:
            chosen = self._drawn(logits_BV.masked_fill(~finite[:, None], 0.0), rows, self.sampling.temperature)
        tokens: list[int] = chosen.masked_fill(~finite, -1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if token < 0:
                raise NoNumber([*self.prompts[row], *self.written[row]])
        return tokens

    def _drawn(self, logits_BV: "torch.Tensor", rows: Sequence[int], temperature: float) -> "torch.Tensor":
        """Draw a token for each row, (B,), on the device."""
        import torch

        weights = torch.softmax(logits_BV.float() / temperature, dim=-1)
        return torch.cat([torch.multinomial(weights[index], 1, generator=self.draws[row]) for index, row in enumerate(rows)])

    def take(self, rows: Sequence[int], chosen: Sequence[int]) -> list[int]:
        """Note each row's new token; return the indices of the rows that are over, which leave."""
        for row, token in zip(rows, chosen, strict=True):
            self.written[row].append(token)
        over = self.stops.ended([self.written[row] for row in rows], self.max_new_tokens)
        for index in over:
            ids = self.written.pop(rows[index])
            self.answers[rows[index]] = self.stops.finish(ids)
            self.finished(rows[index], self.answers[rows[index]])
        if over:
            self.progress(len(over))
        return over

    def shared(self) -> None:
        """Decode everything that waits, in slots behind the prompts' common beginning."""
        import torch

        opened, prompts = self.opened, self.prompts
        common = _common([prompts[row] for row in self.waiting])
        prefix = prefix_of(opened, prompts[self.waiting[0]][:common], most=pack_tokens(opened))
        capacity = max(len(prompts[row]) for row in self.waiting) - common + self.max_new_tokens
        size = min(self.size, len(self.waiting))
        slots = Slots(prefix, size, capacity, torch.zeros(0, dtype=torch.long, device=opened.device))
        last: list[int] = []
        while self.active or self.waiting:
            free = size - len(self.active)
            # A refill costs one forward: it waits until an eighth of the slots is free.
            if self.waiting and (not self.active or free >= max(1, size // 8)):
                last += self._admit(slots, common, free)
                if not self.active:
                    continue
            chosen = self.choose(forward_step(opened, last, slots), self.active)
            over = self.take(self.active, chosen)
            last = self._retire(slots, over, chosen) if over else chosen

    def _retire(self, slots: Slots, over: Sequence[int], chosen: Sequence[int]) -> list[int]:
        order = slots.retire(over)
        self.active = [self.active[slot] for slot in order]
        return [chosen[slot] for slot in order]

    def _admit(self, slots: Slots, common: int, free: int) -> list[int]:
        """Read waiting prompts into free slots, a pack at a time; return the first token of each row that goes on."""
        going: list[int] = []
        while self.waiting and free > 0:
            rows: list[int] = []
            tokens = 0
            while self.waiting and len(rows) < free:
                length = len(self.prompts[self.waiting[0]]) - common
                if rows and tokens + length > pack_tokens(self.opened):
                    break
                rows.append(self.waiting.popleft())
                tokens += length
            ends, computed, places = self._read([self.prompts[row][common:] for row in rows], slots.prefix)
            self.written |= {row: [] for row in rows}
            if self.sampling:
                self.draws |= {row: _stream(self.sampling, row, self.opened.device) for row in rows}
            chosen = self.choose(ends, rows)
            over = set(self.take(rows, chosen))
            kept = [index for index in range(len(rows)) if index not in over]
            self.active += [rows[index] for index in kept]
            going += [chosen[index] for index in kept]
            spans = [places[index] for index in kept]
            if spans:
                slots.admit(computed, spans)
                free -= len(spans)
        return going

    def _read(self, rows: Sequence[Sequence[int]], prefix: KeyValues) -> "tuple[torch.Tensor, KeyValues, list[tuple[int, int, int]]]":
        """Run prompts; return the logits at their ends (B, V), keys and values, and where each row's stand in them."""
        most = pack_tokens(self.opened)
        if len(rows) == 1 and len(rows[0]) > most:
            held = prefix_of(self.opened, rows[0][:-1], most=most, behind=prefix)
            ends, last = forward_tree(self.opened, Tree.of([rows[0][-1:]]), held, [0])
            return ends, held.extended(last).after(prefix.length), [(0, 0, len(rows[0]))]
        if not prefix.layers:  # rows of their own: sorted by length, they need little padding and no mask
            return *forward_rows(self.opened, rows), [(index, 0, len(row)) for index, row in enumerate(rows)]
        side_by_side = Tree.unmerged(rows)
        ends, computed = forward_tree(self.opened, side_by_side, prefix, [path[-1] for path in side_by_side.paths])
        return ends, computed, [(0, path[0], path[-1] + 1) for path in side_by_side.paths]

    def padded(self) -> None:
        """Decode the next rows by the model's own attention, as many at once as it can be asked; finished rows leave."""
        way = writing_of(self.opened)
        count = self.size if way.together else 1
        rows = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        self.begin(rows)
        going = Continuing(self.opened, [self.prompts[row] for row in rows], way)
        logits = going.begin()
        while True:
            chosen = self.choose(logits, rows)
            over = set(self.take(rows, chosen))
            kept = [index for index in range(len(rows)) if index not in over]
            rows = [rows[index] for index in kept]
            if not rows:
                break
            logits = going.go_on(kept, [chosen[index] for index in kept])
        self.active = []


def _stream(sampling: Sampling, row: int, device: str) -> "torch.Generator":
    import torch

    digest = hashlib.sha256(f"{sampling.seed}/{sampling.numbers[row] if sampling.numbers else row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass
class _StopRule:
    """When a row is over, decided from that row alone, as lm-eval decides it."""

    tokenizer: Any
    ids: frozenset[int]
    strings: tuple[str, ...]
    cuts: tuple[str, ...]  # what the text is cut before, in this order: the strings, and special tokens that were spelled out
    tail: int  # enough tokens to hold any stop string
    windows: dict[str, int]  # stop string -> the last tokens in which lm-eval looks for it: a window may read bytes that the text does not
    completing: dict[int, bool] = field(default_factory=dict)  # token -> whether a stop string may end in it

    @classmethod
    def of(cls, opened: LanguageModel, stop: Sequence[str]) -> "_StopRule":
        # A stop string that is one special token would be gone from the decoded text: it stops by its id.
        tokenizer = opened.tokenizer
        special_ids = set(tokenizer.all_special_ids)
        special = {text: i for text, i in tokenizer.get_vocab().items() if text in stop and i in special_ids}
        strings = tuple(text for text in stop if text and text not in special)
        longest = max((len(text.encode()) for text in strings), default=0)
        windows = {text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in strings}
        ends = opened.eos_ids | frozenset(special.values())
        return cls(tokenizer, ends, strings, tuple(text for text in stop if text), longest + 1, windows)

    def ended(self, rows: Sequence[list[int]], most: int) -> list[int]:
        """Return the indices of the rows whose last token ends them."""
        return [
            index
            for index, row in enumerate(rows)
            if row[-1] in self.ids or len(row) >= most or (self.strings and self._may_end(row[-1]) and self._has_stop(row))
        ]

    def _may_end(self, token: int) -> bool:
        """Tell whether a stop string can end inside a token's text; most tokens cannot, and need no decoding of the row."""
        known = self.completing.get(token)
        if known is None:
            text = self.tokenizer.decode([token])
            behind = self.tokenizer.decode([token, token])  # where a word decoded alone loses its space, the second has it
            known = (
                "\ufffd" in text
                or not text
                or any(
                    stop in behind or any(part.startswith(stop[-size:]) for part in (text, f" {text}") for size in range(1, len(stop) + 1))
                    for stop in self.strings
                )
            )
            self.completing[token] = known
        return known

    def _has_stop(self, row: list[int]) -> bool:
        tail = self.tokenizer.decode(row[-self.tail :], skip_special_tokens=True)
        return any(text in tail or text in self.tokenizer.decode(row[-self.windows[text] :]) for text in self.strings)

    def finish(self, ids: list[int]) -> Generation:
        by_id = ids[-1] in self.ids
        whole = text = self.tokenizer.decode(ids[:-1] if by_id else ids, skip_special_tokens=True)
        for stop in self.cuts:  # one after the other, as lm-eval cuts
            text = text.partition(stop)[0]
        stopped = text != whole or (not by_id and bool(self.strings) and self._has_stop(ids))
        reason: StopReason = "eos" if by_id else "stop" if stopped else "length"
        return Generation(text, len(ids), reason, tuple(ids))
