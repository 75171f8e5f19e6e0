"""Which layers of a model a compression method works on; it says which weights it leaves alone.

Layers are recognised by what they compute: linear layers (`nn.Linear`, classes built on it, GPT-2's
transposed Conv1D) inside the text model, the token table, and the head. Any other matrix, such as
the fused experts of a mixture, is an error that names all of its kind, unless a setting says to
ignore them. Weights that are no matrix of a linear layer are left alone: positions, norms, routers,
convolutions, recurrent states.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.errors import CellFailed
from harness.models.blocks import is_tied, probe_ids, temporary_hooks, text_model_of

if TYPE_CHECKING:
    from harness.models.student_writers import StudentWriter


class TransposedLinear:
    """GPT-2's Conv1D as the linear layer that it is: the weight as (O, I), a view of its (I, O)."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.in_features, self.out_features = (int(size) for size in module.weight.shape)

    @property
    def weight(self) -> Tensor:
        """The matrix, (O, I); writing into it writes into the layer."""
        weight: Tensor = self.module.weight.T
        return weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@dataclass(frozen=True)
class Layers:
    """The weight matrices of a decoder by their parts in it."""

    # inside the text model, in the order of a forward pass: nn.Linear, or a `TransposedLinear`
    linear: dict[str, Any]
    table: tuple[str, nn.Embedding]
    head: tuple[str, nn.Linear] | None  # None where the model has none
    tied: bool  # head and table are one matrix
    ignored: frozenset[str]  # modules that the patterns of `ignore` match
    # matrices that no method works on: positions, routers, convolutions, states; numbers as stars
    left_alone: tuple[str, ...] = ()

    @property
    def notes(self) -> dict[str, list[str]]:
        """The record's note on weights that stay as they are though no setting asked for it."""
        return {"left_alone": list(self.left_alone)} if self.left_alone else {}


