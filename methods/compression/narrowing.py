"""Cuts the same channels and heads out of every matrix that they run through, and saves what is
left.

Legend: F channels of a feed-forward, O outputs and I inputs of a matrix, d size of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.contract import Checkpoint
from harness.errors import CellFailed
from harness.models.blocks import BlockUpdates, edited_config, is_tied, named_blocks
from harness.models.language_model import stored_dtype
from harness.models.packed import save_packed
from harness.models.width import (
    FeedForward,
    cut_to_channels,
    empty_model,
    feed_forwards,
    keep_mask,
    masked_updates,
    narrower_config,
    output_axis,
    refuse_changed,
)
from methods.compression.base import StudentBuilder
from methods.compression.sizes import WidthReduction

Scores = Mapping[str, Tensor]  # of channels (F,) or of an attention's outputs, by name


@dataclass(frozen=True, kw_only=True)
class PrunedState:
    """A model's tensors after the cut, and what they are checked by."""

    tensors: dict[str, Any]  # by name, as in the model's own state
    before: int  # parameters
    parameters: int
    masked: BlockUpdates  # what the whole model computes with the cut parts masked


def weight_matrix(model: Any, name: str) -> Tensor:
    """Return a layer's matrix, (O, I)."""
    layer = model.get_submodule(name)
    weight: Tensor = layer.weight if output_axis(layer) == 0 else layer.weight.T
    return weight


