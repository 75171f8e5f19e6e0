"""Computes every distinct token in its context once: shared prefixes, packed rows, refilled slots.

A transformers model looks up its attention function by name. Ours (`harness-shared`) gets a
`memory` object with each forward call and lets it compute the attention. `PackedAttention` puts
many continuations of one prefix into a single row, as a tree in which a token sees only its
ancestors: no padding, no copies of the prefix. `DecodingSlots` holds rows of different ages for
decoding. The model's weights and the rest of its code stay untouched.

A model may use this only after `harness/scoring/admission.py` has accepted it, by its configuration
and by a probe.

Shapes: B rows, N packed tokens, P prefix tokens, H query heads, K key heads, G = H/K, D head size,
V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.models.cache_format import CacheFormat, cache_format_of
from harness.models.encoding import shared_prefix_length
from harness.models.language_model import LanguageModel
from harness.models.stored_attention import stored
from harness.scoring.shapes import rounded_rows, rounded_width, without_planning

if TYPE_CHECKING:
    import torch

ATTENTION_NAME = "harness-shared"
# tokens of texts that share nothing: so many at least are attended to at once on a CPU
_STRETCH_TOKENS = 48
# arguments of an attention function that ours does not support
_UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "sliding_window", "position_bias")


class UnsupportedAttention(Exception):
    """The model's attention needs something that the shared path does not compute; see message."""


class Span(NamedTuple):
    """Where one sequence's tokens are in computed keys and values: a row, and start to end."""

    row: int
    start: int
    end: int


@dataclass
class KeyValues:
    """Keys and values of one prefix, a pair of (1, K, P, D) tensors per attention layer."""

    layers: dict[int, "tuple[torch.Tensor, torch.Tensor]"] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return next((int(keys.shape[2]) for keys, _ in self.layers.values()), 0)

    def after(self, count: int) -> "KeyValues":
        """Return the keys and values after the first `count` tokens."""
        return KeyValues(
            {
                index: (keys[:, :, count:], values[:, :, count:])
                for index, (keys, values) in self.layers.items()
            }
        )

    def cut(self, rows: int, count: int) -> "KeyValues":
        """Return the keys and values of the first `rows` rows at the first `count` tokens."""
        return KeyValues(
            {
                index: (keys[:rows, :, :count], values[:rows, :, :count])
                for index, (keys, values) in self.layers.items()
            }
        )

    def extended(self, more: "KeyValues") -> "KeyValues":
        """Return this prefix with the keys and values of the tokens after it."""
        import torch

        if not self.layers:
            return more
        return KeyValues(
            {
                index: (
                    torch.cat([keys, more.layers[index][0]], dim=2),
                    torch.cat([values, more.layers[index][1]], dim=2),
                )
                for index, (keys, values) in self.layers.items()
            }
        )


class Stretch(NamedTuple):
    """Neighbouring nodes that see nothing outside of them; in a chain each sees all before it."""

    nodes: slice
    is_chain: bool


