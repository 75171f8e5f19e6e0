"""Taps into two models: hidden states of mapped blocks, and attention of mapped layers.

A block's output is caught by a hook on the block, never by `output_hidden_states`, whose last entry
comes after the final norm. Queries and keys are caught where every transformers attention passes
them on (after rotary embedding, before softmax), so the model keeps its own kernel: nothing has to
be switched to `eager`, and nothing depends on attention maps, which fused kernels never build.

Legend: B rows, T tokens, N trained positions, H hidden size, d size of a head.
"""

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from harness.models.stored_attention import as_attended, format_of_attention
from methods.training.layouts import PaddedRows
from methods.training.losses import attention_kl, hidden_distance, unit_rms
from methods.training.positions import Positions
from methods.training.row_attention import layout_of
from methods.training.rows import Batch, TokenRow

_TAPPED_IMPLEMENTATION = "harness_tapped"
_TAPS: "WeakKeyDictionary[nn.Module, AttentionTap]" = WeakKeyDictionary()
BlockPairs = tuple[tuple[int, int], ...]  # (student block, teacher block), counted from 1


@dataclass(frozen=True, kw_only=True)
class TapConfig:
    """Which inner parts of the two models a loss compares, and how."""

    hidden_layers: str = ""  # pairs such as 2-4,4-8; auto; "" for none
    attention_layers: str = ""
    hidden_distance: Literal["mse", "cosine", "plain-mse"] = "mse"
    attention_kind: Literal["auto", "maps", "relations"] = "auto"
    relation_heads: int = 0  # 0: the most that divide both models' widths
    attention_tokens: int = 512  # positions of a row whose attention is compared

    def attention_positions(self, row: TokenRow) -> int:
        """Return how many trained positions of a row have their attention compared."""
        return max(0, min(len(row.ids) - 1, self.attention_tokens) - (row.trained_from - 1))


def parse_block_pairs(
    text: str, student_blocks: int, teacher_blocks: int, *, auto_most: int, setting: str
) -> BlockPairs:
    """Read pairs of blocks such as `2-4,4-8`, however many; `auto` spreads up to `auto_most`.

    `auto` puts student block s beside teacher block round(s * L_T / L_S); the last blocks of both
    are a pair. `setting` names the setting in an error.
    """
    if text == "auto":
        return _spread_block_pairs(student_blocks, teacher_blocks, auto_most)
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        if not match:
            raise CellFailed(
                f"{setting}={text!r}: {part!r} is not STUDENT-TEACHER; write for example 2-4,4-8, "
                "blocks counted from 1"
            )
        pair = int(match[1]), int(match[2])
        sides = ("student", pair[0], student_blocks), ("teacher", pair[1], teacher_blocks)
        for side, block, last in sides:
            if not 1 <= block <= last:
                raise CellFailed(
                    f"{setting}={text!r}: the {side} has no block {block}; its blocks are 1 to "
                    f"{last}"
                )
        pairs.append(pair)
    return tuple(pairs)


def _spread_block_pairs(student_blocks: int, teacher_blocks: int, most: int) -> BlockPairs:
    count = min(most, student_blocks)
    blocks = [round(student_blocks * (index + 1) / count) for index in range(count)]
    return tuple(
        (block, max(1, int(block * teacher_blocks / student_blocks + 0.5))) for block in blocks
    )


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the transformer blocks of a causal language model."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CellFailed(
        f"{type(model).__name__} shows no list of its {count} blocks, so hidden states cannot be "
        "compared"
    )


class HiddenTap:
    """Keeps the output of one block, (B, T, H)."""

    def __init__(self, block: nn.Module) -> None:
        self.value: Tensor | None = None
        self._hook = block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output

    def close(self) -> None:
        """Restore the model."""
        self._hook.remove()

    def at(self, places: Tensor) -> Tensor:
        """Return the states at places, which count all tokens row after row."""
        assert self.value is not None, "the model has not run"
        return self.value.flatten(0, 1).index_select(0, places)


class AttentionStates(NamedTuple):
    """What one attention layer computes with."""

    query: Tensor  # (B, heads, T, d)
    key: Tensor  # (B, key heads, T, d)
    value: Tensor  # (B, key heads, T, d)
    scale: float  # of the scores before softmax

    def first_tokens(self, length: int) -> "AttentionStates":
        """Return the states of the first `length` tokens, in fp32."""
        query, key, value = (
            states[:, :, :length].float() for states in (self.query, self.key, self.value)
        )
        return AttentionStates(query, key, value, self.scale)