class AttentionHeads:
    """The attentions of a model, of which whole groups of heads go: query heads, key head and value
    head together.
    """

    def __init__(self, making: StudentBuilder, groups: int) -> None:
        text = making.model.config.get_text_config()
        heads = int(getattr(text, "num_attention_heads", 0) or 0)
        self.making, self.groups = making, groups
        self.kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        self.size = int(getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
        self.attentions: list[str] = []

    def find(self) -> None:
        """Look the attentions up by name; refuse those whose heads do not run through four
        projections of the known names alone.
        """
        model = self.making.model
        prefix, blocks = named_blocks(model)
        inside = [name for name, _ in model.named_modules() if name.startswith(f"{prefix}.")]
        attentions = [name.removesuffix(".o_proj") for name in inside if name.endswith(".o_proj")]
        if len(attentions) != len(blocks) or not all(self._is_known(name) for name in attentions):
            raise CellFailed(
                f"{self.making.method}: groups={self.groups} knows attentions of q_proj, k_proj, "
                "v_proj and o_proj, and "
                f"{type(model).__name__} has others; give groups=0"
            )
        self.attentions = attentions

    def _is_known(self, name: str) -> bool:
        """Tell whether an attention's three projections have as many outputs as its heads."""
        model = self.making.model
        named = dict(model.named_modules())
        layers = [named.get(f"{name}.{part}_proj") for part in "qkv"]
        outputs = [0 if layer is None else int(layer.weight.shape[0]) for layer in layers]
        queries = int(weight_matrix(model, f"{name}.o_proj").shape[1])
        return outputs == [queries, self.kv_heads * self.size, self.kv_heads * self.size]

    def kept(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return which outputs of the queries and of the keys stay: whole groups, those with the
        largest sums.
        """
        each = len(score) // self.kv_heads  # outputs of a group's query heads, side by side
        sums = score.view(self.kv_heads, each).sum(1)
        best = sums.topk(self.kv_heads - self.groups).indices.sort().values
        queries = torch.cat([torch.arange(int(at) * each, int(at + 1) * each) for at in best])
        keys = torch.cat(
            [torch.arange(int(at) * self.size, int(at + 1) * self.size) for at in best]
        )
        return queries, keys

    @staticmethod
    def take(state: dict[str, Tensor], name: str, queries: Tensor, keys: Tensor) -> int:
        """Cut an attention's projections down to these outputs; return how many weights went."""
        before = after = 0
        for layer, axis, index in (
            ("q_proj", 0, queries),
            ("k_proj", 0, keys),
            ("v_proj", 0, keys),
            ("o_proj", 1, queries),
        ):
            for leaf in ("weight", "bias"):
                full = f"{name}.{layer}.{leaf}"
                if full in state and not (axis and leaf == "bias"):
                    before += state[full].numel()
                    state[full] = state[full].index_select(axis, index.to(state[full].device))
                    after += state[full].numel()
        return before - after

    def changes(self, query_heads: int) -> dict[str, int]:
        """Return what the configuration says of the heads that are left."""
        left = self.kv_heads - self.groups
        return {
            "head_dim": self.size,
            "num_attention_heads": query_heads * left // self.kv_heads,
            "num_key_value_heads": left,
        }


class WidthPruner:
    """One cut of a model: which parts there are, which of them stay, and what is left."""

    def __init__(self, making: StudentBuilder, narrower: WidthReduction) -> None:
        self.making, self.narrower = making, narrower
        self.heads = AttentionHeads(making, narrower.groups)
        widths: list[int] = []

        def keep(width: int) -> int:
            widths.append(width)
            return max(1, narrower.kept_channels(width))

        self.config = narrower_config(making.model, keep, label=making.method)
        self.width = widths[-1]
        self.keep = narrower.kept_channels(self.width)
        self._refuse_sizes()
        self.parts: list[FeedForward] = []
        if self.keep < self.width:
            self.parts = feed_forwards(making.model, self.config, label=making.method)
        if narrower.groups:
            self.heads.find()

    def _refuse_sizes(self) -> None:
        ratio, groups, multiple = self.narrower.ratio, self.narrower.groups, self.narrower.multiple
        kv_heads = self.heads.kv_heads
        if self.keep == self.width and groups == 0:
            raise CellFailed(
                f"{self.making.method}: ratio={ratio:g} of {self.width} channels (in multiples of "
                f"{multiple}) and groups=0 cut nothing; "
                "give one of them, or a smaller multiple"
            )
        if self.keep < 1 or (groups and groups >= kv_heads):
            raise CellFailed(
                f"{self.making.method}: ratio={ratio} leaves {self.keep} of {self.width} channels "
                f"and groups={groups} leaves "
                f"{kv_heads - groups} of {kv_heads} head groups; at least one of each must stay"
            )

    def outputs(self) -> dict[str, str]:
        """Return the layers that read the heads, by attention."""
        return {name: f"{name}.o_proj" for name in self.heads.attentions}

    def readers(self) -> dict[str, Any]:
        """Return the layers whose inputs are the channels and the heads."""
        names = [*(part.reader for part in self.parts), *self.outputs().values()]
        return {name: self.making.model.get_submodule(name) for name in names}

    def saved(
        self,
        channels: Scores,
        heads: Scores,
        allocation: str,
        told: dict[str, Any],
        *,
        flops: float = 0.0,
    ) -> Checkpoint:
        """Keep the highest scores, compare with the model whose other channels are masked, and
        save.
        """
        kept = self._kept_channels(channels, allocation)
        widths = [len(chosen) for chosen in kept.values()] or [self.width]
        left = self._cut(kept, heads)
        kv_heads = self.heads.kv_heads
        notes = {
            "channels": [self.width, [min(widths), max(widths)]],
            "head_groups": [kv_heads, kv_heads - self.narrower.groups],
            "parameters": [left.before, left.parameters],
            **told,
        }
        save = (
            save_with_one_width
            if allocation == "uniform" or len(set(widths)) == 1
            else save_with_own_widths
        )
        return save(self, left, notes, flops)

    def _cut(self, kept: Mapping[str, Tensor], heads: Scores) -> PrunedState:
        """Take the parts out of a copy of the model's state."""
        model = self.making.model
        state = dict(model.state_dict())
        before = sum(parameter.numel() for parameter in model.parameters())
        masks = {part.reader: keep_mask(part.width, kept[part.name]) for part in self.parts}
        gone = sum(cut_to_channels(model, state, part, kept[part.name]) for part in self.parts)
        for name, score in heads.items():
            queries, keys = self.heads.kept(score)
            masks[f"{name}.o_proj"] = keep_mask(len(score), queries)
            gone += self.heads.take(state, name, queries, keys)
        self._refuse_strangers(state)
        masked = masked_updates(model, masks)
        return PrunedState(tensors=state, before=before, parameters=before - gone, masked=masked)

    def _refuse_strangers(self, state: Mapping[str, Tensor]) -> None:
        """Refuse weights that run along the heads and are none of the matrices that are cut (a norm
        over all heads' queries).
        """
        own = {layer for part in self.parts for layer in (*part.writers, part.reader)}
        empty = empty_model(self.making.model, self.configured(), self.making.method)
        shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
        odd = [
            name
            for name, shape in shapes.items()
            if name.rpartition(".")[0] not in own and state[name].shape != shape
        ]
        if odd:
            raise CellFailed(
                f"{self.making.method}: groups={self.narrower.groups} does not know {odd[0]}, "
                "which runs along the heads too; "
                "give groups=0 or use prune-depth"
            )

    def _kept_channels(self, channels: Scores, allocation: str) -> dict[str, Tensor]:
        if allocation == "uniform" or not channels:
            return {
                part.name: channels[part.name].topk(part.kept).indices.sort().values
                for part in self.parts
            }
        # Scores of a block are divided by their mean first: blocks differ in scale, not in how much
        # they matter.
        alike = {name: score / score.mean() for name, score in channels.items()}
        lowest = (
            torch.cat(list(alike.values())).sort(descending=True).values[self.keep * len(alike) - 1]
        )
        kept = {name: (score >= lowest).nonzero().flatten() for name, score in alike.items()}
        return {
            name: chosen if len(chosen) else alike[name].argmax().view(1)
            for name, chosen in kept.items()
        }

    def configured(self, *, narrow: bool = True) -> Any:
        """Return the configuration of what is left; without `narrow` of the heads alone (widths
        that differ stand beside it).
        """
        model = self.making.model
        config = self.config if narrow else model.config
        if not self.narrower.groups:
            return config
        changes = self.heads.changes(config.get_text_config().num_attention_heads)
        return edited_config(config, changes, tied=is_tied(model))


def save_with_one_width(
    cut: WidthPruner, left: PrunedState, notes: Mapping[str, Any], flops: float
) -> Checkpoint:
    """Save what is left as a model of its architecture: all blocks are of one width."""
    making, config = cut.making, cut.configured()
    dtype, generation = next(making.model.parameters()).dtype, making.model.generation_config
    making.opened = replace(making.opened, model=None)  # two whole models are not held at once
    with init_empty_weights(include_buffers=False):
        small = AutoModelForCausalLM.from_config(config, dtype=dtype)
    small.load_state_dict(left.tensors, assign=True)
    small.tie_weights()
    left.tensors.clear()
    small = small.to(making.job.device).eval()
    small.generation_config = generation
    parameters = sum(parameter.numel() for parameter in small.parameters())
    if parameters != left.parameters:
        raise CellFailed(
            f"{making.method}: {parameters:,} weights are left and {left.parameters:,} should be; "
            "use prune-depth"
        )
    refuse_changed(small, left.masked, label=making.method)
    making.opened = replace(making.opened, model=small)
    return making.save(notes=notes, flops=flops)


def save_with_own_widths(
    cut: WidthPruner, left: PrunedState, notes: Mapping[str, Any], flops: float
) -> Checkpoint:
    """Save what is left with widths of its own for each block, beside the architecture's
    configuration.
    """
    making, dtype = cut.making, stored_dtype(cut.making.base)
    specs, tensors = layers_of_own_width(cut, left.tensors, dtype)
    state = {
        key: tensor for key, tensor in left.tensors.items() if key.rpartition(".")[0] not in specs
    }

    def write(fresh: Any) -> None:
        save_packed(
            making.opened,
            fresh,
            specs=specs,
            tensors=tensors,
            dtype=dtype,
            state=state,
            config=cut.configured(narrow=False),
            method=making.method,
        )
        again = AutoModelForCausalLM.from_pretrained(
            fresh, dtype=next(making.model.parameters()).dtype
        )
        refuse_changed(again.to(making.job.device).eval(), left.masked, label=making.method)

    return making.save_as(write, notes=notes, flops=flops)


def layers_of_own_width(
    cut: WidthPruner, state: Mapping[str, Tensor], dtype: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the lines of `config.json` for the layers along the channels, and their tensors by
    full name, matrices as (O, I).
    """
    specs: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in (layer for part in cut.parts for layer in (*part.writers, part.reader)):
        bias = state.get(f"{name}.bias")
        matrix = state[f"{name}.weight"]
        if output_axis(cut.making.model.get_submodule(name)) != 0:
            matrix = matrix.T.contiguous()
        specs[name] = {
            "kind": "float",
            "shape": list(matrix.shape),
            **({"bias": True} if bias is not None else {}),
        }
        tensors[f"{name}.weight"] = matrix.to(dtype)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.to(dtype)
    return specs, tensors
