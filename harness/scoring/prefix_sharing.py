"""Computes every distinct token in its context once: shared prefixes, packed rows, slots that are
refilled.

A transformers model attends through a function that it looks up by name. Ours (`harness-shared`) is
handed a `memory` with each forward call and lets it do the attending: `Packed` lays many
continuations of one prefix into a single row, as a tree in which a token sees its own ancestors
only (no padding, no copies of the prefix); `Slots` holds rows of different ages for decoding.
Weights and the rest of the model's code stay untouched.

A model may use this only after `harness/scoring/admission.py` has found nothing against it, by its
configuration and by a probe.

Shapes: B rows, N packed tokens, P prefix tokens, H query heads, K key heads, G = H/K, D head size,
V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.models.encoding import shared_prefix_length
from harness.models.language_model import LanguageModel

if TYPE_CHECKING:
    import torch

NAME = "harness-shared"
# what our attention does not compute
_SEEN_BY_NO_MEMORY = ("softcap", "s_aux", "sliding_window", "position_bias")


class Unshareable(Exception):
    """The model's attention does something that the shared path does not compute; the message says
    what.
    """


@dataclass
class KeyValues:
    """Keys and values of one prefix, a pair of (1, K, P, D) tensors per attention layer."""

    layers: dict[int, "tuple[torch.Tensor, torch.Tensor]"] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens held."""
        return next((int(keys.shape[2]) for keys, _ in self.layers.values()), 0)

    def after(self, count: int) -> "KeyValues":
        """Return what stands behind the first `count` tokens."""
        return KeyValues(
            {
                index: (keys[:, :, count:], values[:, :, count:])
                for index, (keys, values) in self.layers.items()
            }
        )

    def extended(self, more: "KeyValues") -> "KeyValues":
        """Return this prefix followed by another stretch."""
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


@dataclass
class Packed:
    """One row of N tokens laid out as a tree behind a prefix; keeps the keys and values that it
    computed.
    """

    prefix: KeyValues
    # (N, N) bool: which packed token sees which; None: a plain causal chain
    visible: "torch.Tensor | None"
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
            before_keys, before_values = self.prefix.layers[layer]
            key, value = (
                torch.cat([before_keys, key], dim=2),
                torch.cat([before_values, value], dim=2),
            )
        # Key heads stand in the batch dimension and are expanded over their group without a copy.
        groups = query.shape[1] // heads
        asked = query[0].unflatten(0, (heads, groups))
        keys, values = (part[0].unsqueeze(1).expand(heads, groups, -1, -1) for part in (key, value))
        if self.visible is None and not self.prefix.layers:
            attended = torch.nn.functional.scaled_dot_product_attention(
                asked, keys, values, is_causal=count > 1, scale=scaling
            )
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(
                asked, keys, values, attn_mask=self._masked(count, query), scale=scaling
            )
        return attended.flatten(0, 1).transpose(0, 1)[None]

    def _masked(self, count: int, query: "torch.Tensor") -> "torch.Tensor":
        """Return the mask (N, P + N), made once a forward: what stands before the pack is seen by
        all of it.
        """
        import torch

        if self._mask is None:
            visible = (
                torch.ones((count, count), dtype=torch.bool).tril()
                if self.visible is None
                else self.visible
            )
            mask = torch.cat(
                [torch.ones((count, self.prefix.length), dtype=torch.bool), visible], dim=1
            )
            self._mask = (
                torch.zeros(mask.shape, dtype=query.dtype)
                .masked_fill(~mask, float("-inf"))
                .to(query.device)
            )
        return self._mask


