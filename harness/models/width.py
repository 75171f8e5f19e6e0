"""Cuts in width: the same decoder with fewer channels in every feed-forward, compared with the
whole one whose channels are masked.

Where the channels run is read off the model itself: its class is built once more, without memory,
from a configuration that asks for fewer, and the weights whose shapes change are the channels'
writers (rows: gate, up, or both in one matrix, and their biases) and their reader (columns).
Whatever else changes shape (experts, norms over channels, state spaces) is named and the cut
refused. Legend: F channels, H width.
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

CHANNEL_SETTINGS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "shared_intermediate_size",
)  # that say how many channels there are


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward: the layers that write its channels and the one that reads them, by full
    name.
    """

    name: str  # of the module that they are children of
    reader: str
    # and how many parts of F outputs each has: 2 where gate and up are one matrix
    writers: Mapping[str, int]
    width: int  # F
    kept: int  # of F, by the configuration


def narrower_config(model: Any, keep: Callable[[int], int], *, cut: str) -> Any:
    """Return the configuration of a model with `keep(F)` of F channels, by the setting that changes
    its shapes; refuses one without any.
    """
    text = model.config.get_text_config()
    told = text.to_dict()
    shapes = {name: one.shape for name, one in model.named_parameters()}
    for name in CHANNEL_SETTINGS:
        value = told.get(name, 0)
        width = 4 * int(text.hidden_size) if value is None else value
        if not width:
            continue
        new = keep(width) if isinstance(width, int) else [keep(int(one)) for one in width]
        config = edited_config(model.config, {name: new}, tied=is_tied(model))
        if new == width or any(
            one.shape != shapes.get(at)
            for at, one in empty_model(model, config, cut).named_parameters()
        ):
            return config
    raise CellFailed(
        f"{cut}: no setting of {type(model.config).__name__} narrows "
        f"{shortened_names(_unchanged_blocks(model, []))} of {type(model).__name__}; "
        f"use {alternative_to_width(cut)}"
    )


def alternative_to_width(cut: str) -> str:
    """Name the cut in depth that may be had in place of one in width."""
    return "prune-depth" if cut.startswith("prune") else cut.replace("width", "depth")


def empty_model(model: Any, config: Any, cut: str) -> Any:
    """Return a model of a configuration without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # whatever a class raises at a width that it does not take
        raise CellFailed(
            f"{cut}: {type(model).__name__} cannot be built with fewer channels: "
            f"{in_one_line(problem)}; use {alternative_to_width(cut)}"
        ) from problem


def output_axis(layer: Any) -> int | None:
    """Return along which axis of a layer's weight its outputs run; None for what is no matrix of a
    linear layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return 0 if isinstance(layer, nn.Linear) else 1 if isinstance(layer, Conv1D) else None


def feed_forwards(model: Any, config: Any, *, cut: str) -> list[FeedForward]:
    """Return the feed-forwards that a narrower configuration narrows, in order; refuses by name
    what cannot be narrowed.
    """
    shapes = {name: one.shape for name, one in empty_model(model, config, cut).named_parameters()}
    groups: dict[str, dict[str, str]] = {}
    strange = []
    for name, parameter in model.named_parameters():
        if parameter.shape == shapes.get(name):
            continue
        owner, _, leaf = name.rpartition(".")
        role = _role(model.get_submodule(owner), leaf, parameter.shape, shapes.get(name, ()))
        if not role:
            strange.append(name)
        elif leaf == "weight":
            groups.setdefault(owner.rpartition(".")[0], {})[owner] = role
    made = {name: _feed_forward_of(model, name, roles, shapes) for name, roles in groups.items()}
    strange += [name for name, one in made.items() if one is None]
    strange += _unchanged_blocks(model, [*groups, *strange])
    if strange:
        raise CellFailed(
            f"{cut}: cannot narrow {shortened_names(strange)} of {type(model).__name__}; use "
            f"{alternative_to_width(cut)}"
        )
    return [one for one in made.values() if one is not None]


def shortened_names(names: Sequence[str]) -> str:
    """Return names in short: those that differ in numbers alone once, with a star."""
    short = list(
        dict.fromkeys(
            ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
        )
    )
    return ", ".join(short[:6]) + (f" and {len(short) - 6} more" if len(short) > 6 else "")


def _role(layer: Any, leaf: str, old: Sequence[int], new: Sequence[int]) -> str:
    """Say what a weight that became narrower does with the channels: it writes or reads them; ""
    for no matrix of a linear layer.
    """
    axis = output_axis(layer)
    changed = [
        at for at, (before, after) in enumerate(zip(old, new, strict=False)) if before != after
    ]
    if axis is None or len(old) != len(new) or len(changed) != 1 or leaf not in ("weight", "bias"):
        return ""
    return "writes" if leaf == "bias" or changed == [axis] else "reads"


