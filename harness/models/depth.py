"""Cuts in depth: the same decoder with fewer blocks, compared with its base.

Settings of a configuration that speak of single blocks (layer types, mixtures in some, windows)
follow the kept blocks. Where a block's number changes what it computes and no configuration can say
so (DiffLlama's lambda), the cut would be another model: it is refused. The result is compared with
the base whose dropped blocks are bypassed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.errors import CellFailed, in_one_line
from harness.models.blocks import (
    block_updates,
    bypassed_blocks,
    differing_constant,
    edited_config,
    first_difference,
    is_tied,
    named_blocks,
    probe_ids,
)

# Settings that count blocks, beside `num_hidden_layers` (xLSTM has one).
BLOCK_COUNT_SETTINGS = ("num_blocks", "num_layers", "n_layers", "n_layer")
# Settings that list block numbers. Lists with one entry for each block are known by their length.
BLOCK_LIST_SETTINGS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "attention_layers_idx",
)
# Settings with a block number, for the blocks before it or from it on. The new number is how many
# kept blocks stand before it.
FIRST_BLOCK_SETTINGS = (
    "first_k_dense_replace",
    "moe_layer_start_index",
    "num_dense_layers",
    "first_k_dense_layers",
    "num_hash_layers",
)


def with_blocks(
    model: Any, kept_blocks: Sequence[int], *, copy: bool = True, label: str = "depth"
) -> Any:
    """Return a model of the kept blocks alone, in this order, renumbered; random without `copy`.

    They are renumbered because keys and values are cached by number. Raises `CellFailed` with
    `label` and the difference where the result is not the base with its other blocks bypassed.
    """
    from transformers import AutoModelForCausalLM

    prefix, blocks = named_blocks(model)
    config = _shallower_config(model, kept_blocks, len(blocks), label)
    try:
        small = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype)
    except Exception as problem:  # a configuration that its class does not take: whatever it raises
        raise CellFailed(
            f"{label}: {type(model).__name__} cannot be built of blocks {list(kept_blocks)} of "
            f"{len(blocks)}: {in_one_line(problem)}"
        ) from problem
    built = len(named_blocks(small)[1])
    if built != len(kept_blocks):
        raise CellFailed(
            f"{label}: {type(model).__name__} counts its blocks by another setting than "
            f"num_hidden_layers and was built with {built} for {len(kept_blocks)}; "
            f"use {alternative_to_depth(label)}"
        )
    small = small.to(next(model.parameters()).device).eval()
    if not copy:
        return small
    _copy_weights(model, small, prefix, kept_blocks, label)
    _refuse_changed(model, small, kept_blocks, label)
    return small


def alternative_to_depth(label: str) -> str:
    """Return the cut in width to suggest where this cut in depth is refused."""
    if label.startswith("prune"):
        return "prune-width"
    return label.replace("depth", "width").replace("scratch", "width")


def _shallower_config(model: Any, kept: Sequence[int], count: int, label: str) -> Any:
    """Return the configuration of the kept blocks."""
    text_config = model.config.get_text_config()
    if text_config.num_hidden_layers != count:
        raise CellFailed(
            f"{label}: {type(model).__name__} has a list of {count} blocks and its configuration "
            f"says {text_config.num_hidden_layers}; none of them can be dropped here"
        )
    changes = {"num_hidden_layers": len(kept)}
    changes |= _per_block_settings(text_config.to_dict(), kept, count)
    return edited_config(model.config, changes, tied=is_tied(model))


def _per_block_settings(
    values: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """Return the settings that speak of single blocks, changed to the kept blocks."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in BLOCK_COUNT_SETTINGS and value == count:
            changes[name] = len(kept)
        elif name in FIRST_BLOCK_SETTINGS and isinstance(value, int):
            changes[name] = sum(number < value for number in kept)
        elif isinstance(value, list | tuple) and value:
            kept_values = _renumbered_list(name, list(value), kept, count)
            changes.update({} if kept_values is None else {name: kept_values})
    for name, rule in _RULES.items():
        if values.get(name) is not None:
            changes.update(rule(values, kept, count))
    return changes


def _renumbered_list(
    name: str, value: list[Any], kept: Sequence[int], count: int
) -> list[Any] | None:
    """Return a setting's list of block numbers, or of one entry a block, for the kept blocks.

    None for any other list.
    """
    are_numbers = all(type(entry) is int and 0 <= entry < count for entry in value)
    if name in BLOCK_LIST_SETTINGS or (
        are_numbers and name.endswith(("layers_idx", "layer_idxs", "layer_ids", "layer_indices"))
    ):
        return [new for new, old in enumerate(kept) if old in value]
    return [value[number] for number in kept] if len(value) == count else None