@dataclass
class Padded:
    """Rows that share nothing, padded on the right: no token sees what stands after it, so no mask
    is needed.
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
class Slots:
    """Keys and values of rows being decoded behind one prefix; the first `len(lengths)` slots are
    in use.
    """

    prefix: KeyValues
    size: int
    capacity: int  # own tokens of a row: the rest of its prompt and its answer
    lengths: "torch.Tensor"  # (B,) own tokens already held
    layers: dict[int, "tuple[torch.Tensor, torch.Tensor]"] = field(default_factory=dict)
    _mask: "torch.Tensor | None" = None
    _width: int = 0

    def prepare(self) -> None:
        """Fix what all layers of one step share: how wide the rows are and which columns a row
        sees.
        """
        import torch

        self._width = int(self.lengths.max()) + 1
        hidden = torch.arange(self._width, device=self.lengths.device)[None] > self.lengths[:, None]
        first = next(iter(self.layers.values()))[0]
        self._mask = torch.zeros(hidden.shape, dtype=first.dtype, device=hidden.device).masked_fill(
            hidden, float("-inf")
        )[:, None, None]

    def attend(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
    ) -> "torch.Tensor":
        """Write one token a row and return the attended values (B, 1, H, D) of queries (B, H, 1,
        D).
        """
        import torch

        rows, heads = key.shape[0], key.shape[1]
        held_keys, held_values = self.layers[layer]
        # a scatter writes the same numbers as an assignment by index, many times sooner
        place = self.lengths[:, None, None, None]
        held_keys.scatter_(2, place.expand_as(key), key)
        held_values.scatter_(2, place.expand_as(value), value)
        keys, values = held_keys[:rows, :, : self._width], held_values[:rows, :, : self._width]
        groups = query.shape[1] // heads
        # (B, K, G, D): the group is the query's length
        asked = query[:, :, 0].unflatten(1, (heads, groups))
        own = asked @ keys.transpose(2, 3) * scaling + self._mask
        if not self.prefix.layers:
            return (torch.softmax(own.float(), dim=-1).to(value.dtype) @ values).flatten(1, 2)[
                :, None
            ]
        before_keys, before_values = self.prefix.layers[layer]
        width = before_keys.shape[2]
        # All rows ask the one prefix together, in one product; each asks its own tokens; one
        # softmax over both.
        together = asked.transpose(0, 1).flatten(1, 2)  # (K, B * G, D)
        shared = (
            (together @ before_keys[0].transpose(1, 2)).unflatten(1, (rows, groups)).transpose(0, 1)
        )
        weights = torch.softmax(torch.cat([shared * scaling, own], dim=-1).float(), dim=-1).to(
            value.dtype
        )
        before = weights[..., :width].transpose(0, 1).flatten(1, 2) @ before_values[0]
        attended = (
            before.unflatten(1, (rows, groups)).transpose(0, 1) + weights[..., width:] @ values
        )
        return attended.flatten(1, 2)[:, None]

    def admit(self, computed: KeyValues, spans: Sequence[tuple[int, int, int]]) -> None:
        """Copy spans (row, start, end) of computed keys and values into the next free slots, one a
        slot.

        What a slot holds behind its length is never seen: padding may be copied with a row.
        """
        import torch

        first = len(self.lengths)
        for layer, (keys, values) in computed.layers.items():
            if layer not in self.layers:
                shape = (self.size, keys.shape[1], self.capacity, keys.shape[3])
                value_shape = (*shape[:3], values.shape[3])
                self.layers[layer] = (keys.new_zeros(shape), values.new_zeros(value_shape))
            for held, fresh in zip(self.layers[layer], (keys, values), strict=True):
                _copy_spans(held[first:], fresh, spans)
        more = torch.tensor([end - start for _, start, end in spans], device=self.lengths.device)
        self.lengths = torch.cat([self.lengths, more])

    def retire(self, done: Sequence[int]) -> list[int]:
        """Free slots: the last rows move into the holes. Returns the old slot of each row that
        stays, in new order.
        """
        import torch

        kept = [slot for slot in range(len(self.lengths)) if slot not in set(done)]
        order, tail = list(range(len(kept))), [slot for slot in kept if slot >= len(kept)]
        holes = [slot for slot in done if slot < len(kept)]
        if holes:
            moved = [tail.pop() for _ in holes]
            for hole, source in zip(holes, moved, strict=True):
                order[hole] = source
            device = self.lengths.device
            into, out = torch.tensor(holes, device=device), torch.tensor(moved, device=device)
            width = int(self.lengths[out].max())
            for held in (part for pair in self.layers.values() for part in pair):
                held[:, :, :width].index_copy_(0, into, held[:, :, :width].index_select(0, out))
        self.lengths = self.lengths[order]
        return order


def _copy_spans(
    held: "torch.Tensor", fresh: "torch.Tensor", spans: Sequence[tuple[int, int, int]]
) -> None:
    """Copy spans (row, start, end) of (R, K, T, D) to the beginning of slots (S, K, capacity, D),
    span after span.
    """
    rows, starts, ends = zip(*spans, strict=True)
    if any(starts):  # rows that lie one behind the other in a pack
        for slot, (row, start, end) in enumerate(spans):
            held[slot, :, : end - start] = fresh[row, :, start:end]
    else:  # rows side by side, as long as each other or padded
        whole = fresh if list(rows) == list(range(len(fresh))) else fresh[list(rows)]
        held[: len(rows), :, : max(ends)] = whole[:, :, : max(ends)]


def _attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    **given: Any,
) -> "tuple[torch.Tensor, None]":
    """Attend as the memory of this forward call does; what transformers calls for
    `harness-shared`.
    """
    unknown = [name for name in _SEEN_BY_NO_MEMORY if given.get(name) is not None]
    if unknown:
        raise Unshareable(f"its attention uses {unknown[0]}")
    memory = given.get("memory")
    if memory is None:
        raise Unshareable("its layers do not pass keyword arguments on to their attention")
    scaling = given.get("scaling")
    return memory.attend(
        module.layer_idx, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
    ), None


@contextlib.contextmanager
def shared_attention(opened: LanguageModel) -> Iterator[None]:
    """Let a model attend through its memory inside the block; its own attention comes back
    after.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    before = opened.text_config._attn_implementation
    if before == NAME:
        yield
        return
    opened.model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        opened.model.set_attn_implementation(before)


