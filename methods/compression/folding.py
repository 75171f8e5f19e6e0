"""Scales of a layer's inputs that cost nothing: the module before it takes their inverse.

Inputs of some layers come straight from a norm, or from another layer through operations that keep
factors of a channel: the values of an attention, and the `up` of a gated feed-forward. There
`W x = (W diag(s)) (diag(1/s) x)`, and the module before takes 1/s into its own weight, so that the
model computes the same. Where that holds is found by running the model, not by its name: with each
fold stood in for by factors at both ends, all blocks must give what they gave.

Legend: O outputs, I inputs of the layers that read (outputs of the module that writes).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.blocks import (
    block_updates,
    first_difference,
    masked_inputs,
    named_blocks,
    probe_ids,
    temporary_hooks,
)
from methods.compression.layers import Layers, names_without_numbers

# The layer that writes and the one that reads, where channels pass between them unmixed.
_PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))


@dataclass(frozen=True)
class Fold:
    """A module whose outputs, divided by a scale, are multiplied by it in the layers that read."""

    writer: str  # full name of a norm or a layer
    readers: tuple[str, ...]  # full names of layers
    heads: tuple[int, int] = (0, 0)  # of keys and of queries, where grouped queries read values

    def shared(self, of_inputs: Tensor) -> Tensor:
        """Return means (I,) over the inputs that must share a scale: those of one value head."""
        keys, queries = self.heads
        if keys == queries:
            return of_inputs
        by_head = of_inputs.view(keys, queries // keys, -1)
        return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()

    def of_outputs(self, scale: Tensor) -> Tensor:
        """Return the writer's scale, for a shared one of the readers' inputs (I,)."""
        keys, queries = self.heads
        return scale if keys == queries else scale.view(keys, queries // keys, -1)[:, 0].flatten()


def find_folds(model: Any, layers: Layers) -> dict[str, list[Fold]]:
    """Return the folds of each block, by its name, in the order of a forward pass.

    What a fold of one kind does is tried in all blocks together: kinds that change what a block
    computes are left out.
    """
    prefix, blocks = named_blocks(model)
    kinds: dict[tuple[str, ...], list[Fold]] = {}
    for fold in (*_norm_folds(model, layers), *_pair_folds(model, layers)):
        kinds.setdefault(tuple(names_without_numbers((fold.writer, *fold.readers))), []).append(
            fold
        )
    exact_folds = [
        fold for folds in kinds.values() if _keeps_blocks(model, folds) for fold in folds
    ]
    order = {name: position for position, name in enumerate(layers.linear)}
    exact_folds.sort(key=lambda fold: order[fold.readers[0]])
    names = [f"{prefix}.{number}" for number in range(len(blocks))]
    return {
        name: [fold for fold in exact_folds if fold.readers[0].startswith(f"{name}.")]
        for name in names
    }


def _norm_folds(model: Any, layers: Layers) -> Iterator[Fold]:
    """Yield the norms whose output tensor is the very input of layers, seen in one pass."""
    prefix, _ = named_blocks(model)
    outputs: list[tuple[Tensor, str]] = []
    readers: dict[str, list[str]] = {}

    def written(name: str) -> Any:
        return lambda module, inputs, output: outputs.append((output, name))

    def read(name: str) -> Any:
        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            for output, writer in outputs:
                if inputs and inputs[0] is output:
                    readers.setdefault(writer, []).append(name)

        return before

    handles = [
        module.register_forward_hook(written(name))
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.") and _is_norm(module)
    ]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(read(name)) for name in layers.linear
    ]
    with temporary_hooks(handles), torch.no_grad():
        model(input_ids=probe_ids(model), use_cache=False)
    for writer, names in readers.items():
        yield Fold(writer, tuple(names))


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module has one vector of weights, and perhaps one of biases."""
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    return shapes in ({"weight": 1}, {"weight": 1, "bias": 1})


def _pair_folds(model: Any, layers: Layers) -> Iterator[Fold]:
    """Yield pairs of layers by the names that they have in most decoders."""
    config = model.config.get_text_config()
    queries = int(getattr(config, "num_attention_heads", None) or 1)
    keys = int(getattr(config, "num_key_value_heads", None) or queries)
    for name, layer in layers.linear.items():
        parent, _, leaf = name.rpartition(".")
        for writer_leaf, reader_leaf in _PAIRS:
            reader = layers.linear.get(f"{parent}.{reader_leaf}")
            if leaf != writer_leaf or reader is None:
                continue
            outputs, inputs = layer.weight.shape[0], reader.weight.shape[1]
            heads = (keys, queries) if leaf == "v_proj" else (0, 0)
            if outputs * max(1, heads[1]) == inputs * max(1, heads[0]) and not inputs % max(
                1, heads[1]
            ):
                yield Fold(name, (f"{parent}.{reader_leaf}",), heads)


