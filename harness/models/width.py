"""Cuts in width: the same decoder with fewer feed-forward channels, compared with its base.

Which weights hold channels is read off the model: its class is built once more, without memory,
from a configuration with fewer channels, and the weights whose shapes change either write the
channels (rows: gate, up, or both in one matrix, and their biases) or read them (columns). Whatever
else changes shape (experts, norms over channels, state spaces) is named and the cut refused. The
result is compared with the base whose dropped channels are masked. Legend: F channels, H width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import TYPE_CHECKING, Any

from harness.errors import CellFailed, in_one_line
from harness.models.blocks import (
    BlockUpdates,
    block_updates,
    edited_config,
    first_difference,
    is_tied,
    masked_inputs,
    named_blocks,
    probe_ids,
)

if TYPE_CHECKING:
    from torch import Tensor

# Settings that hold the number of channels.
CHANNEL_SETTINGS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "shared_intermediate_size",
)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward: the layers that write its channels and the one that reads them."""

    name: str  # full name of the module that holds the layers
    reader: str  # full name
    # by full name: how many times F outputs a layer has, 2 where gate and up are one matrix
    writers: Mapping[str, int]
    width: int  # F
    kept: int  # of F, by the narrower configuration


def narrower_config(model: Any, keep: Callable[[int], int], *, label: str) -> Any:
    """Return the configuration of a model with `keep(F)` of F channels.

    Raises `CellFailed` where no setting narrows the model.
    """
    text_config = model.config.get_text_config()
    values = text_config.to_dict()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in CHANNEL_SETTINGS:
        value = values.get(name, 0)
        width = 4 * int(text_config.hidden_size) if value is None else value
        if not width:
            continue
        widths = [width] if isinstance(width, int) else width  # a list has one for each layer
        kept_widths = [keep(int(layer_width)) for layer_width in widths]
        kept_width = kept_widths[0] if isinstance(width, int) else kept_widths
        config = edited_config(model.config, {name: kept_width}, tied=is_tied(model))
        narrowed = empty_model(model, config, label).named_parameters()
        if kept_width == width or any(
            parameter.shape != shapes.get(key) for key, parameter in narrowed
        ):
            return config
    raise CellFailed(
        f"{label}: no setting of {type(model.config).__name__} narrows "
        f"{shortened_names(_unchanged_blocks(model, []))} of {type(model).__name__}; "
        f"use {alternative_to_width(label)}"
    )


def alternative_to_width(label: str) -> str:
    """Return the cut in depth to suggest where this cut in width is refused."""
    return "prune-depth" if label.startswith("prune") else label.replace("width", "depth")


def empty_model(model: Any, config: Any, label: str) -> Any:
    """Return a model of a configuration, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # whatever a class raises at a width that it does not take
        raise CellFailed(
            f"{label}: {type(model).__name__} cannot be built with fewer channels: "
            f"{in_one_line(problem)}; use {alternative_to_width(label)}"
        ) from problem


def output_axis(layer: Any) -> int | None:
    """Return the axis of a linear layer's weight for its outputs, None for other modules."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return 0 if isinstance(layer, nn.Linear) else 1 if isinstance(layer, Conv1D) else None


def feed_forwards(model: Any, config: Any, *, label: str) -> list[FeedForward]:
    """Return the feed-forwards that a narrower configuration narrows, in order.

    Raises `CellFailed` with the names of what cannot be narrowed.
    """
    narrowed = empty_model(model, config, label).named_parameters()
    shapes = {name: parameter.shape for name, parameter in narrowed}
    groups: dict[str, dict[str, str]] = {}  # by parent module: each layer's role
    unnarrowed = []
    for name, parameter in model.named_parameters():
        if parameter.shape == shapes.get(name):
            continue
        owner, _, leaf = name.rpartition(".")
        role = _role(model.get_submodule(owner), leaf, parameter.shape, shapes.get(name, ()))
        if not role:
            unnarrowed.append(name)
        elif leaf == "weight":
            groups.setdefault(owner.rpartition(".")[0], {})[owner] = role
    parts = {name: _feed_forward_of(model, name, roles, shapes) for name, roles in groups.items()}
    unnarrowed += [name for name, part in parts.items() if part is None]
    unnarrowed += _unchanged_blocks(model, [*groups, *unnarrowed])
    if unnarrowed:
        raise CellFailed(
            f"{label}: cannot narrow {shortened_names(unnarrowed)} of {type(model).__name__}; use "
            f"{alternative_to_width(label)}"
        )
    return [part for part in parts.values() if part is not None]


