"""Which layers of a model a compression method works on; every other weight is named, never
silently left out.

Layers are told by what they are: linear layers (`nn.Linear`, what is built on it, GPT-2's
transposed Conv1D) inside the text model, the token table, the head. A matrix that is none of these
(a mixture's fused experts) is an error that names all of its kind, unless a setting says to skip
them. What is no matrix of a linear layer (positions, norms, routers, convolutions, recurrent
states) is left alone.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.errors import CellFailed
from harness.models.blocks import is_tied, probe_ids, temporary_hooks, text_model_of


class TransposedLinear:
    """GPT-2's Conv1D seen as the linear layer that it is: the weight as (O, I), a view of its own
    (I, O).
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.in_features, self.out_features = (int(one) for one in module.weight.shape)

    @property
    def weight(self) -> Tensor:
        """The matrix, (O, I); what is written into it is written into the layer."""
        found: Tensor = self.module.weight.T
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@dataclass(frozen=True)
class Layers:
    """A decoder's weight matrices by the part that they play."""

    # inside the text model, in the order of a forward pass: nn.Linear, or what is seen as one
    linear: dict[str, Any]
    table: tuple[str, nn.Embedding]
    head: tuple[str, nn.Linear] | None  # None where the model has none
    tied: bool  # head and table are one matrix
    left: frozenset[str]  # modules that the patterns leave as they are
    # what no method here works on: positions, routers, convolutions, states; in short names
    alone: tuple[str, ...] = ()

    @property
    def told(self) -> dict[str, list[str]]:
        """What a record says of weights that stay as they are though nobody asked for it; nothing
        where there are none.
        """
        return {"left_alone": list(self.alone)} if self.alone else {}


def layers_of(model: Any, *, skip: Sequence[str] = (), method: str) -> Layers:
    """Sort a text model's matrices; `skip` are patterns (`*.down_proj`) of layers to leave as they
    are.

    Raises `CellFailed` naming every stranger in one setting to paste. Towers beside the text model
    are left alone.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    prefix, _ = text_model_of(model)
    linear: dict[str, Any] = {}
    known = {id(table.weight), *([id(head.weight)] if head is not None else [])}
    used, left = set(), set()
    for name, module in model.named_modules():
        matching = [pattern for pattern in skip if fnmatch.fnmatch(name, pattern)]
        used.update(matching)
        if matching or name.rpartition(".")[0] in left:  # and all below it
            left.add(name)
            known.update(id(parameter) for parameter in module.parameters())
        elif (
            module is not head
            and f"{name}.".startswith(f"{prefix}." if prefix else "")
            and (matrix := as_linear(module)) is not None
        ):
            linear[name] = matrix
            known.add(id(module.weight))
    unused = [pattern for pattern in skip if pattern not in used]
    if unused:
        raise CellFailed(
            f"{method}: ignore={unused[0]!r} matches no layer; names look like "
            f"{next(iter(linear), 'none')}"
        )
    others = [
        name
        for name, one in model.named_parameters()
        if id(one) not in known and f"{name}.".startswith(f"{prefix}." if prefix else "")
    ]
    strange = [name for name in others if is_unknown_matrix(model, name)]
    if strange:
        raise CellFailed(_unknown_matrices_message(model, strange, method))
    idle = uncalled_layers(model, linear)
    linear = {name: layer for name, layer in linear.items() if name not in idle}
    if not linear:
        raise CellFailed(f"{method}: no linear layer is left to work on")
    alone = [name for name in others if model.get_parameter(name).ndim >= 2] + [
        f"{name}.weight" for name in idle
    ]
    return Layers(
        linear,
        (names[id(table)], table),
        None if head is None else (names[id(head)], head),
        is_tied(model),
        frozenset(left),
        tuple(names_without_numbers(alone)),
    )


def as_linear(module: Any) -> Any:
    """Return a module as a linear layer with a weight (O, I); None for any other. Classes built on
    nn.Linear must compute what it does.
    """
    if isinstance(module, Conv1D):
        return TransposedLinear(module)
    if type(module) is nn.Linear:
        return module
    if not isinstance(module, nn.Linear) or {name for name, _ in module.named_parameters()} - {
        "weight",
        "bias",
    }:
        return None
    x = torch.linspace(
        -1, 1, 3 * module.in_features, dtype=module.weight.dtype, device=module.weight.device
    ).view(3, -1)
    try:
        with torch.no_grad():
            out, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
    except Exception:  # noqa: BLE001  it takes something else: no linear layer
        return None
    same = (
        isinstance(out, Tensor)
        and out.shape == expected.shape
        and torch.allclose(out.float(), expected.float(), rtol=1e-2, atol=1e-2)
    )
    return module if same else None


def is_unknown_matrix(model: Any, name: str) -> bool:
    """Tell whether a weight is a matrix that a method ought to work on and does not know: a
    mixture's fused experts, a class of its own.

    No matrices of a linear layer, and left alone: tables of positions, norms, convolutions,
    routers, states and mixing weights of recurrent layers (parameters that are nobody's `weight`).
    """
    owner_name, _, leaf = name.rpartition(".")
    owner, shape = (
        model.get_submodule(owner_name),
        [size for size in model.get_parameter(name).shape if size > 1],
    )
    if (
        len(shape) < 2
        or isinstance(owner, nn.Embedding | nn.modules.conv._ConvNd)
        or "norm" in type(owner).__name__.lower()
    ):
        return False
    if "proj" not in leaf and _ROUTER_NAME.search(
        f"{owner_name.rpartition('.')[2]} {type(owner).__name__} {leaf}".lower()
    ):
        return False
    return (
        len(shape) > 2
        or leaf == "weight"
        or "expert" in name
        or _MATRIX_NAME.search(leaf) is not None
    )


_MATRIX_NAME = re.compile(r"proj|^[wv]\d$")  # parameters of no layer that are matrices all the same
_ROUTER_NAME = re.compile(r"rout|gat(e|ing)\b|gate_|topk")


def names_without_numbers(names: Sequence[str]) -> list[str]:
    """Return names once each that differ in block numbers alone, a star in place of the number."""
    return list(
        dict.fromkeys(
            ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
        )
    )


def _unknown_matrices_message(model: Any, strange: Sequence[str], method: str) -> str:
    """Name every stranger, and the one setting that leaves them all as they are."""
    owners = [name.rpartition(".")[0] for name in strange]
    shorts = names_without_numbers(strange)
    patterns = names_without_numbers(owners)
    classes = ", ".join(
        dict.fromkeys(type(model.get_submodule(owner)).__name__ for owner in owners)
    )
    them = "it" if len(shorts) == 1 else "them"
    return (
        f"{method} does not know {', '.join(shorts)} ({classes}); leave {them} as floats with "
        f"--set {ignore_setting(method, patterns)}"
    )


def ignore_setting(method: str, patterns: Sequence[str]) -> str:
    """Return the setting that leaves layers as they are, to paste behind --set."""
    return (
        f"{method}.ignore={patterns[0]}"
        if len(patterns) == 1
        else f"'{method}.ignore={json.dumps(list(patterns))}'"
    )


def uncalled_layers(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """Return the layers that a forward pass does not go through: code beside them reads their
    weights (Mamba's time steps).

    Experts are called only where a router sends a token, and count as called.
    """
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with (
        temporary_hooks(
            [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
        ),
        torch.no_grad(),
    ):
        model(input_ids=probe_ids(model), use_cache=False)
    return [name for name in layers if name not in called and "expert" not in name]


def layers_below(layers: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the layers below a module, with their full names."""
    return ((name, layer) for name, layer in layers.items() if name.startswith(f"{prefix}."))
