"""Which layers of a model a compression method works on; every other weight is named, never silently left out.

Layers are told by their class: `nn.Linear` inside the blocks, the token table, the head. A matrix that belongs to neither (GPT-2's
transposed Conv1D, a mixture's fused experts) is an error that names it, unless a setting says to skip it.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.errors import CellFailed

_PRUNED = "pruned_weights_stay_zero"  # in config.json of what our pruning methods wrote
_MANY = 0.4  # share of exact zeros from which a matrix from elsewhere counts as pruned; a file of few bits, unpacked, has a tenth


def mark_pruned(config: Any) -> None:
    """Say in a model's configuration that its zeros are a mask; every later stage keeps them."""
    setattr(config, _PRUNED, True)


def zeros_of(config: Any, weight: Tensor) -> Tensor | None:
    """Return which weights of a matrix stay, as booleans, where its zeros are a mask; else None."""
    stays = weight != 0
    share = 1 - float(stays.float().mean())
    return stays if share >= _MANY or (share > 0 and getattr(config, _PRUNED, False)) else None


@dataclass(frozen=True)
class Layers:
    """A decoder's weight matrices by the part that they play."""

    linear: dict[str, nn.Linear]  # inside the blocks, in the order of a forward pass
    table: tuple[str, nn.Embedding]
    head: tuple[str, nn.Linear] | None  # None where the model has none
    tied: bool  # head and table are one matrix
    left: frozenset[str]  # modules that the patterns leave as they are


def layers_of(model: Any, *, skip: Sequence[str] = (), method: str) -> Layers:
    """Sort a model's matrices; `skip` are patterns (`*.down_proj`) of layers to leave as they are. Raises `CellFailed` naming strangers."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    linear: dict[str, nn.Linear] = {}
    known = {id(table.weight), *([id(head.weight)] if head is not None else [])}
    used, left = set(), set()
    for name, module in model.named_modules():
        matching = [pattern for pattern in skip if fnmatch.fnmatch(name, pattern)]
        used.update(matching)
        if matching or name.rpartition(".")[0] in left:  # and all below it
            left.add(name)
            known.update(id(parameter) for parameter in module.parameters())
        elif type(module) is nn.Linear and module is not head:
            linear[name] = module
            known.add(id(module.weight))
    unused = [pattern for pattern in skip if pattern not in used]
    if unused:
        raise CellFailed(f"{method}: skip={unused[0]!r} matches no layer; names look like {next(iter(linear), 'none')}")
    strange = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2 and id(parameter) not in known]
    if strange:
        owner = model.get_submodule(strange[0].rpartition(".")[0])
        raise CellFailed(
            f"{method} does not know the layer {strange[0]} ({type(owner).__name__}) and {len(strange) - 1} more; "
            f"leave them as they are with --set {method}.skip=*.{strange[0].split('.')[-2]}"
        )
    if not linear:
        raise CellFailed(f"{method}: no linear layer is left to work on")
    tied = head is not None and head.weight is table.weight
    return Layers(linear, (names[id(table)], table), None if head is None else (names[id(head)], head), tied, frozenset(left))


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a decoder's blocks: its longest list of modules that hold weights."""
    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one)]
    if not lists:
        raise CellFailed(f"{type(model).__name__} has no list of blocks that is known here")
    name, found = max(lists, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()))
    return name, found


def within(layers: dict[str, nn.Linear], prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers below a module, with their full names."""
    return ((name, layer) for name, layer in layers.items() if name.startswith(f"{prefix}."))