@dataclass(frozen=True)
class Tree:
    """Sequences merged where they share a beginning: one node a distinct token in its context."""

    tokens: list[int]
    depths: list[int]  # 0 for the first token after the prefix
    parents: list[int]  # -1 at the root
    paths: list[list[int]]  # the nodes of each sequence, in its order

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Tree":
        """Merge sequences; those that share a beginning must stand side by side (sorted
        ones do).
        """
        tokens: list[int] = []
        depths: list[int] = []
        parents: list[int] = []
        paths: list[list[int]] = []
        before: Sequence[int] = ()
        path: list[int] = []
        for sequence in sequences:
            common = shared_prefix_length(before, sequence)
            path = path[:common]
            for depth in range(common, len(sequence)):
                parents.append(path[-1] if path else -1)
                path.append(len(tokens))
                tokens.append(sequence[depth])
                depths.append(depth)
            paths.append(path)
            before = sequence
            path = list(path)
        return cls(tokens, depths, parents, paths)

    @classmethod
    def unmerged(cls, sequences: Sequence[Sequence[int]]) -> "Tree":
        """Lay sequences side by side: equal beginnings are kept apart, so that each has keys of its
        own to copy.
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

    def visible(self) -> "torch.Tensor | None":
        """Return (N, N) bool, True where a token sees another: its ancestors and itself; None for a
        chain.
        """
        import numpy as np
        import torch

        if self.is_chain:
            return None
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for index, parent in enumerate(self.parents):
            if parent >= 0:
                seen[index, : parent + 1] = seen[parent, : parent + 1]
            seen[index, index] = True
        return torch.from_numpy(seen)


def forward_tree(
    opened: LanguageModel, tree: Tree, prefix: KeyValues, logits_at: Sequence[int]
) -> "tuple[torch.Tensor, KeyValues]":
    """Run a tree behind a prefix; return logits (len(logits_at), V) at those nodes, and the tree's
    keys and values.

    Must run inside `shared_attention`.
    """
    import torch

    memory = Packed(prefix, tree.visible())
    device = opened.device
    with torch.inference_mode():
        out = opened.model(
            input_ids=torch.tensor([tree.tokens], device=device),
            position_ids=torch.tensor([tree.depths], device=device) + prefix.length,
            use_cache=False,
            logits_to_keep=torch.tensor(list(logits_at), dtype=torch.long, device=device)
            if logits_at
            else 1,
            memory=memory,
        )
    if not memory.computed.layers:
        raise Unshareable("its forward never reached our attention")
    return out.logits[0, : len(logits_at)], memory.computed


def forward_rows(
    opened: LanguageModel, rows: Sequence[Sequence[int]]
) -> "tuple[torch.Tensor, KeyValues]":
    """Run whole rows side by side; return the logits at their ends (B, V) and keys and values. Must
    run inside `shared_attention`.
    """
    import torch

    memory = Padded()
    width = max(map(len, rows))
    ids = torch.tensor(
        [[*row, *[opened.pad_id] * (width - len(row))] for row in rows], device=opened.device
    )
    ends = torch.tensor([len(row) - 1 for row in rows], device=opened.device)
    positions = torch.arange(width, device=opened.device).expand(len(rows), -1)
    # the head sees the columns in which some row ends
    kept, places = torch.unique(ends, return_inverse=True)
    with torch.inference_mode():
        out = opened.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=kept,
            memory=memory,
        )
        return out.logits[torch.arange(len(rows), device=opened.device), places], memory.computed


def forward_step(opened: LanguageModel, tokens: Sequence[int], slots: Slots) -> "torch.Tensor":
    """Decode one token a row and advance the slots; return logits (B, V). Must run inside
    `shared_attention`.
    """
    import torch

    slots.prepare()
    with torch.inference_mode():
        out = opened.model(
            input_ids=torch.tensor(tokens, device=opened.device)[:, None],
            position_ids=(slots.lengths + slots.prefix.length)[:, None],
            use_cache=False,
            logits_to_keep=1,
            memory=slots,
        )
        slots.lengths = slots.lengths + 1
    logits_BV: torch.Tensor = out.logits[:, -1]
    return logits_BV


def prefix_of(
    opened: LanguageModel, tokens: Sequence[int], *, most: int, behind: KeyValues | None = None
) -> KeyValues:
    """Compute a prefix's keys and values, at most `most` tokens a forward; the stretch `behind`
    which it stands is kept in front.
    """
    held = behind or KeyValues()
    for start in range(0, len(tokens), most):
        _, more = forward_tree(opened, Tree.of([tokens[start : start + most]]), held, ())
        held = held.extended(more)
    return held