class AttentionTap:
    """Keeps the attention states of one block, while the model's own kernel computes."""

    def __init__(self, block: nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_TAPPED_IMPLEMENTATION, _attention_with_tap)
        self.value: AttentionStates | None = None
        self.modules = [
            module
            for module in block.modules()
            if hasattr(module, "config") and "ttention" in type(module).__name__
        ]
        self.original_configs = [module.config for module in self.modules]
        for module in self.modules:
            # A copy for this layer alone: masks are made from the model's, which stays as it is.
            config = copy.copy(module.config)
            config._attn_implementation_internal = _TAPPED_IMPLEMENTATION
            self.implementation = module.config._attn_implementation
            module.config = config
            _TAPS[module] = self

    def close(self) -> None:
        """Restore the model."""
        for module, config in zip(self.modules, self.original_configs, strict=True):
            module.config = config
            _TAPS.pop(module, None)


def _attention_with_tap(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> Any:
    """Keep the layer's attention states in its tap, then run its own kernel on them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tap = _TAPS[module]
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)
    if options.get("softcap") is not None or (window is not None and window < query.shape[2]):
        raise CellFailed(
            f"{type(module).__name__} caps its scores or attends to a window only, which attention "
            "distillation does not support"
        )
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    # of a quantized cache, maps are made of the keys that a query sees
    key, value = as_attended(tap.implementation, key, value)
    tap.value = AttentionStates(query, key, value, float(scale))
    is_rounded = format_of_attention(tap.implementation) is not None
    kernel = "sdpa" if tap.implementation in (None, "eager") or is_rounded else tap.implementation
    return ALL_ATTENTION_FUNCTIONS[kernel](module, query, key, value, attention_mask, **options)


class InnerStates:
    """The taps of a student and its teacher, and the projections between their widths."""

    def __init__(self, student: LanguageModel, teacher: Any, config: TapConfig) -> None:
        self.config = config
        self.models = (student.model, teacher)
        student_blocks, teacher_blocks = blocks_of(student.model), blocks_of(teacher)
        counts = len(student_blocks), len(teacher_blocks)
        self.hidden_pairs: BlockPairs = (
            parse_block_pairs(config.hidden_layers, *counts, auto_most=4, setting="feature_layers")
            if config.hidden_layers
            else ()
        )
        self.attention_pairs: BlockPairs = (
            parse_block_pairs(
                config.attention_layers, *counts, auto_most=1, setting="attention_layers"
            )
            if config.attention_layers
            else ()
        )
        self.hidden_taps = [
            (HiddenTap(student_blocks[s - 1]), HiddenTap(teacher_blocks[t - 1]))
            for s, t in self.hidden_pairs
        ]
        self.attention_taps = [
            (AttentionTap(student_blocks[s - 1]), AttentionTap(teacher_blocks[t - 1]))
            for s, t in self.attention_pairs
        ]
        student_width = student.model.config.get_text_config().hidden_size
        teacher_width = teacher.config.get_text_config().hidden_size
        projections = len(self.hidden_pairs) if student_width != teacher_width else 0
        self.projections = nn.ModuleList(
            nn.Linear(student_width, teacher_width, bias=False, device=student.device)
            for _ in range(projections)
        )

    def fit_projections(self, batches: Iterable[Batch]) -> None:
        """Set each projection to the least-squares map from student to teacher states.

        Both models must have run each batch when it is yielded.
        """
        with torch.no_grad():
            for projection, products in zip(self.projections, self._products(batches), strict=True):
                gram = products.gram
                identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
                ridge = 1e-6 * gram.diagonal().mean() * identity
                projection.weight.copy_(torch.linalg.solve(gram + ridge, products.cross).T)

    def _products(self, batches: Iterable[Batch]) -> "list[_Products]":
        """Return X^T X and X^T Y of each mapped pair of blocks.

        It stops at eight tokens per dimension of the student, which is enough not to overfit.
        """
        products = [_Products(0.0, 0.0) for _ in self.projections]
        tokens = 0
        for batch in batches:
            # a row's first state is huge, and takes no part in the loss
            student_places, teacher_places = (
                layout_of(model, batch).after_first for model in self.models
            )
            tokens += len(student_places)
            for index, (student_tap, teacher_tap) in enumerate(self.hidden_taps):
                x = student_tap.at(student_places).double()
                y = teacher_tap.at(teacher_places).double()
                if self.config.hidden_distance != "plain-mse":
                    x, y = unit_rms(x), unit_rms(y)
                gram, cross = products[index]
                products[index] = _Products(gram + x.T @ x, cross + x.T @ y)
            if tokens >= 8 * self.projections[0].in_features:
                break
        return products

    def hidden_state_distance(self, positions: Positions) -> Tensor:
        """Return the mean distance of mapped hidden states at the trained positions, (N,).

        Position 0 of a row counts 0.
        """
        assert positions.batch is not None
        student_places, teacher_places = (
            layout_of(model, positions.batch).trained_N for model in self.models
        )
        total: Any = 0.0
        for index, (student_tap, teacher_tap) in enumerate(self.hidden_taps):
            student, teacher = student_tap.at(student_places), teacher_tap.at(teacher_places)
            if len(self.projections):
                projection = self.projections[index]
                student = projection(student.to(projection.weight.dtype))
            total = total + hidden_distance(student, teacher, kind=self.config.hidden_distance)
        return total / len(self.hidden_taps) * positions.batch.beyond_first_N

    def attention_divergence(self, positions: Positions) -> Tensor:
        """Return the mean divergence of mapped attention layers at the trained positions, (N,).

        A position stands for its query; those after the first `attention_tokens` count 0.
        """
        assert positions.batch is not None
        padded = layout_of(self.models[0], positions.batch)
        assert isinstance(padded, PaddedRows), "attention is compared of padded rows"
        is_token, device = padded.attention.bool(), padded.ids.device
        length = min(self._widest(positions.batch) - 1, self.config.attention_tokens)
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool, device=device))
        allowed = causal[None, None] & is_token[:, None, None, :length]
        divergence_BT = torch.zeros(is_token.shape, device=device)
        for student_tap, teacher_tap in self.attention_taps:
            student = _states_of(student_tap, "student").first_tokens(length)
            teacher = _states_of(teacher_tap, "teacher").first_tokens(length)
            compared = _compared_scores(student, teacher, self.config)
            divergences = [attention_kl(s, t, allowed) for s, t in compared]
            layer_mean = torch.stack(divergences).mean(0) / len(self.attention_taps)
            divergence_BT[:, :length] = divergence_BT[:, :length] + layer_mean
        return divergence_BT.flatten().index_select(0, padded.trained_N)

    def _widest(self, batch: Batch) -> int:
        """Return how many tokens of each row both models have read, with padding."""
        return min(int(layout_of(model, batch).ids.shape[1]) for model in self.models)

    def close(self) -> None:
        """Restore both models."""
        taps: list[tuple[HiddenTap | AttentionTap, ...]] = []
        taps += [*self.hidden_taps, *self.attention_taps]
        for student_tap, teacher_tap in taps:
            student_tap.close()
            teacher_tap.close()


class _Products(NamedTuple):
    """Sums over tokens of student states X and teacher states Y, in fp64."""

    gram: Any  # X^T X
    cross: Any  # X^T Y


def _states_of(tap: AttentionTap, side: str) -> AttentionStates:
    """Return what a tap keeps; `side` names its model in an error."""
    if tap.value is None:
        raise CellFailed(
            f"the {side}'s attention yields no queries and keys (it does not use transformers' "
            "attention interface); type --methods feature, which needs hidden states only"
        )
    return tap.value


def _compared_scores(
    student: AttentionStates, teacher: AttentionStates, config: TapConfig
) -> list[tuple[Tensor, Tensor]]:
    """Return what is compared, as (student, teacher) pairs of scores.

    They are attention scores, or the relations of queries, of keys and of values.
    """
    student_heads, teacher_heads = student.query.shape[1], teacher.query.shape[1]
    kind = config.attention_kind
    if kind == "maps" or (kind == "auto" and student_heads == teacher_heads):
        return [(_attention_scores(*student), _attention_scores(*teacher))]
    student_flat = [_merge_heads(states) for states in student[:3]]
    teacher_flat = [_merge_heads(states) for states in teacher[:3]]
    widths = [states.shape[-1] for states in (*student_flat, *teacher_flat)]
    heads = config.relation_heads
    if not heads:
        heads = _most_relation_heads(widths, max(student_heads, teacher_heads))
    if any(width % heads for width in widths):
        raise CellFailed(
            f"relation_heads={heads} does not divide all widths {sorted(set(widths))}; give a "
            "common divisor, or 0"
        )
    return [
        (_self_relations(s, heads), _self_relations(t, heads))
        for s, t in zip(student_flat, teacher_flat, strict=True)
    ]


def _most_relation_heads(widths: Sequence[int], limit: int) -> int:
    """Return the largest number up to a limit that divides all widths."""
    return max(
        heads
        for heads in range(1, min(math.gcd(*widths), limit) + 1)
        if all(width % heads == 0 for width in widths)
    )


def _attention_scores(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return scaled scores (B, H, T, T); grouped keys are repeated for their query heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query @ key.transpose(-1, -2) * scale


def _merge_heads(states: Tensor) -> Tensor:
    """Return states (B, T, heads * d) of states (B, heads, T, d)."""
    return states.transpose(1, 2).flatten(2)


def _self_relations(states: Tensor, heads: int) -> Tensor:
    """Return scaled self-relations (B, R, T, T) of (B, T, R * d), Wang et al., 2021 (MiniLMv2)."""
    split = states.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