def _feed_forward_of(
    model: Any, name: str, roles: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> FeedForward | None:
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
        # the configuration says another width than the model has, or its channels are laid out in a
        # way of its own
        return None
    return FeedForward(
        name, readers[0], {owner: count // width for owner, count in outputs.items()}, width, kept
    )


def _output_count(layer: Any) -> int:
    return int(layer.weight.shape[output_axis(layer) or 0])


def _unchanged_blocks(model: Any, narrowed: Sequence[str]) -> list[str]:
    """Return the blocks that would stay as wide as they are, by what stands in for their
    feed-forward (experts) where that shows.
    """
    prefix, blocks = named_blocks(model)
    found = []
    for at, block in enumerate(blocks):
        own = f"{prefix}.{at}."
        if not any(f"{name}.".startswith(own) for name in narrowed):
            experts = [
                name for name, _ in block.named_modules() if name.endswith(("experts", "expert"))
            ]
            found.append(own + experts[0] if experts else own.removesuffix("."))
    return found


def channel_norms(model: Any, part: FeedForward) -> "Tensor":
    """Return each channel's product of norms, (F,): of what writes it, |gate_i| |up_i|, and of what
    reads it, |down_i|.
    """
    found = []
    for owner, parts in part.writers.items():
        layer = model.get_submodule(owner)
        weight = layer.weight.float() if output_axis(layer) == 0 else layer.weight.float().T
        found += [one.norm(dim=1) for one in weight.chunk(parts)]
    reader = model.get_submodule(part.reader)
    weight = reader.weight.float() if output_axis(reader) == 0 else reader.weight.float().T
    product: Tensor = reduce(mul, [*found, weight.norm(dim=0)])
    return product


def cut_to_channels(
    model: Any, state: "dict[str, Tensor]", part: FeedForward, channels: "Tensor"
) -> int:
    """Cut a feed-forward's matrices and biases in a state down to these channels; return how many
    weights went.
    """
    import torch

    gone = 0

    def take(name: str, axis: int, index: "Tensor") -> None:
        nonlocal gone
        before = state[name]
        state[name] = before.index_select(axis, index.to(before.device))
        gone += before.numel() - state[name].numel()

    for owner, parts in part.writers.items():
        rows = torch.cat([channels + at * part.width for at in range(parts)])
        take(f"{owner}.weight", output_axis(model.get_submodule(owner)) or 0, rows)
        if f"{owner}.bias" in state:
            take(f"{owner}.bias", 0, rows)
    take(
        f"{part.reader}.weight", 1 - (output_axis(model.get_submodule(part.reader)) or 0), channels
    )
    return gone


def narrow_model(model: Any, share: float, *, cut: str) -> Any:
    """Return a model that keeps a share of every feed-forward's channels: those with the largest
    product of norms.
    """
    from transformers import AutoModelForCausalLM

    config = narrower_config(model, lambda width: max(1, int(width * share + 0.5)), cut=cut)
    if share == 1:
        return model
    parts = feed_forwards(model, config, cut=cut)
    kept = {
        part.name: channel_norms(model, part).topk(part.kept).indices.sort().values
        for part in parts
    }
    state = dict(model.state_dict())
    for part in parts:
        cut_to_channels(model, state, part, kept[part.name])
    small = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype)
    small.load_state_dict(state)
    small = small.to(next(model.parameters()).device).eval()
    refuse_changed(
        small,
        masked_updates(
            model, {part.reader: keep_mask(part.width, kept[part.name]) for part in parts}
        ),
        cut=cut,
    )
    return small


def keep_mask(size: int, kept: "Tensor") -> "Tensor":
    """Return a mask (size,) with 1 where something is kept."""
    import torch

    mask = torch.zeros(size)
    mask[kept.cpu()] = 1
    return mask


def masked_updates(model: Any, masks: "Mapping[str, Tensor]") -> BlockUpdates:
    """Return what the blocks of a whole model do while the inputs of these layers are masked."""
    within = masked_inputs({model.get_submodule(name): mask for name, mask in masks.items()})
    return block_updates(model, probe_ids(model), range(len(named_blocks(model)[1])), within)


def refuse_changed(small: Any, base: BlockUpdates, *, cut: str) -> None:
    """Raise `CellFailed` where a narrowed model is not the whole one with its dropped channels
    masked.
    """
    every = range(len(named_blocks(small)[1]))
    dtype = str(next(small.parameters()).dtype).removeprefix("torch.")
    told = first_difference(block_updates(small, probe_ids(small), every), base, every, dtype=dtype)
    if told:
        raise CellFailed(
            f"{cut}: the narrowed {type(small).__name__} is not that model with the dropped "
            f"channels masked ({told}): its blocks mix their "
            f"channels in a way that is not known here; use {alternative_to_width(cut)}"
        )