@dataclass
class PackedAttention:
    """One row of N tokens that form a tree after a prefix; stores their keys and values.

    On a GPU the prefix is filled up with keys that no token sees, to one of few widths. On a CPU
    `stretches` of tokens that see nothing of each other are attended to one after another: the
    work grows with the length of a text, and not with that of the row.
    """

    prefix: KeyValues
    # (N, N) bool on the model's device: which token sees which; None for a causal chain
    visible: "torch.Tensor | None"
    prefix_width: int = 0  # of the prefix with what fills it up; 0 without a prefix
    stretches: Sequence[Stretch] = ()  # without a prefix alone; empty for the row as a whole
    computed: KeyValues = field(default_factory=KeyValues)
    _mask: "torch.Tensor | None" = None

    def attend(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
    ) -> "torch.Tensor":
        """Return the attended values (1, N, H, D) of queries (1, H, N, D)."""
        import torch

        self.computed.layers[layer] = (key, value)
        count, heads = key.shape[2], key.shape[1]
        if self.prefix.layers:
            prefix_keys, prefix_values = self.prefix.layers[layer]
            key = torch.cat([*self._filled(prefix_keys), key], dim=2)
            value = torch.cat([*self._filled(prefix_values), value], dim=2)
        # Key heads are in the batch dimension and are expanded over their group without a copy.
        groups = query.shape[1] // heads
        queries = query[0].unflatten(0, (heads, groups))
        keys, values = (part[0].unsqueeze(1).expand(heads, groups, -1, -1) for part in (key, value))
        if self.stretches:
            parts = [
                self._attend_to_itself(stretch, queries, keys, values, scaling)
                for stretch in self.stretches
            ]
            attended = torch.cat(parts, dim=-2)
        elif self.visible is None and not self.prefix.layers:
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=count > 1, scale=scaling
            )
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=self._additive_mask(count, query), scale=scaling
            )
        return attended.flatten(0, 1).transpose(0, 1)[None]

    def _attend_to_itself(
        self,
        stretch: Stretch,
        queries: "torch.Tensor",
        keys: "torch.Tensor",
        values: "torch.Tensor",
        scaling: float,
    ) -> "torch.Tensor":
        """Return the attended values (K, G, n, D) of a stretch of n tokens."""
        import torch

        nodes = stretch.nodes
        mask = None
        if not stretch.is_chain:
            mask = self._additive_mask(queries.shape[-2], queries)[nodes, nodes]
        return torch.nn.functional.scaled_dot_product_attention(
            queries[..., nodes, :],
            keys[..., nodes, :],
            values[..., nodes, :],
            attn_mask=mask,
            is_causal=stretch.is_chain,
            scale=scaling,
        )

    def _filled(self, part: "torch.Tensor") -> "list[torch.Tensor]":
        """Return the prefix's keys or values, and what fills them up to its width."""
        missing = self.prefix_width - part.shape[2]
        filling = [part.new_zeros((*part.shape[:2], missing, part.shape[3]))] if missing > 0 else []
        return [part, *filling]

    def _additive_mask(self, count: int, query: "torch.Tensor") -> "torch.Tensor":
        """Return the additive mask (N, width of the prefix + N), made once per forward.

        All tokens see the prefix. The mask is made on the device: a pack's has millions of numbers.
        """
        import torch

        if self._mask is None:
            device = query.device
            visible = (
                torch.ones((count, count), dtype=torch.bool, device=device).tril()
                if self.visible is None
                else self.visible
            )
            width = max(self.prefix_width, self.prefix.length)
            sees_prefix = torch.arange(width, device=device) < self.prefix.length
            mask = torch.cat([sees_prefix.expand(count, -1), visible], dim=1)
            self._mask = torch.zeros(mask.shape, dtype=query.dtype, device=device).masked_fill(
                ~mask, float("-inf")
            )
        return self._mask


@dataclass
class PaddedAttention:
    """Rows without a prefix, padded on the right.

    No mask is needed, because no token sees what comes after it.
    """

    computed: KeyValues = field(default_factory=KeyValues)

    def attend(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
    ) -> "torch.Tensor":
        """Return the attended values (B, T, H, D) of queries (B, H, T, D)."""
        import torch

        self.computed.layers[layer] = (key, value)
        groups = query.shape[1] // key.shape[1]
        keys, values = (
            part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value)
        )
        causal = query.shape[2] > 1
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=causal, scale=scaling
        ).transpose(1, 2)