def _decoder_sparse_step(
    values: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """List the dense blocks where every n-th block is a mixture (Qwen2-MoE's family)."""
    dense_blocks = values.get("mlp_only_layers") or []
    dense = [
        new
        for new, old in enumerate(kept)
        if old in dense_blocks or (old + 1) % values["decoder_sparse_step"]
    ]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _attention_types(values: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """Write out GPT-Neo's [[types, repeats], ...] for the kept blocks."""
    types = [
        kind for kinds, times in values["attention_types"] for _ in range(times) for kind in kinds
    ]
    return {
        "attention_types": [[[types[number]], 1] for number in kept],
        "attention_layers": [types[number] for number in kept],
    }


def _moe_layer_end_index(
    values: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """ERNIE: the last block that is a mixture; -1 is the last block of all."""
    last = values["moe_layer_end_index"] % count
    return {"moe_layer_end_index": sum(number <= last for number in kept) - 1}


def _num_kv_shared_layers(
    values: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """Gemma 3n: how many last blocks read the keys and values of earlier ones."""
    first = count - values["num_kv_shared_layers"]
    return {"num_kv_shared_layers": sum(number >= first for number in kept)}


def _block_types(values: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """RecurrentGemma: write out its repeated pattern of block types for the kept blocks."""
    pattern = list(values["block_types"])
    return {"block_types": [pattern[number % len(pattern)] for number in kept]}


_RULES: Mapping[str, Callable[[Mapping[str, Any], Sequence[int], int], dict[str, Any]]] = {
    "decoder_sparse_step": _decoder_sparse_step,
    "attention_types": _attention_types,
    "moe_layer_end_index": _moe_layer_end_index,
    "num_kv_shared_layers": _num_kv_shared_layers,
    "block_types": _block_types,
}


def _copy_weights(model: Any, small: Any, prefix: str, kept: Sequence[int], label: str) -> None:
    """Copy the weights of the kept blocks and of all outside the blocks.

    Raises `CellFailed` where a weight would be left over or left unset.
    """
    source, target = model.state_dict(), small.state_dict()
    old_names = {name: _old_name(name, prefix, kept) for name in target}
    for new, old in old_names.items():
        if old in source and source[old].shape == target[new].shape:
            continue
        problem = f"of shape {tuple(source[old].shape)}" if old in source else "missing"
        raise CellFailed(
            f"{label}: a {type(model).__name__} of blocks {list(kept)} has {new} of shape "
            f"{tuple(target[new].shape)}, and {old} is {problem} in the model that it is cut "
            "from: what a block is depends on its place; keep other blocks, or use "
            f"{alternative_to_depth(label)}"
        )
    count = len(named_blocks(model)[1])
    dropped = tuple(f"{prefix}.{number}." for number in range(count) if number not in kept)
    unused = source.keys() - set(old_names.values())
    lost = {name for name in unused if not name.startswith(dropped)}
    if lost:
        raise CellFailed(
            f"{label}: a {type(model).__name__} of blocks {list(kept)} has no place for "
            f"{min(lost)}; keep other blocks"
        )
    small.load_state_dict({new: source[old] for new, old in old_names.items()})


def _old_name(name: str, prefix: str, kept: Sequence[int]) -> str:
    """Return the name that a weight of the shorter model has in its base."""
    if not name.startswith(f"{prefix}."):
        return name
    number, dot, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{kept[int(number)]}{dot}{rest}" if number.isdigit() else name


def _refuse_changed(model: Any, small: Any, kept: Sequence[int], label: str) -> None:
    """Raise `CellFailed` where the shorter model is not its base with dropped blocks bypassed."""
    _, blocks = named_blocks(model)
    _, small_blocks = named_blocks(small)
    dropped = [number for number in range(len(blocks)) if number not in kept]
    counts = len(small_blocks), len(blocks)
    constants = {
        old: differing_constant(small_blocks[new], blocks[old], places=(new, old), counts=counts)
        for new, old in enumerate(kept)
    }
    differences = (f"of block {old}, {constant}" for old, constant in constants.items() if constant)
    difference = next(differences, "")
    if not difference:
        ids = probe_ids(model)
        base_updates = block_updates(model, ids, kept, bypassed_blocks(blocks, dropped))
        updates = block_updates(small, ids, range(len(kept)))
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        difference = first_difference(updates, base_updates, kept, dtype=dtype)
    if difference:
        raise CellFailed(
            f"{label}: {type(model).__name__} without its blocks {dropped} is not that model with "
            f"those blocks bypassed ({difference}): what a block does depends on its place; "
            f"keep other blocks, or use {alternative_to_depth(label)}"
        )
