"""A decoder's blocks: what they add to the states, and where two models' blocks differ.

Used wherever a student is cut out of another model. The cut is compared once with the model that it
was cut from, with the dropped blocks bypassed or the dropped channels masked. A block's *update* is
its output states minus its input states: it shows small changes that the residual stream would
hide. Legend: B sequences, T tokens, H width, I inputs of a layer.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import CellFailed

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBE_TOKENS = 24  # that two models are compared on
# Shares of an update's largest number. The same operations on the same numbers differ by less.
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
TOLERANCE_16_BIT = 0.05


def text_model_of(model: Any) -> tuple[str, Any]:
    """Return the name and the module of the text model.

    ("", the model) where the model has no part beside its text model.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return "", model
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return name, decoder if name else model


def named_blocks(model: Any) -> "tuple[str, nn.ModuleList]":
    """Return the name and the list of a decoder's blocks.

    That is the list of modules with most parameters in the text model, among those as long as the
    configuration says. Raises `CellFailed` if there is no list of modules.
    """
    from torch import Tensor, nn

    prefix, part = text_model_of(model)
    lists = {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    count = getattr(getattr(part, "config", None), "num_hidden_layers", None)
    lists = {name: module for name, module in lists.items() if len(module) == count} or lists
    if not lists:
        raise CellFailed(f"{type(model).__name__} has no list of blocks that is known here")
    weights = {name: sum(map(Tensor.numel, lists[name].parameters())) for name in lists}
    name = max(weights, key=lambda name: weights[name])
    return f"{prefix}.{name}" if prefix else name, lists[name]


def is_tied(model: Any) -> bool:
    """Tell whether an opened model's head and embedding share one matrix, as opened.

    The configuration may say otherwise.
    """
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def edited_config(config: Any, changes: Mapping[str, Any], *, tied: bool) -> Any:
    """Return a copy of a configuration with changes in its text part.

    `tied` replaces what the configuration says of the tie of head and embedding.
    """
    values = config.to_dict()
    text_config = config.get_text_config()
    text_values = (
        values
        if text_config is config
        else next(values[key] for key in values if getattr(config, key, None) is text_config)
    )
    text_values.update(
        {text_config.attribute_map.get(name, name): value for name, value in changes.items()}
    )
    for part in (values, text_values):
        if part.get("tie_word_embeddings", tied) != tied:
            part["tie_word_embeddings"] = tied
    return type(config).from_dict(values)


def probe_ids(model: Any) -> "Tensor":
    """Return token ids (1, T) spread over the vocabulary, without special tokens.

    Any text will do to compare two models that must compute the same.
    """
    import torch

    config = model.config.get_text_config()
    length = min(
        PROBE_TOKENS, int(getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    )
    special_ids = {
        value
        for name, value in vars(model.config).items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    stride = max(1, vocabulary // (length + 1))
    ids = [
        token if token not in special_ids else token + 1
        for token in ((3 + number * stride) % max(1, vocabulary - 1) for number in range(length))
    ]
    return torch.tensor([ids], device=next(model.parameters()).device)


@dataclass(frozen=True)
class BlockUpdates:
    """What each block added to the probe's states, (B, T, H) by block number, and the logits."""

    by_block: "Mapping[int, Tensor]"
    logits: "Tensor"


def input_states(positional: Sequence[Any], named: Mapping[str, Any]) -> "Tensor":
    """Return the hidden states among the arguments of a block's call."""
    states: Tensor = positional[0] if positional else named["hidden_states"]
    return states


def output_states(output: Any) -> "Tensor":
    """Return the hidden states in a block's output."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def temporary_hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove these hooks when the `with` block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bypassed_blocks(blocks: Sequence[Any], dropped: Collection[int]) -> Any:
    """Return a context in which the dropped blocks return their input states."""

    def return_input(block: Any, positional: Any, named: Any, output: Any) -> Any:
        states = input_states(positional, named)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return temporary_hooks(
        [blocks[number].register_forward_hook(return_input, with_kwargs=True) for number in dropped]
    )


def masked_inputs(masks: "Mapping[Any, Tensor]") -> Any:
    """Return a context in which each layer's inputs (..., I) are multiplied by its mask (I,)."""

    def hook(mask: "Tensor") -> Callable[..., Any]:
        return lambda layer, inputs: (
            inputs[0] * mask.to(inputs[0].device, inputs[0].dtype),
            *inputs[1:],
        )

    return temporary_hooks(
        [layer.register_forward_pre_hook(hook(mask)) for layer, mask in masks.items()]
    )


def block_updates(
    model: Any, ids: "Tensor", numbers: Collection[int], *contexts: Any
) -> BlockUpdates:
    """Run the probe within these contexts; return the logits and the numbered blocks' updates."""
    import torch

    _, blocks = named_blocks(model)
    updates: dict[int, Tensor] = {}

    def hook(number: int) -> Callable[..., None]:
        def keep_update(block: Any, positional: Any, named: Any, output: Any) -> None:
            before = input_states(positional, named).float()
            updates[number] = output_states(output).float() - before

        return keep_update

    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        handles = [
            blocks[number].register_forward_hook(hook(number), with_kwargs=True)
            for number in numbers
        ]
        stack.enter_context(temporary_hooks(handles))
        stack.enter_context(torch.no_grad())
        logits = model(input_ids=ids, use_cache=False).logits.float()
    return BlockUpdates(updates, logits)


def first_difference(
    student: BlockUpdates, base: BlockUpdates, kept: Sequence[int], *, dtype: str
) -> str:
    """Return where a student's updates differ from its base's, "" where they agree.

    The student's block i is the base's block `kept[i]`.
    """
    import torch

    pairs = [
        (f"block {base_number}", student.by_block[number], base.by_block[base_number])
        for number, base_number in enumerate(kept)
    ]
    for name, values, expected in [*pairs, ("the logits", student.logits, base.logits)]:
        if not bool(torch.isfinite(expected).all()):
            return f"{name} of the model that it is cut from is not finite"
        error = float((values - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
        if not error <= TOLERANCE.get(dtype, TOLERANCE_16_BIT):
            return f"{name} differs by {error:.2g} of its largest number"
    return ""


def differing_constant(
    block: Any, base_block: Any, *, places: tuple[int, int], counts: tuple[int, int]
) -> str:
    """Return which constant of a block differs from the block that it was made of, "" for none.

    A probe of a few tokens cannot show a window of thousands, so numbers, flags and buffers are
    compared too. A block's own number (`places`) and the number of blocks (`counts`) may differ;
    each is a pair (student, base).
    """
    import torch

    modules, base_modules = dict(block.named_modules()), dict(base_block.named_modules())
    for name in dict.fromkeys([*modules, *base_modules]):
        if type(modules.get(name)) is not type(base_modules.get(name)):
            kind, base_kind = _class_name(modules, name), _class_name(base_modules, name)
            return f"{name} is {kind} in the student and {base_kind} there"
        for key, value, base_value in _constants(modules[name], base_modules[name]):
            if value != base_value and (value, base_value) not in (places, counts):
                return f"{name or 'it'}.{key} is {value} in the student and {base_value} there"
    base_buffers = dict(base_block.named_buffers())
    for name, buffer in block.named_buffers():
        base_buffer = base_buffers.get(name)
        comparable = base_buffer is not None and buffer.shape == base_buffer.shape
        if comparable and not torch.equal(buffer, base_buffer):
            return f"{name} holds other numbers"
    return ""


def _class_name(modules: Mapping[str, Any], name: str) -> str:
    return type(modules[name]).__name__ if name in modules else "missing"


def _constants(module: Any, base_module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and both values of every public constant that two modules have."""
    values, base_values = vars(module), vars(base_module)
    for key in values.keys() & base_values.keys():
        pair = values[key], base_values[key]
        is_constant = all(isinstance(value, bool | int | float | str | None) for value in pair)
        if is_constant and not key.startswith("_"):
            yield key, *pair
