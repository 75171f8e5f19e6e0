"""Taps inside two models: hidden states behind mapped blocks, and queries, keys and values of
mapped attention layers.

A block's output is caught by a hook on the block, never by `output_hidden_states`, whose last entry
stands behind the final norm. Queries and keys are caught where every transformers attention hands
them over (after rotary embedding, before softmax), so the model goes on with its own kernel:
nothing has to be switched to `eager`, and nothing depends on attention maps that fused kernels
never build.
"""

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel
from methods.training.losses import attention_kl, hidden_distance
from methods.training.positions import Positions
from methods.training.rows import Batch, TokenRow

_TAPPED_IMPLEMENTATION = "harness_tapped"
_TAPS: "WeakKeyDictionary[nn.Module, AttentionTap]" = WeakKeyDictionary()
BlockPairs = tuple[tuple[int, int], ...]  # (student block, teacher block), counted from 1


@dataclass(frozen=True, kw_only=True)
class TapConfig:
    """Which inner parts of the two models a loss compares."""

    hidden: str = ""  # pairs such as 2-4,4-8; auto; "" for none
    attention: str = ""
    distance: Literal["mse", "cosine", "plain-mse"] = "mse"
    maps: Literal["auto", "maps", "relations"] = "auto"
    relation_heads: int = 0  # 0: the most that divide both models' widths
    longest: int = 512  # positions of a row whose attention is compared

    def attended(self, row: TokenRow) -> int:
        """Return how many trained positions of a row have their attention compared."""
        return max(0, min(len(row.ids) - 1, self.longest) - (row.trained_from - 1))


def parse_block_pairs(
    text: str, students: int, teachers: int, *, most: int, setting: str
) -> BlockPairs:
    """Read `2-4,4-8`, or spread pairs evenly: student block s beside teacher block round(s * L_T /
    L_S), the last two among them.
    """
    if text == "auto":
        count = min(most, students)
        blocks = [round(students * (index + 1) / count) for index in range(count)]
        return tuple((s, max(1, int(s * teachers / students + 0.5))) for s in blocks)
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        if not match:
            raise CellFailed(
                f"{setting}={text!r}: {part!r} is not STUDENT-TEACHER; write for example 2-4,4-8, "
                "blocks counted from 1"
            )
        pair = int(match[1]), int(match[2])
        for side, block, last in (("student", pair[0], students), ("teacher", pair[1], teachers)):
            if not 1 <= block <= last:
                raise CellFailed(
                    f"{setting}={text!r}: the {side} has no block {block}; its blocks are 1 to "
                    f"{last}"
                )
        pairs.append(pair)
    return tuple(pairs)


