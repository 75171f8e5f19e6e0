"""Width pruning: cuts the same channels and heads out of every matrix that they pass through.

Legend: F channels of a feed-forward, O outputs and I inputs of a matrix, d size of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    """A model's tensors after the cut, and what they are checked against."""

    tensors: dict[str, Any]  # by name, as in the model's own state
    parameters_before: int
    parameters: int
    masked: BlockUpdates  # what the whole model computes with the pruned parts masked


class KeptOutputs(NamedTuple):
    """Indices of the outputs of an attention's projections that are kept."""

    queries: Tensor  # of the query projection, and inputs of the output projection
    keys: Tensor  # of the key and the value projection


def weight_matrix(model: Any, name: str) -> Tensor:
    """Return a layer's matrix, (O, I)."""
    layer = model.get_submodule(name)
    weight: Tensor = layer.weight if output_axis(layer) == 0 else layer.weight.T
    return weight


class AttentionHeads:
    """The attentions of a model, of which `groups` groups of heads are pruned.

    A group is one key head with its value head and its query heads.
    """

    def __init__(self, builder: StudentBuilder, groups: int) -> None:
        config = builder.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        self.builder, self.groups = builder, groups
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.size = int(getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        self.attentions: list[str] = []  # names, one of each block

    @property
    def kept_groups(self) -> int:
        """The number of groups that are kept in each block."""
        return self.kv_heads - self.groups

    def find_attentions(self) -> None:
        """Find one attention in each block, by name.

        Raises `CellFailed` where heads pass through other layers than q_proj, k_proj, v_proj and
        o_proj.
        """
        model = self.builder.model
        prefix, blocks = named_blocks(model)
        module_names = [name for name, _ in model.named_modules() if name.startswith(f"{prefix}.")]
        attentions = [
            name.removesuffix(".o_proj") for name in module_names if name.endswith(".o_proj")
        ]
        if len(attentions) != len(blocks) or not all(self._is_known(name) for name in attentions):
            raise CellFailed(
                f"{self.builder.method}: groups={self.groups} needs attentions of q_proj, k_proj, "
                f"v_proj and o_proj, and {type(model).__name__} has others; give groups=0"
            )
        self.attentions = attentions

    def _is_known(self, name: str) -> bool:
        """Tell whether the projections of an attention have the outputs that its heads need."""
        model = self.builder.model
        modules = dict(model.named_modules())
        layers = [modules.get(f"{name}.{letter}_proj") for letter in "qkv"]
        outputs = [0 if layer is None else int(layer.weight.shape[0]) for layer in layers]
        queries = int(weight_matrix(model, f"{name}.o_proj").shape[1])
        return outputs == [queries, self.kv_heads * self.size, self.kv_heads * self.size]

    def kept_outputs(self, score: Tensor) -> KeptOutputs:
        """Return the outputs to keep: those of the groups with the largest sums of scores.

        `score` has one value for each input of the output projection.
        """
        group_outputs = len(score) // self.kv_heads  # of a group's query heads, side by side
        sums = score.view(self.kv_heads, group_outputs).sum(1)
        best = sums.topk(self.kept_groups).indices.sort().values
        return KeptOutputs(
            _indices_of_groups(best, group_outputs), _indices_of_groups(best, self.size)
        )

    @staticmethod
    def prune(state: dict[str, Tensor], name: str, outputs: KeptOutputs) -> int:
        """Cut the projections of an attention in `state`; return how many weights were removed."""
        before = after = 0
        for layer, axis, index in (
            ("q_proj", 0, outputs.queries),
            ("k_proj", 0, outputs.keys),
            ("v_proj", 0, outputs.keys),
            ("o_proj", 1, outputs.queries),
        ):
            for parameter in ("weight", "bias"):
                path = f"{name}.{layer}.{parameter}"
                if path in state and not (axis and parameter == "bias"):
                    before += state[path].numel()
                    state[path] = state[path].index_select(axis, index.to(state[path].device))
                    after += state[path].numel()
        return before - after

    def config_changes(self, query_heads: int) -> dict[str, int]:
        """Return what the configuration must say of the kept heads."""
        return {
            "head_dim": self.size,
            "num_attention_heads": query_heads * self.kept_groups // self.kv_heads,
            "num_key_value_heads": self.kept_groups,
        }


def _indices_of_groups(groups: Tensor, size: int) -> Tensor:
    """Return the indices of all members of groups that have `size` neighbouring members each."""
    return torch.cat([torch.arange(int(group) * size, int(group + 1) * size) for group in groups])


class WidthPruner:
    """Finds the channels and heads of a model, keeps those with the highest scores, and saves."""

    def __init__(self, builder: StudentBuilder, reduction: WidthReduction) -> None:
        self.builder, self.reduction = builder, reduction
        self.heads = AttentionHeads(builder, reduction.groups)
        widths: list[int] = []

        def kept_width(width: int) -> int:
            widths.append(width)
            return max(1, reduction.kept_channels(width))

        self.config = narrower_config(builder.model, kept_width, label=builder.method)
        self.width = widths[-1]
        self.kept_width = reduction.kept_channels(self.width)
        self._refuse_sizes()
        self.parts: list[FeedForward] = []
        if self.kept_width < self.width:
            self.parts = feed_forwards(builder.model, self.config, label=builder.method)
        if reduction.groups:
            self.heads.find_attentions()

    def _refuse_sizes(self) -> None:
        """Raise `CellFailed` where the settings prune nothing, or everything of one kind."""
        ratio, groups = self.reduction.ratio, self.reduction.groups
        kv_heads = self.heads.kv_heads
        if self.kept_width == self.width and groups == 0:
            raise CellFailed(
                f"{self.builder.method}: ratio={ratio:g} of {self.width} channels (in multiples of "
                f"{self.reduction.multiple}) and groups=0 prune nothing; give one of them, or a "
                "smaller multiple"
            )
        if self.kept_width < 1 or (groups and groups >= kv_heads):
            raise CellFailed(
                f"{self.builder.method}: ratio={ratio} keeps {self.kept_width} of {self.width} "
                f"channels and groups={groups} keeps {kv_heads - groups} of {kv_heads} head "
                "groups; at least one of each must stay"
            )

    def output_projections(self) -> dict[str, str]:
        """Return the layer that reads the heads, for each attention."""
        return {name: f"{name}.o_proj" for name in self.heads.attentions}

    def readers(self) -> dict[str, Any]:
        """Return the layers whose inputs are the channels and the heads, by name."""
        names = [*(part.reader for part in self.parts), *self.output_projections().values()]
        return {name: self.builder.model.get_submodule(name) for name in names}

    def save(
        self,
        channels: Scores,
        heads: Scores,
        allocation: str,
        notes: dict[str, Any],
        *,
        flops: float = 0.0,
    ) -> Checkpoint:
        """Keep the parts with the highest scores, and save what is left.

        `allocation` is `uniform` (all blocks keep as many channels) or `global`. What is saved must
        compute the same as the whole model with the other parts masked.
        """
        kept_channels = self._kept_channels(channels, allocation)
        widths = [len(indices) for indices in kept_channels.values()] or [self.width]
        pruned = self._prune(kept_channels, heads)
        sizes = {
            "channels": [self.width, [min(widths), max(widths)]],
            "head_groups": [self.heads.kv_heads, self.heads.kept_groups],
            "parameters": [pruned.parameters_before, pruned.parameters],
        }
        one_width = allocation == "uniform" or len(set(widths)) == 1
        save = save_with_one_width if one_width else save_with_own_widths
        return save(self, pruned, {**sizes, **notes}, flops)

    def _prune(self, kept_channels: Mapping[str, Tensor], heads: Scores) -> PrunedState:
        """Cut the parts out of a copy of the model's state; the model itself stays."""
        model = self.builder.model
        state = dict(model.state_dict())
        before = sum(parameter.numel() for parameter in model.parameters())
        masks = {
            part.reader: keep_mask(part.width, kept_channels[part.name]) for part in self.parts
        }
        removed = sum(
            cut_to_channels(model, state, part, kept_channels[part.name]) for part in self.parts
        )
        for name, score in heads.items():
            outputs = self.heads.kept_outputs(score)
            masks[f"{name}.o_proj"] = keep_mask(len(score), outputs.queries)
            removed += self.heads.prune(state, name, outputs)
        self._refuse_unknown_weights(state)
        return PrunedState(
            tensors=state,
            parameters_before=before,
            parameters=before - removed,
            masked=masked_updates(model, masks),
        )

    def _refuse_unknown_weights(self, state: Mapping[str, Tensor]) -> None:
        """Raise `CellFailed` for weights along the heads that were not cut.

        An example is a norm over the queries of all heads.
        """
        cut = {layer for part in self.parts for layer in (*part.writers, part.reader)}
        empty = empty_model(self.builder.model, self.pruned_config(), self.builder.method)
        shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
        unknown = [
            name
            for name, shape in shapes.items()
            if name.rpartition(".")[0] not in cut and state[name].shape != shape
        ]
        if unknown:
            raise CellFailed(
                f"{self.builder.method}: groups={self.reduction.groups} does not know "
                f"{unknown[0]}, whose size follows the heads too; give groups=0 or use prune-depth"
            )

    def _kept_channels(self, channels: Scores, allocation: str) -> dict[str, Tensor]:
        """Return the indices of the channels to keep, by the feed-forward's name."""
        if allocation == "uniform" or not channels:
            return {
                part.name: channels[part.name].topk(part.kept).indices.sort().values
                for part in self.parts
            }
        # Scores of a block are divided by their mean first: blocks differ in the scale of their
        # scores, not in how much they matter.
        scaled = {name: score / score.mean() for name, score in channels.items()}
        ordered = torch.cat(list(scaled.values())).sort(descending=True).values
        lowest = ordered[self.kept_width * len(scaled) - 1]
        indices_of_part = {
            name: (score >= lowest).nonzero().flatten() for name, score in scaled.items()
        }
        return {
            name: indices if len(indices) else scaled[name].argmax().view(1)
            for name, indices in indices_of_part.items()
        }

    def pruned_config(self, *, narrow: bool = True) -> Any:
        """Return the configuration of the pruned model.

        Without `narrow` it keeps the old width of the feed-forwards: widths that differ from block
        to block are saved beside it.
        """
        model = self.builder.model
        config = self.config if narrow else model.config
        if not self.reduction.groups:
            return config
        changes = self.heads.config_changes(config.get_text_config().num_attention_heads)
        return edited_config(config, changes, tied=is_tied(model))


def save_with_one_width(
    pruner: WidthPruner, pruned: PrunedState, notes: Mapping[str, Any], flops: float
) -> Checkpoint:
    """Save a pruned model whose blocks all have one width, as a model of its architecture."""
    builder, config = pruner.builder, pruner.pruned_config()
    dtype, generation = next(builder.model.parameters()).dtype, builder.model.generation_config
    builder.replace_model(None)  # two whole models cost memory
    with init_empty_weights(include_buffers=False):
        small = AutoModelForCausalLM.from_config(config, dtype=dtype)
    small.load_state_dict(pruned.tensors, assign=True)
    small.tie_weights()
    pruned.tensors.clear()
    small = small.to(builder.job.device).eval()
    small.generation_config = generation
    parameters = sum(parameter.numel() for parameter in small.parameters())
    if parameters != pruned.parameters:
        raise CellFailed(
            f"{builder.method}: the student has {parameters:,} weights and should have "
            f"{pruned.parameters:,}; use prune-depth"
        )
    refuse_changed(small, pruned.masked, label=builder.method)
    builder.replace_model(small)
    return builder.save(notes=notes, flops=flops)


def save_with_own_widths(
    pruner: WidthPruner, pruned: PrunedState, notes: Mapping[str, Any], flops: float
) -> Checkpoint:
    """Save a pruned model whose blocks differ in width; `config.json` lists the layers' shapes."""
    builder, dtype = pruner.builder, stored_dtype(pruner.builder.base)
    specs, tensors = layers_of_own_width(pruner, pruned.tensors, dtype)
    state = {
        name: tensor
        for name, tensor in pruned.tensors.items()
        if name.rpartition(".")[0] not in specs
    }

    def write(folder: Path) -> None:
        save_packed(
            builder.opened,
            folder,
            specs=specs,
            tensors=tensors,
            dtype=dtype,
            state=state,
            config=pruner.pruned_config(narrow=False),
            method=builder.method,
        )
        reopened = AutoModelForCausalLM.from_pretrained(
            folder, dtype=next(builder.model.parameters()).dtype
        )
        refuse_changed(reopened.to(builder.job.device).eval(), pruned.masked, label=builder.method)

    return builder.save_as(write, notes=notes, flops=flops)


def layers_of_own_width(
    pruner: WidthPruner, state: Mapping[str, Tensor], dtype: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the `config.json` entries of the layers along the channels, and their tensors.

    Both are keyed by full names; matrices are (O, I).
    """
    specs: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in (layer for part in pruner.parts for layer in (*part.writers, part.reader)):
        bias = state.get(f"{name}.bias")
        matrix = state[f"{name}.weight"]
        if output_axis(pruner.builder.model.get_submodule(name)) != 0:
            matrix = matrix.T.contiguous()
        bias_entry = {"bias": True} if bias is not None else {}
        specs[name] = {"kind": "float", "shape": list(matrix.shape), **bias_entry}
        tensors[f"{name}.weight"] = matrix.to(dtype)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.to(dtype)
    return specs, tensors