@dataclass
class DecodingSlots:
    """Keys and values of rows that are decoded after one prefix.

    The first `len(lengths)` slots are in use.
    """

    prefix: KeyValues
    size: int
    capacity: int  # own tokens of a row: the rest of its prompt and its answer
    lengths: "torch.Tensor"  # (B,) own tokens stored so far
    layers: dict[int, "tuple[torch.Tensor, torch.Tensor]"] = field(default_factory=dict)
    _mask: "torch.Tensor | None" = None
    _width: int = 0

    def prepare(self) -> None:
        """Compute what all layers of one step share: the width of rows, and which columns they see.

        The mask is (B, 1, 1, width), 0 or minus infinity.
        """
        import torch

        longest = int(self.lengths.max()) + 1
        self._width = min(self.capacity, rounded_width(longest, self.lengths.device.type))
        columns = torch.arange(self._width, device=self.lengths.device)
        is_hidden = columns[None] > self.lengths[:, None]
        any_keys = next(iter(self.layers.values()))[0]
        zeros = torch.zeros(is_hidden.shape, dtype=any_keys.dtype, device=is_hidden.device)
        self._mask = zeros.masked_fill(is_hidden, float("-inf"))[:, None, None]

    def attend(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
    ) -> "torch.Tensor":
        """Store a token a row; return attended values (B, 1, H, D) of queries (B, H, 1, D)."""
        import torch

        keys, values = self._store(layer, key, value)
        rows, heads = key.shape[0], key.shape[1]
        groups = query.shape[1] // heads
        # (B, K, G, D): the group takes the place of the query's length
        queries = query[:, :, 0].unflatten(1, (heads, groups))
        own_logits = queries @ keys.transpose(2, 3) * scaling + self._mask
        if not self.prefix.layers:
            own_weights = torch.softmax(own_logits.float(), dim=-1).to(value.dtype)
            return (own_weights @ values).flatten(1, 2)[:, None]
        prefix_keys, prefix_values = self.prefix.layers[layer]
        width = prefix_keys.shape[2]
        # One product for all rows with the prefix, one with each row's own tokens, and one softmax
        # over both.
        all_queries = queries.transpose(0, 1).flatten(1, 2)  # (K, B * G, D)
        prefix_logits = _rows_first(all_queries @ prefix_keys[0].transpose(1, 2), rows, groups)
        logits = torch.cat([prefix_logits * scaling, own_logits], dim=-1)
        weights = torch.softmax(logits.float(), dim=-1).to(value.dtype)
        prefix_weights = weights[..., :width].transpose(0, 1).flatten(1, 2)
        from_prefix = _rows_first(prefix_weights @ prefix_values[0], rows, groups)
        attended = from_prefix + weights[..., width:] @ values
        return attended.flatten(1, 2)[:, None]

    def _store(
        self, layer: int, key: "torch.Tensor", value: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Store a token's key and value in each row; return all of the rows' own, (B, K, T, D)."""
        slot_keys, slot_values = self.layers[layer]
        # a scatter writes the same numbers as an assignment by index, but much faster
        position = self.lengths[:, None, None, None]
        slot_keys.scatter_(2, position.expand_as(key), key)
        slot_values.scatter_(2, position.expand_as(value), value)
        rows = key.shape[0]
        return slot_keys[:rows, :, : self._width], slot_values[:rows, :, : self._width]

    def admit(self, computed: KeyValues, spans: Sequence[Span]) -> None:
        """Copy spans of computed keys and values into the next free slots, one span per slot.

        Padding may be copied with a row, because no query sees a slot beyond its length.
        """
        import torch

        first_free = len(self.lengths)
        for layer, (keys, values) in computed.layers.items():
            if layer not in self.layers:
                shape = (self.size, keys.shape[1], self.capacity, keys.shape[3])
                value_shape = (*shape[:3], values.shape[3])
                self.layers[layer] = (keys.new_zeros(shape), values.new_zeros(value_shape))
            for slots, source in zip(self.layers[layer], (keys, values), strict=True):
                _copy_spans(slots[first_free:], source, spans)
        lengths = torch.tensor([end - start for _, start, end in spans], device=self.lengths.device)
        self.lengths = torch.cat([self.lengths, lengths])

    def retire(self, ended: Sequence[int]) -> list[int]:
        """Free slots, and move the last rows into the gaps.

        Returns the old slot of each row that stays, in the new order.
        """
        import torch

        kept = [slot for slot in range(len(self.lengths)) if slot not in set(ended)]
        order, tail = list(range(len(kept))), [slot for slot in kept if slot >= len(kept)]
        gaps = [slot for slot in ended if slot < len(kept)]
        if gaps:
            moved = [tail.pop() for _ in gaps]
            for gap, source in zip(gaps, moved, strict=True):
                order[gap] = source
            device = self.lengths.device
            targets = torch.tensor(gaps, device=device)
            sources = torch.tensor(moved, device=device)
            width = int(self.lengths[sources].max())
            for slots in (part for pair in self.layers.values() for part in pair):
                rows = slots[:, :, :width].index_select(0, sources)
                slots[:, :, :width].index_copy_(0, targets, rows)
        self.lengths = self.lengths[order]
        return order


def _rows_first(values: "torch.Tensor", rows: int, groups: int) -> "torch.Tensor":
    """Return (K, B * G, ...) as (B, K, G, ...)."""
    return values.unflatten(1, (rows, groups)).transpose(0, 1)


def _copy_spans(slots: "torch.Tensor", source: "torch.Tensor", spans: Sequence[Span]) -> None:
    """Copy spans of a source (R, K, T, D) to the beginnings of slots (S, K, capacity, D)."""
    rows, starts, ends = zip(*spans, strict=True)
    if any(starts):  # sequences one after the other in a pack
        for slot, (row, start, end) in enumerate(spans):
            slots[slot, :, : end - start] = source[row, :, start:end]
    else:  # rows side by side, of one length or padded
        is_all = list(rows) == list(range(len(source)))
        selected = source if is_all else source[list(rows)]
        slots[: len(rows), :, : max(ends)] = selected[:, :, : max(ends)]


def _attend_by_memory(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    *,
    cache_format: CacheFormat | None,
    **arguments: Any,
) -> "tuple[torch.Tensor, None]":
    """Attend by the memory of this forward call; transformers calls this as `harness-shared`.

    Keys and values are rounded first where the model has a cache format.
    """
    unsupported = [name for name in _UNSUPPORTED_ARGUMENTS if arguments.get(name) is not None]
    if unsupported:
        raise UnsupportedAttention(f"its attention uses {unsupported[0]}")
    memory = arguments.get("memory")
    if memory is None:
        raise UnsupportedAttention("its layers do not pass keyword arguments on to their attention")
    if cache_format is not None:  # what is kept of a token is what its cache would store
        key, value = stored(key, value, cache_format)
    scaling = arguments.get("scaling")
    return memory.attend(
        module.layer_idx, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
    ), None


@contextlib.contextmanager
def shared_attention(opened: LanguageModel) -> Iterator[None]:
    """Make a model use our attention inside the block; restore its own attention afterwards.

    On a GPU torch leaves out the kernels that plan every shape.
    """
    from transformers import AttentionInterface

    cache_format = cache_format_of(opened.model.config)
    name = f"{ATTENTION_NAME}-{cache_format.label}" if cache_format else ATTENTION_NAME
    AttentionInterface.register(name, partial(_attend_by_memory, cache_format=cache_format))
    name_before = opened.text_config._attn_implementation
    if name_before == name:
        yield
        return
    opened.model.set_attn_implementation(name)
    try:
        with without_planning(opened.device):
            yield
    finally:
        opened.model.set_attn_implementation(name_before)


@dataclass(frozen=True)
class TokenTree:
    """Sequences merged where they share a beginning; a node is a distinct token in its context."""

    tokens: list[int]
    depths: list[int]  # 0 for the first token after the prefix
    parents: list[int]  # -1 at the root
    paths: list[list[int]]  # the nodes of each sequence, from its first token to its last

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "TokenTree":
        """Merge sequences; those with a common beginning must be neighbours, as sorted ones are."""
        tokens: list[int] = []
        depths: list[int] = []
        parents: list[int] = []
        paths: list[list[int]] = []
        previous: Sequence[int] = ()
        path: list[int] = []
        for sequence in sequences:
            common = shared_prefix_length(previous, sequence)
            path = path[:common]
            for depth in range(common, len(sequence)):
                parents.append(path[-1] if path else -1)
                path.append(len(tokens))
                tokens.append(sequence[depth])
                depths.append(depth)
            paths.append(path)
            previous = sequence
            path = list(path)
        return cls(tokens, depths, parents, paths)

    @classmethod
    def unmerged(cls, sequences: Sequence[Sequence[int]]) -> "TokenTree":
        """Put sequences one after the other, so that each has keys and values of its own to copy.

        Common beginnings are not merged.
        """
        tokens = [token for sequence in sequences for token in sequence]
        depths = [depth for sequence in sequences for depth in range(len(sequence))]
        parents: list[int] = []
        paths: list[list[int]] = []
        for sequence in sequences:
            start = len(parents)
            parents += [-1, *range(start, start + len(sequence) - 1)]
            paths.append(list(range(start, start + len(sequence))))
        return cls(tokens, depths, parents, paths)

    @property
    def is_chain(self) -> bool:
        """Tell whether every token follows the one before it."""
        return all(parent == index - 1 for index, parent in enumerate(self.parents))

    def padded(self, width: int, token: int) -> "TokenTree":
        """Return the tree with tokens after its last one, that no token of it sees."""
        count, missing = len(self.tokens), width - len(self.tokens)
        if missing <= 0:
            return self
        parents = list(range(count - 1, width - 1)) if self.is_chain else [-1] * missing
        return TokenTree(
            [*self.tokens, *[token] * missing],
            [*self.depths, *[0] * missing],
            [*self.parents, *parents],
            self.paths,
        )

    def stretches(self, least: int = _STRETCH_TOKENS) -> list[Stretch]:
        """Cut the nodes into stretches that see nothing of each other, of `least` nodes or more.

        The last one may be shorter. Where all is one tree there is one stretch.
        """
        starts = [index for index, parent in enumerate(self.parents) if parent < 0]
        cuts = [0]
        for start in starts[1:]:
            if start - cuts[-1] >= least:
                cuts.append(start)
        ends = [*cuts[1:], len(self.tokens)]
        return [
            Stretch(slice(start, end), self._is_chain(start, end))
            for start, end in zip(cuts, ends, strict=True)
        ]

    def _is_chain(self, start: int, end: int) -> bool:
        """Tell whether nodes from `start` on follow each other."""
        return all(self.parents[index] == index - 1 for index in range(start + 1, end))

    def visible(self, device: str = "cpu") -> "torch.Tensor | None":
        """Return which token sees which, (N, N) bool: ancestors and itself. None for a chain.

        A token's descendants directly follow it: children are added while their path is open. So
        the device needs to know of each token only where its last descendant is.
        """
        import torch

        if self.is_chain:
            return None
        ends = list(range(1, len(self.tokens) + 1))
        for index in range(len(self.tokens) - 1, 0, -1):
            parent = self.parents[index]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[index])
        columns = torch.arange(len(ends), device=device)
        rows = columns[:, None]
        return (columns <= rows) & (rows < torch.tensor(ends, device=device))


def forward_tree(
    opened: LanguageModel, tree: TokenTree, prefix: KeyValues, logits_at: Sequence[int]
) -> "tuple[torch.Tensor, KeyValues]":
    """Run a tree after a prefix, inside `shared_attention`.

    Returns the logits (len(logits_at), V) at those nodes, and the tree's keys and values.
    """
    import torch

    device, count = opened.device, len(tree.tokens)
    tree = tree.padded(rounded_width(count, device), opened.pad_id)
    # on a GPU one call for the whole row is faster than one for each stretch
    stretches = tree.stretches() if device == "cpu" and not prefix.layers else []
    memory = PackedAttention(
        prefix,
        tree.visible(device),
        rounded_width(prefix.length, device),
        stretches if len(stretches) > 1 else (),
    )
    nodes = torch.tensor(list(logits_at), dtype=torch.long, device=device) if logits_at else 1
    with torch.inference_mode():
        output = opened.model(
            input_ids=torch.tensor([tree.tokens], device=device),
            position_ids=torch.tensor([tree.depths], device=device) + prefix.length,
            use_cache=False,
            logits_to_keep=nodes,
            memory=memory,
        )
    if not memory.computed.layers:
        raise UnsupportedAttention("its forward never called our attention")
    return output.logits[0, : len(logits_at)], memory.computed.cut(1, count)


def forward_rows(
    opened: LanguageModel, rows: Sequence[Sequence[int]]
) -> "tuple[torch.Tensor, KeyValues]":
    """Run whole rows side by side, inside `shared_attention`.

    Returns the logits at their ends (B, V), and keys and values.
    """
    import torch

    memory = PaddedAttention()
    longest = max(map(len, rows))
    # on a GPU more columns and rows, which nobody reads, for fewer different shapes
    width = min(rounded_width(longest, opened.device), max(longest, opened.context))
    filling: list[Sequence[int]] = [[]] * (rounded_rows(len(rows), opened.device) - len(rows))
    ids = torch.tensor(
        [[*row, *[opened.pad_id] * (width - len(row))] for row in (*rows, *filling)],
        device=opened.device,
    )
    ends = torch.tensor([len(row) - 1 for row in rows], device=opened.device)
    positions = torch.arange(width, device=opened.device).expand(len(ids), -1)
    # the head runs at the columns in which some row ends
    columns, column_of_row = torch.unique(ends, return_inverse=True)
    with torch.inference_mode():
        output = opened.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=columns,
            memory=memory,
        )
        row_indices = torch.arange(len(rows), device=opened.device)
        logits_BV: torch.Tensor = output.logits[row_indices, column_of_row]
    return logits_BV, memory.computed.cut(len(rows), longest)


def forward_step(
    opened: LanguageModel, tokens: Sequence[int], slots: DecodingSlots
) -> "torch.Tensor":
    """Run one token a row inside `shared_attention`, advance the slots; return logits (B, V)."""
    import torch

    slots.prepare()
    with torch.inference_mode():
        output = opened.model(
            input_ids=torch.tensor(tokens, device=opened.device)[:, None],
            position_ids=(slots.lengths + slots.prefix.length)[:, None],
            use_cache=False,
            logits_to_keep=1,
            memory=slots,
        )
        slots.lengths = slots.lengths + 1
    logits_BV: torch.Tensor = output.logits[:, -1]
    return logits_BV


def compute_prefix(
    opened: LanguageModel, tokens: Sequence[int], *, most: int, preceding: KeyValues | None = None
) -> KeyValues:
    """Compute the keys and values of a prefix, at most `most` tokens a forward.

    Where the tokens follow others, `preceding` holds the keys and values of those, and the result
    begins with them.
    """
    computed = preceding or KeyValues()
    for start in range(0, len(tokens), most):
        stretch = TokenTree.of([tokens[start : start + most]])
        _, more = forward_tree(opened, stretch, computed, ())
        computed = computed.extended(more)
    return computed