def blocks_of(model: Any) -> nn.ModuleList:
    """Return a causal language model's blocks."""
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

    def _keep(self, block: nn.Module, given: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output

    def close(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()


class AttentionTap:
    """Keeps the queries, keys and values of one block's attention, (B, heads, T, d) each, and its
    scale.
    """

    def __init__(self, block: nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_TAPPED_IMPLEMENTATION, _attention_with_tap)
        self.value: tuple[Tensor, Tensor, Tensor, float] | None = None
        self.modules = [
            one
            for one in block.modules()
            if hasattr(one, "config") and "ttention" in type(one).__name__
        ]
        self.before = [one.config for one in self.modules]
        for module in self.modules:
            # this layer's own; the masks are made from the model's, which stays
            config = copy.copy(module.config)
            config._attn_implementation_internal = _TAPPED_IMPLEMENTATION
            self.implementation = module.config._attn_implementation
            module.config = config
            _TAPS[module] = self

    def close(self) -> None:
        """Leave the model as it was."""
        for module, config in zip(self.modules, self.before, strict=True):
            module.config = config
            _TAPS.pop(module, None)


def _attention_with_tap(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tap = _TAPS[module]
    window = rest.get("sliding_window") or getattr(module, "sliding_window", None)
    if rest.get("softcap") is not None or (window is not None and window < query.shape[2]):
        raise CellFailed(
            f"{type(module).__name__} caps its scores or attends to a window only, which attention "
            "distillation does not know"
        )
    scale = rest.get("scaling") or query.shape[-1] ** -0.5
    tap.value = (query, key, value, float(scale))
    plain = "sdpa" if tap.implementation in (None, "eager") else tap.implementation
    return ALL_ATTENTION_FUNCTIONS[plain](module, query, key, value, attention_mask, **rest)


class InnerStates:
    """The taps of a pair of models and the projections between their widths."""

    def __init__(self, student: LanguageModel, teacher: Any, inwards: TapConfig) -> None:
        self.inwards = inwards
        ours, theirs = blocks_of(student.model), blocks_of(teacher)
        sides = len(ours), len(theirs)
        self.pairs: BlockPairs = (
            parse_block_pairs(inwards.hidden, *sides, most=4, setting="feature_layers")
            if inwards.hidden
            else ()
        )
        self.watched: BlockPairs = (
            parse_block_pairs(inwards.attention, *sides, most=1, setting="attention_layers")
            if inwards.attention
            else ()
        )
        self.hidden = [(HiddenTap(ours[s - 1]), HiddenTap(theirs[t - 1])) for s, t in self.pairs]
        self.attention = [
            (AttentionTap(ours[s - 1]), AttentionTap(theirs[t - 1])) for s, t in self.watched
        ]
        widths = [one.config.get_text_config().hidden_size for one in (student.model, teacher)]
        projected = len(self.pairs) if widths[0] != widths[1] else 0
        self.projections = nn.ModuleList(
            nn.Linear(*widths, bias=False, device=student.device) for _ in range(projected)
        )

    def start_projections(self, batches: Iterable[Batch]) -> None:
        """Set each projection to the least-squares map from student to teacher states, over batches
        that both models run as they are drawn.

        It stops at eight tokens for each dimension of the student: fewer would be fitted by heart.
        """
        with torch.no_grad():
            for projection, (gram, cross) in zip(
                self.projections, self._products(batches), strict=True
            ):
                ridge = (
                    1e-6
                    * gram.diagonal().mean()
                    * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
                )
                projection.weight.copy_(torch.linalg.solve(gram + ridge, cross).T)

    def _products(self, batches: Iterable[Batch]) -> list[Any]:
        """Return X^T X and X^T Y of each mapped pair, over as many batches as are enough."""
        products: list[Any] = [(0.0, 0.0) for _ in self.projections]
        tokens = 0
        for batch in batches:
            real = batch.attention.bool()
            real[:, 0] = False  # its states are huge, and take no part in the loss
            tokens += int(real.sum())
            for index, (ours, theirs) in enumerate(self.hidden):
                assert ours.value is not None and theirs.value is not None
                x, y = (one[real].double() for one in (ours.value, theirs.value))
                if self.inwards.distance != "plain-mse":
                    x, y = (
                        nn.functional.rms_norm(one, one.shape[-1:], eps=1e-12) for one in (x, y)
                    )
                products[index] = products[index][0] + x.T @ x, products[index][1] + x.T @ y
            if tokens >= 8 * self.projections[0].in_features:
                break
        return products

    def features(self, at: Positions) -> Tensor:
        """Return the mean distance of mapped hidden states at the trained positions, (N,); position
        0 of a row counts 0.
        """
        assert at.batch is not None
        mask = at.batch.mask
        total: Any = 0.0
        for index, (ours, theirs) in enumerate(self.hidden):
            assert ours.value is not None and theirs.value is not None
            student, teacher = ours.value[:, :-1][mask], theirs.value[:, :-1][mask]
            if len(self.projections):
                student = self.projections[index](student.to(self.projections[index].weight.dtype))
            total = total + hidden_distance(student, teacher, kind=self.inwards.distance)
        return self._behind_first(total / len(self.hidden), mask)

    def attentions(self, at: Positions) -> Tensor:
        """Return the mean divergence of mapped attention layers at the trained positions' queries,
        (N,).
        """
        assert at.batch is not None
        mask, real = at.batch.mask, at.batch.attention.bool()
        length = min(mask.shape[1], self.inwards.longest)
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool, device=real.device))
        allowed = causal[None, None] & real[:, None, None, :length]
        found = torch.zeros(mask.shape, device=real.device)
        for ours, theirs in self.attention:
            sides = [
                self._seen(tap, side) for tap, side in ((ours, "student"), (theirs, "teacher"))
            ]
            cut = [
                tuple(one[:, :, :length].float() for one in side[:3]) + side[3:] for side in sides
            ]
            rows = [attention_kl(a, b, allowed) for a, b in zip(*self._scores(cut), strict=True)]
            found[:, :length] = found[:, :length] + torch.stack(rows).mean(0) / len(self.attention)
        return found[mask]

    def _seen(self, tap: AttentionTap, side: str) -> Any:
        if tap.value is None:
            raise CellFailed(
                f"the {side}'s attention yields no queries and keys (it does not use transformers' "
                "attention interface); "
                "type --methods feature, which needs hidden states only"
            )
        return tap.value

    def _scores(self, sides: Sequence[Any]) -> list[list[Tensor]]:
        """Return what is compared of student and of teacher: attention scores, or relations of
        queries, of keys and of values.
        """
        heads = [side[0].shape[1] for side in sides]
        if self.inwards.maps == "maps" or (self.inwards.maps == "auto" and heads[0] == heads[1]):
            return [[_attention_scores(*side)] for side in sides]
        flat = [[_merge_heads(one) for one in side[:3]] for side in sides]
        widths = [one.shape[-1] for side in flat for one in side]
        count = self.inwards.relation_heads or math.gcd(*widths)
        if not self.inwards.relation_heads:
            count = max(
                n
                for n in range(1, min(count, max(heads)) + 1)
                if all(width % n == 0 for width in widths)
            )
        if any(width % count for width in widths):
            raise CellFailed(
                f"relation_heads={count} does not divide all widths {sorted(set(widths))}; give a "
                "common divisor, or 0"
            )
        return [[_self_relations(one, count) for one in side] for side in flat]

    def _behind_first(self, values_N: Tensor, mask: Tensor) -> Tensor:
        times = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]
        return values_N * (times > 0)

    def close(self) -> None:
        """Leave both models as they were."""
        for hidden in self.hidden:
            for tap in hidden:
                tap.close()
        for attention in self.attention:
            for side in attention:
                side.close()


def _attention_scores(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return scaled scores (B, H, T, T); grouped keys are repeated for their query heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query @ key.transpose(-1, -2) * scale


def _merge_heads(states: Tensor) -> Tensor:
    """(B, heads, T, d) to (B, T, heads * d)."""
    return states.transpose(1, 2).flatten(2)


def _self_relations(states: Tensor, count: int) -> Tensor:
    """Return scaled self-relations (B, R, T, T) of (B, T, R * d), Wang et al., 2021 (MiniLMv2)."""
    split = states.unflatten(-1, (count, -1)).transpose(1, 2)
    return split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