def shortened_names(names: Sequence[str]) -> str:
    """Return names in short: a star for each number, every pattern once, six at most."""
    starred = (
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    patterns = list(dict.fromkeys(starred))
    rest = f" and {len(patterns) - 6} more" if len(patterns) > 6 else ""
    return ", ".join(patterns[:6]) + rest


def _role(layer: Any, leaf: str, old: Sequence[int], new: Sequence[int]) -> str:
    """Return whether a narrowed weight "writes" or "reads" channels, "" for neither."""
    axis = output_axis(layer)
    if axis is None or leaf not in ("weight", "bias") or len(old) != len(new):
        return ""
    changed_axes = [position for position in range(len(old)) if old[position] != new[position]]
    if len(changed_axes) != 1:
        return ""
    return "writes" if leaf == "bias" or changed_axes == [axis] else "reads"


def _feed_forward_of(
    model: Any, name: str, roles: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> FeedForward | None:
    """Return the feed-forward of layers with these roles.

    None where the configuration gives another width than the model has, or the channels are laid
    out in another way.
    """
    readers = [owner for owner, role in roles.items() if role == "reads"]
    if len(readers) != 1 or len(roles) < 2:
        return None
    reader = model.get_submodule(readers[0])
    axis = 1 - (output_axis(reader) or 0)
    width, kept = int(reader.weight.shape[axis]), int(shapes[f"{readers[0]}.weight"][axis])
    outputs = {
        owner: _output_count(model.get_submodule(owner))
        for owner, role in roles.items()
        if role == "writes"
    }
    if kept >= width or any(count not in (width, 2 * width) for count in outputs.values()):
        return None
    writers = {owner: count // width for owner, count in outputs.items()}
    return FeedForward(name, readers[0], writers, width, kept)


def _output_count(layer: Any) -> int:
    return int(layer.weight.shape[output_axis(layer) or 0])


def _weight_by_output(layer: Any) -> "Tensor":
    """Return a linear layer's weight in fp32, (outputs, inputs)."""
    weight: Tensor = layer.weight.float()
    return weight if output_axis(layer) == 0 else weight.T


def _unchanged_blocks(model: Any, narrowed: Sequence[str]) -> list[str]:
    """Return the names of blocks without a narrowed weight, or of their experts."""
    prefix, blocks = named_blocks(model)
    names = []
    for number, block in enumerate(blocks):
        block_name = f"{prefix}.{number}."
        if any(f"{name}.".startswith(block_name) for name in narrowed):
            continue
        modules = (name for name, _ in block.named_modules())
        experts = [name for name in modules if name.endswith(("experts", "expert"))]
        names.append(block_name + experts[0] if experts else block_name.removesuffix("."))
    return names


def channel_norms(model: Any, part: FeedForward) -> "Tensor":
    """Return each channel's product of norms, (F,): |gate_i| |up_i| |down_i|."""
    norms = []
    for owner, parts in part.writers.items():
        weight = _weight_by_output(model.get_submodule(owner))
        norms += [matrix.norm(dim=1) for matrix in weight.chunk(parts)]
    norms.append(_weight_by_output(model.get_submodule(part.reader)).norm(dim=0))
    product: Tensor = reduce(mul, norms)
    return product


def cut_to_channels(
    model: Any, state: "dict[str, Tensor]", part: FeedForward, channels: "Tensor"
) -> int:
    """Cut a feed-forward's tensors in `state` to these channels; return how many weights went."""
    import torch

    removed = 0

    def take(name: str, axis: int, index: "Tensor") -> None:
        nonlocal removed
        tensor = state[name]
        state[name] = tensor.index_select(axis, index.to(tensor.device))
        removed += tensor.numel() - state[name].numel()

    for owner, parts in part.writers.items():
        rows = torch.cat([channels + number * part.width for number in range(parts)])
        take(f"{owner}.weight", output_axis(model.get_submodule(owner)) or 0, rows)
        if f"{owner}.bias" in state:
            take(f"{owner}.bias", 0, rows)
    input_axis = 1 - (output_axis(model.get_submodule(part.reader)) or 0)
    take(f"{part.reader}.weight", input_axis, channels)
    return removed


def narrow_model(model: Any, share: float, *, label: str) -> Any:
    """Return a model that keeps a share of every feed-forward's channels: the largest norms."""
    from transformers import AutoModelForCausalLM

    config = narrower_config(model, lambda width: max(1, int(width * share + 0.5)), label=label)
    if share == 1:
        return model
    parts = feed_forwards(model, config, label=label)
    kept_channels = {
        part.name: channel_norms(model, part).topk(part.kept).indices.sort().values
        for part in parts
    }
    state = dict(model.state_dict())
    for part in parts:
        cut_to_channels(model, state, part, kept_channels[part.name])
    small = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype)
    small.load_state_dict(state)
    small = small.to(next(model.parameters()).device).eval()
    masks = {part.reader: keep_mask(part.width, kept_channels[part.name]) for part in parts}
    refuse_changed(small, masked_updates(model, masks), label=label)
    return small


def keep_mask(size: int, kept: "Tensor") -> "Tensor":
    """Return a mask (size,) that is 1 at the kept indices and 0 elsewhere."""
    import torch

    mask = torch.zeros(size)
    mask[kept.cpu()] = 1
    return mask


def masked_updates(model: Any, masks: "Mapping[str, Tensor]") -> BlockUpdates:
    """Return the updates of a base's blocks while the inputs of these layers are masked."""
    context = masked_inputs({model.get_submodule(name): mask for name, mask in masks.items()})
    return block_updates(model, probe_ids(model), range(len(named_blocks(model)[1])), context)


def refuse_changed(small: Any, base_updates: BlockUpdates, *, label: str) -> None:
    """Raise `CellFailed` where a narrowed model is not its base with dropped channels masked."""
    numbers = range(len(named_blocks(small)[1]))
    dtype = str(next(small.parameters()).dtype).removeprefix("torch.")
    updates = block_updates(small, probe_ids(small), numbers)
    difference = first_difference(updates, base_updates, numbers, dtype=dtype)
    if difference:
        raise CellFailed(
            f"{label}: the narrowed {type(small).__name__} is not that model with the dropped "
            f"channels masked ({difference}): its blocks mix their channels in a way that is not "
            f"known here; use {alternative_to_width(label)}"
        )
