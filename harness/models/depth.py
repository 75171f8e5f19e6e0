"""Cuts in depth: the same decoder with fewer blocks, renumbered, and compared with the whole one
whose other blocks are bypassed.

What a configuration says of single blocks (layer types, mixtures only in some, windows) is carried
over by the block it is said of. What depends on a block's number in a way that no configuration can
say (DiffLlama's lambda) makes a cut another model: it is refused.
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

# settings that count blocks beside `num_hidden_layers` (xLSTM)
BLOCK_COUNT_SETTINGS = ("num_blocks", "num_layers", "n_layers", "n_layer")
# Settings that list block numbers; others that hold one entry a block are told by their length.
BLOCK_LIST_SETTINGS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "attention_layers_idx",
)
# Settings that hold for the blocks before a number (or from it on): how many of the kept ones stand
# before it is the new number.
FIRST_BLOCK_SETTINGS = (
    "first_k_dense_replace",
    "moe_layer_start_index",
    "num_dense_layers",
    "first_k_dense_layers",
    "num_hash_layers",
)


def with_blocks(model: Any, kept: Sequence[int], *, copy: bool = True, cut: str = "depth") -> Any:
    """Return a model of these blocks alone, in this order, renumbered (keys and values are cached
    by number); random without `copy`.

    Raises `CellFailed` naming the cut and what differs where that is not the model with its other
    blocks bypassed.
    """
    from transformers import AutoModelForCausalLM

    prefix, blocks = named_blocks(model)
    config = _shallower_config(model, kept, len(blocks), cut)
    try:
        small = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype)
    except Exception as problem:  # a configuration that its class does not take: whatever it raises
        raise CellFailed(
            f"{cut}: {type(model).__name__} cannot be built of blocks {list(kept)} of "
            f"{len(blocks)}: {in_one_line(problem)}"
        ) from problem
    if len(named_blocks(small)[1]) != len(kept):
        raise CellFailed(
            f"{cut}: {type(model).__name__} counts its blocks by another setting than "
            "num_hidden_layers and was built with "
            f"{len(named_blocks(small)[1])} for {len(kept)}; use {alternative_to_depth(cut)}"
        )
    small = small.to(next(model.parameters()).device).eval()
    if not copy:
        return small
    _copy_weights(model, small, prefix, kept, cut)
    _refuse_changed(model, small, kept, cut)
    return small


def alternative_to_depth(cut: str) -> str:
    """Name the cut in width that may be had in place of one in depth."""
    return (
        "prune-width"
        if cut.startswith("prune")
        else cut.replace("depth", "width").replace("scratch", "width")
    )


def _shallower_config(model: Any, kept: Sequence[int], count: int, cut: str) -> Any:
    text = model.config.get_text_config()
    if text.num_hidden_layers != count:
        raise CellFailed(
            f"{cut}: {type(model).__name__} has a list of {count} blocks and its configuration "
            f"says {text.num_hidden_layers}; none of them "
            "can be dropped here"
        )
    told = text.to_dict()
    changes: dict[str, Any] = {
        "num_hidden_layers": len(kept),
        **_per_block_settings(told, kept, count),
    }
    return edited_config(model.config, changes, tied=is_tied(model))


def _per_block_settings(told: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """Return those settings of a configuration that speak of single blocks, for the kept ones
    alone.
    """
    changes: dict[str, Any] = {}
    for name, value in told.items():
        if name in BLOCK_COUNT_SETTINGS and value == count:
            changes[name] = len(kept)
        elif name in FIRST_BLOCK_SETTINGS and isinstance(value, int):
            changes[name] = sum(at < value for at in kept)
        elif isinstance(value, list | tuple) and value:
            new = _renumbered_list(name, list(value), kept, count)
            changes.update({} if new is None else {name: new})
    for name, rule in _RULES.items():
        if told.get(name) is not None:
            changes.update(rule(told, kept, count))
    return changes


def _renumbered_list(
    name: str, value: list[Any], kept: Sequence[int], count: int
) -> list[Any] | None:
    """Return a list of block numbers, or of one entry a block, for the kept blocks; None for any
    other list.
    """
    numbers = all(type(one) is int and 0 <= one < count for one in value)
    if name in BLOCK_LIST_SETTINGS or (
        numbers and name.endswith(("layers_idx", "layer_idxs", "layer_ids", "layer_indices"))
    ):
        return [new for new, old in enumerate(kept) if old in value]
    return [value[at] for at in kept] if len(value) == count else None


def _decoder_sparse_step(
    told: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """Every n-th block is a mixture (Qwen2-MoE's family): the dense ones are listed instead."""
    only = told.get("mlp_only_layers") or []
    dense = [
        new
        for new, old in enumerate(kept)
        if old in only or (old + 1) % told["decoder_sparse_step"]
    ]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _attention_types(told: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """GPT-Neo: [[kinds, how often], ...], spelt out."""
    every = [
        kind for kinds, times in told["attention_types"] for _ in range(times) for kind in kinds
    ]
    return {
        "attention_types": [[[every[at]], 1] for at in kept],
        "attention_layers": [every[at] for at in kept],
    }


def _moe_layer_end_index(
    told: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """ERNIE: mixtures up to a number, that one among them; -1 is the last block."""
    end = told["moe_layer_end_index"] % count
    return {"moe_layer_end_index": sum(at <= end for at in kept) - 1}


def _num_kv_shared_layers(
    told: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """Gemma 3n: the last blocks read the keys and values of earlier ones."""
    first = count - told["num_kv_shared_layers"]
    return {"num_kv_shared_layers": sum(at >= first for at in kept)}


def _block_types(told: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """RecurrentGemma: a pattern of block types, repeated; spelt out."""
    kinds = list(told["block_types"])
    return {"block_types": [kinds[at % len(kinds)] for at in kept]}


_RULES: Mapping[str, Callable[[Mapping[str, Any], Sequence[int], int], dict[str, Any]]] = {
    "decoder_sparse_step": _decoder_sparse_step,
    "attention_types": _attention_types,
    "moe_layer_end_index": _moe_layer_end_index,
    "num_kv_shared_layers": _num_kv_shared_layers,
    "block_types": _block_types,
}


def _copy_weights(model: Any, small: Any, prefix: str, kept: Sequence[int], cut: str) -> None:
    """Copy every weight of the kept blocks and of what stands around them; refuses weights that
    would be lost or made up.
    """
    source, wanted = model.state_dict(), small.state_dict()
    renamed = {name: _old_name(name, prefix, kept) for name in wanted}
    odd = next(
        (
            new
            for new, old in renamed.items()
            if old not in source or source[old].shape != wanted[new].shape
        ),
        None,
    )
    if odd:
        there = (
            f"of shape {tuple(source[renamed[odd]].shape)}" if renamed[odd] in source else "missing"
        )
        raise CellFailed(
            f"{cut}: a {type(model).__name__} of blocks {list(kept)} has {odd} of shape "
            f"{tuple(wanted[odd].shape)}, and {renamed[odd]} is "
            f"{there} in the model that it is cut from: what a block is depends on its place; keep "
            f"other blocks, or use {alternative_to_depth(cut)}"
        )
    dropped = tuple(
        f"{prefix}.{at}." for at in range(len(named_blocks(model)[1])) if at not in kept
    )
    lost = {name for name in source.keys() - set(renamed.values()) if not name.startswith(dropped)}
    if lost:
        raise CellFailed(
            f"{cut}: a {type(model).__name__} of blocks {list(kept)} has no place for {min(lost)}; "
            "keep other blocks"
        )
    small.load_state_dict({new: source[old] for new, old in renamed.items()})


def _old_name(name: str, prefix: str, kept: Sequence[int]) -> str:
    if not name.startswith(f"{prefix}."):
        return name
    number, dot, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{kept[int(number)]}{dot}{rest}" if number.isdigit() else name


def _refuse_changed(model: Any, small: Any, kept: Sequence[int], cut: str) -> None:
    _, before = named_blocks(model)
    _, after = named_blocks(small)
    dropped = [at for at in range(len(before)) if at not in kept]
    told = ""
    for new, old in enumerate(kept):
        said = differing_constant(
            after[new], before[old], places=(new, old), counts=(len(after), len(before))
        )
        told = told or (f"of block {old}, {said}" if said else "")
    if not told:
        ids = probe_ids(model)
        base = block_updates(model, ids, kept, bypassed_blocks(before, dropped))
        ours = block_updates(small, ids, range(len(kept)))
        told = first_difference(
            ours, base, kept, dtype=str(next(model.parameters()).dtype).removeprefix("torch.")
        )
    if told:
        raise CellFailed(
            f"{cut}: {type(model).__name__} without its blocks {dropped} is not that model with "
            f"those blocks bypassed ({told}): what a block does depends on its place; "
            f"keep other blocks, or use {alternative_to_depth(cut)}"
        )