def layers_of(model: Any, *, ignore: Sequence[str] = (), method: str) -> Layers:
    """Sort the matrices of a text model; `ignore` holds patterns such as `*.down_proj`.

    What a pattern matches stays as it is, with all below it, and so does everything beside the text
    model. Raises `CellFailed` for a pattern that matches nothing, for a model without a layer to
    work on, and for unknown matrices: the message names all of them in one setting to paste.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    prefix, _ = text_model_of(model)
    text_prefix = f"{prefix}." if prefix else ""
    linear: dict[str, Any] = {}
    known_ids = {id(table.weight), *([id(head.weight)] if head is not None else [])}
    used_patterns: set[str] = set()
    ignored: set[str] = set()
    for name, module in model.named_modules():
        matching = [pattern for pattern in ignore if fnmatch.fnmatch(name, pattern)]
        used_patterns.update(matching)
        if matching or name.rpartition(".")[0] in ignored:
            ignored.add(name)
            known_ids.update(id(parameter) for parameter in module.parameters())
        elif (
            module is not head
            and f"{name}.".startswith(text_prefix)
            and (matrix := as_linear(module)) is not None
        ):
            linear[name] = matrix
            known_ids.add(id(module.weight))
    _refuse_unused_patterns(ignore, used_patterns, linear, method)
    other_names = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in known_ids and f"{name}.".startswith(text_prefix)
    ]
    unknown = [name for name in other_names if is_unknown_matrix(model, name)]
    if unknown:
        raise CellFailed(_unknown_matrices_message(model, unknown, method))
    uncalled = uncalled_layers(model, linear)
    linear = {name: layer for name, layer in linear.items() if name not in uncalled}
    if not linear:
        raise CellFailed(f"{method}: no linear layer is left to work on")
    left_alone = [name for name in other_names if model.get_parameter(name).ndim >= 2]
    left_alone += [f"{name}.weight" for name in uncalled]
    return Layers(
        linear,
        (names[id(table)], table),
        None if head is None else (names[id(head)], head),
        is_tied(model),
        frozenset(ignored),
        tuple(names_without_numbers(left_alone)),
    )


def _refuse_unused_patterns(
    ignore: Sequence[str], used: set[str], linear: Mapping[str, Any], method: str
) -> None:
    """Raise `CellFailed` for a pattern of `ignore` that matches no module."""
    unused = [pattern for pattern in ignore if pattern not in used]
    if unused:
        raise CellFailed(
            f"{method}: ignore={unused[0]!r} matches no layer; names look like "
            f"{next(iter(linear), 'none')}"
        )


def as_linear(module: Any) -> Any:
    """Return a module as a linear layer with a weight (O, I), or None where it is none.

    A class built on nn.Linear counts where it computes what nn.Linear does.
    """
    if isinstance(module, Conv1D):
        return TransposedLinear(module)
    if type(module) is nn.Linear:
        return module
    if not isinstance(module, nn.Linear):
        return None
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
        return None
    weights = {name: _numbers_of(weight) for name, weight in module.named_parameters()}
    weight = weights["weight"]
    inputs = torch.linspace(
        -1, 1, 3 * module.in_features, dtype=weight.dtype, device=weight.device
    ).view(3, -1)
    try:
        with torch.no_grad():
            output = torch.func.functional_call(module, weights, (inputs,))
            expected = nn.functional.linear(inputs, weight, weights.get("bias"))
    except Exception:  # noqa: BLE001  it needs other arguments: no linear layer
        return None
    same = (
        isinstance(output, Tensor)
        and output.shape == expected.shape
        and torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-2)
    )
    return module if same else None


def _numbers_of(weight: Tensor) -> Tensor:
    """Return a weight, or numbers in the place of one that is not in memory."""
    if weight.device.type != "meta":
        return weight
    return torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view(weight.shape)


def is_unknown_matrix(model: Any, name: str) -> bool:
    """Tell whether a weight is a matrix that a method should change but does not know.

    Examples are the fused experts of a mixture, or a linear layer of a class of its own. Left alone
    are tables of positions, norms, convolutions and routers, and states and mixing weights of
    recurrent layers, whose parameters have other names than `weight`.
    """
    owner_name, _, parameter_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    shape = [size for size in model.get_parameter(name).shape if size > 1]
    if len(shape) < 2 or isinstance(owner, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    if "norm" in type(owner).__name__.lower():
        return False
    words = f"{owner_name.rpartition('.')[2]} {type(owner).__name__} {parameter_name}".lower()
    if "proj" not in parameter_name and _ROUTER_NAME.search(words):
        return False
    return (
        len(shape) > 2
        or parameter_name == "weight"
        or "expert" in name
        or _MATRIX_NAME.search(parameter_name) is not None
    )


_MATRIX_NAME = re.compile(r"proj|^[wv]\d$")  # a parameter of no layer that is a matrix all the same
_ROUTER_NAME = re.compile(r"rout|gat(e|ing)\b|gate_|topk")


def names_without_numbers(names: Sequence[str]) -> list[str]:
    """Return names with stars for numbers, each once: one name for the same layer of all blocks."""
    return list(
        dict.fromkeys(
            ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
        )
    )


def _unknown_matrices_message(model: Any, unknown: Sequence[str], method: str) -> str:
    """Name all unknown matrices, and the one setting that leaves them as they are."""
    owners = [name.rpartition(".")[0] for name in unknown]
    names = names_without_numbers(unknown)
    classes = dict.fromkeys(type(model.get_submodule(owner)).__name__ for owner in owners)
    them = "it" if len(names) == 1 else "them"
    return (
        f"{method} does not know {', '.join(names)} ({', '.join(classes)}); leave {them} as floats "
        f"with --set {ignore_setting(method, names_without_numbers(owners))}"
    )


def ignore_setting(method: str, patterns: Sequence[str]) -> str:
    """Return the setting that leaves layers as they are, as it is typed behind --set."""
    return (
        f"{method}.ignore={patterns[0]}"
        if len(patterns) == 1
        else f"'{method}.ignore={json.dumps(list(patterns))}'"
    )


def uncalled_layers(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """Return the layers that a forward pass does not call.

    Other code reads their weights, as in Mamba's time steps. Experts count as called: they are only
    called where a router sends a token.
    """
    called: set[str] = set()

    def recorder(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    with temporary_hooks(handles), torch.no_grad():
        model(input_ids=probe_ids(model), use_cache=False)
    return [name for name in layers if name not in called and "expert" not in name]


def layers_below(layers: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the layers below a module, with their full names."""
    return ((name, layer) for name, layer in layers.items() if name.startswith(f"{prefix}."))


def blocks_of(
    layers: Mapping[str, Any], writer: "StudentWriter"
) -> Iterator[tuple[str, list[str]]]:
    """Yield each block that a writer reads and keeps at once, and the names of its layers."""
    for block, names in groupby(layers, key=writer.block_of):
        yield block, list(names)