def _keeps_blocks(model: Any, folds: Sequence[Fold]) -> bool:
    """Tell whether all blocks compute the same with factors where these folds would be."""
    numbers = range(len(named_blocks(model)[1]))
    generator = torch.Generator().manual_seed(0)
    divisors: dict[Any, Tensor] = {}
    factors: dict[Any, Tensor] = {}
    norms = {fold.writer: fold for fold in folds if _is_norm(model.get_submodule(fold.writer))}
    if not all(_weight_multiplies(model.get_submodule(name)) for name in norms):
        return False
    for fold in folds:
        width = _inputs_of(model.get_submodule(fold.readers[0]))
        # powers of two change no digit of a product
        drawn = 2.0 ** torch.randint(-1, 2, (width,), generator=generator)
        scale = _first_of_shared(fold, drawn)
        divisors[model.get_submodule(fold.writer)] = fold.of_outputs(scale)
        factors |= {model.get_submodule(name): scale for name in fold.readers}
    plain = block_updates(model, probe_ids(model), numbers)
    scaled = block_updates(
        model, probe_ids(model), numbers, _divided_outputs(divisors), masked_inputs(factors)
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return not first_difference(scaled, plain, numbers, dtype=dtype)


def _first_of_shared(fold: Fold, drawn: Tensor) -> Tensor:
    """Return a scale (I,) that has the first value of each group of inputs that share one."""
    keys, queries = fold.heads
    if keys == queries:
        return drawn
    by_head = drawn.view(keys, queries // keys, -1)
    return by_head[:, :1].expand_as(by_head).flatten()


def _inputs_of(module: Any) -> int:
    """Return the number of inputs of a linear layer or a transposed one."""
    size = getattr(module, "in_features", None) or getattr(module, "nx", None)
    return int(size or module.weight.shape[-1])


def _weight_multiplies(norm: Any) -> bool:
    """Tell whether a norm's output follows its weight: Gemma's norms add 1 to theirs and fail."""
    width = int(norm.weight.shape[0])
    states = torch.linspace(-1, 1, width).view(1, 1, -1)
    weight, bias = torch.linspace(0.5, 1.5, width), torch.zeros(width)

    def output(factor: float) -> Tensor:
        values = {"weight": factor * weight, "bias": bias}
        own = {name: values[name] for name, _ in norm.named_parameters(recurse=False)}
        result: Tensor = torch.func.functional_call(norm, own, (states,))
        return result

    return bool(torch.allclose(output(2.0), 2 * output(1.0), rtol=1e-4, atol=1e-6))


def _divided_outputs(divisors: Mapping[Any, Tensor]) -> Any:
    """Return a context in which each module's outputs (..., O) are divided by its scale (O,)."""

    def hook(divisor: Tensor) -> Any:
        return lambda module, inputs, output: output / divisor.to(output.device, output.dtype)

    stack = ExitStack()
    for module, divisor in divisors.items():
        stack.enter_context(temporary_hooks([module.register_forward_hook(hook(divisor))]))
    return stack


def fold_scale(
    model: Any, layers: Mapping[str, Any], fold: Fold, scale: Tensor, *, dtype: torch.dtype
) -> None:
    """Divide the writer's outputs by a scale (I,) and multiply the readers' inputs by it, in place.

    A norm is saved in `dtype` as it is: it takes the value that this type holds, and the readers
    the factor that this is of the old one, so that saving makes no error.
    """
    writer = model.get_submodule(fold.writer)
    if fold.writer in layers:
        divisor = fold.of_outputs(scale)
        layers[fold.writer].weight.div_(divisor[:, None])
    else:
        old = writer.weight.float().clone()
        new = (old / scale).to(dtype).float()
        scale = torch.where(new == 0, 1.0, old / torch.where(new == 0, 1.0, new))
        divisor = scale
        writer.weight.copy_(torch.where(new == 0, old, new))
    if getattr(writer, "bias", None) is not None:
        writer.bias.div_(divisor)
    for name in fold.readers:
        layers[name].weight.mul_(scale)
