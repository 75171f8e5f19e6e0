"""A decoder's blocks: where they are, what each adds to the states that pass through, and whether
two models' blocks do the same.

Used wherever a student is cut out of another model: the cut is compared once with the model that it
was cut from, its dropped blocks bypassed or its dropped channels masked. A block's *step* is what
leaves it minus what enters it: small changes are seen there that the residual stream would hide.
Legend: B sequences, T tokens, H width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import CellFailed

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBE_TOKENS = 24  # tokens that two models are compared on
# of a step's largest number; the same operations on the same numbers differ by less
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
TOLERANCE_16_BIT = 0.05  # in types of 16 bits


def text_model_of(model: Any) -> tuple[str, Any]:
    """Return the name and the module of the text model; ("", the model itself) where it is nothing
    else.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return "", model
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return name, decoder if name else model


def named_blocks(model: Any) -> "tuple[str, nn.ModuleList]":
    """Return the name and the list of a decoder's blocks: its text model's heaviest list of
    modules, of the configured length if any.
    """
    from torch import nn

    prefix, part = text_model_of(model)
    lists = [
        (name, one)
        for name, one in part.named_modules()
        if isinstance(one, nn.ModuleList) and len(one)
    ]
    count = getattr(getattr(part, "config", None), "num_hidden_layers", None)
    lists = [pair for pair in lists if len(pair[1]) == count] or lists
    if not lists:
        raise CellFailed(f"{type(model).__name__} has no list of blocks that is known here")
    name, found = max(
        lists, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters())
    )
    return f"{prefix}.{name}" if prefix else name, found


def is_tied(model: Any) -> bool:
    """Tell whether the opened model's head and table are one matrix, whatever its configuration
    says.
    """
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def edited_config(config: Any, changes: Mapping[str, Any], *, tied: bool) -> Any:
    """Return a copy of a configuration with changes in its text part, saying of the tie of head and
    table what is so.
    """
    told = config.to_dict()
    text = config.get_text_config()
    inner = (
        told
        if text is config
        else next(told[key] for key in told if getattr(config, key, None) is text)
    )
    inner.update({text.attribute_map.get(name, name): value for name, value in changes.items()})
    for part in (told, inner):
        if part.get("tie_word_embeddings", tied) != tied:
            part["tie_word_embeddings"] = tied
    return type(config).from_dict(told)


def probe_ids(model: Any) -> "Tensor":
    """Return token ids (1, T) spread over the vocabulary: any text will do where two models must do
    the same.
    """
    import torch

    config = model.config.get_text_config()
    length = min(
        PROBE_TOKENS, int(getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    )
    special = {
        value
        for name, value in vars(model.config).items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    rows = int(model.get_input_embeddings().weight.shape[0])
    step = max(1, rows // (length + 1))
    ids = [
        at if at not in special else at + 1
        for at in ((3 + number * step) % max(1, rows - 1) for number in range(length))
    ]
    return torch.tensor([ids], device=next(model.parameters()).device)


@dataclass(frozen=True)
class BlockUpdates:
    """What each block added to the states of the probe, (B, T, H) by block number, and the
    logits.
    """

    by_block: "Mapping[int, Tensor]"
    logits: "Tensor"


def input_states(positional: Sequence[Any], named: Mapping[str, Any]) -> "Tensor":
    """Return the hidden states among what a block is handed."""
    found: Tensor = positional[0] if positional else named["hidden_states"]
    return found


def output_states(out: Any) -> "Tensor":
    """Return the hidden states in what a block gives."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def temporary_hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bypassed_blocks(blocks: Sequence[Any], dropped: Collection[int]) -> Any:
    """Return a context in which these blocks hand on what enters them."""

    def hand_on(block: Any, positional: Any, named: Any, out: Any) -> Any:
        before = input_states(positional, named)
        return (before, *out[1:]) if isinstance(out, tuple) else before

    return temporary_hooks(
        [blocks[at].register_forward_hook(hand_on, with_kwargs=True) for at in dropped]
    )


def masked_inputs(masks: "Mapping[Any, Tensor]") -> Any:
    """Return a context in which the inputs of some layers, (..., I), are multiplied by a mask (I,)
    each.
    """

    def hook(mask: "Tensor") -> Callable[..., Any]:
        return lambda layer, positional: (positional[0] * mask.to(positional[0]), *positional[1:])

    return temporary_hooks(
        [layer.register_forward_pre_hook(hook(mask)) for layer, mask in masks.items()]
    )


def block_updates(
    model: Any, ids: "Tensor", among: Collection[int], *contexts: Any
) -> BlockUpdates:
    """Run the probe within some contexts and keep the steps of these blocks."""
    import torch

    _, blocks = named_blocks(model)
    found: dict[int, Tensor] = {}

    def keep(at: int) -> Callable[..., None]:
        def after(block: Any, positional: Any, named: Any, out: Any) -> None:
            found[at] = output_states(out).float() - input_states(positional, named).float()

        return after

    with ExitStack() as stack:
        for one in contexts:
            stack.enter_context(one)
        stack.enter_context(
            temporary_hooks(
                [blocks[at].register_forward_hook(keep(at), with_kwargs=True) for at in among]
            )
        )
        stack.enter_context(torch.no_grad())
        logits = model(input_ids=ids, use_cache=False).logits.float()
    return BlockUpdates(found, logits)


def first_difference(
    student: BlockUpdates, base: BlockUpdates, kept: Sequence[int], *, dtype: str
) -> str:
    """Say where a student's steps are not those of the model that it was cut from (block `kept[i]`
    for the student's i); "" if nowhere.
    """
    import torch

    pairs = [
        (f"block {old}", student.by_block[new], base.by_block[old]) for new, old in enumerate(kept)
    ]
    for name, ours, theirs in [*pairs, ("the logits", student.logits, base.logits)]:
        if not bool(torch.isfinite(theirs).all()):
            return f"{name} of the model that it is cut from is not finite"
        gap = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-6)
        if not gap <= TOLERANCE.get(dtype, TOLERANCE_16_BIT):
            return f"{name} differs by {gap:.2g} of its largest number"
    return ""


def differing_constant(
    ours: Any, theirs: Any, *, places: tuple[int, int], counts: tuple[int, int]
) -> str:
    """Say which constant of a block is not that of the block that it was made of; "" if all are.

    A probe of a few tokens cannot see a window of thousands, so numbers, flags and buffers are
    compared too; a block's own number (`places`) and the number of blocks (`counts`) may differ.
    """
    import torch

    left, right = dict(ours.named_modules()), dict(theirs.named_modules())
    for name in [*left, *(one for one in right if one not in left)]:
        if name not in left or name not in right or type(left[name]) is not type(right[name]):
            return (
                f"{name} is {_class_of(left, name)} in the student and {_class_of(right, name)} "
                "there"
            )
        for key, mine, other in _constants(left[name], right[name]):
            if mine != other and (mine, other) not in (places, counts):
                return f"{name or 'it'}.{key} is {mine} in the student and {other} there"
    buffers = dict(theirs.named_buffers())
    odd = [
        name
        for name, one in ours.named_buffers()
        if name in buffers
        and one.shape == buffers[name].shape
        and not torch.equal(one, buffers[name])
    ]
    return f"{odd[0]} holds other numbers" if odd else ""


def _class_of(modules: Mapping[str, Any], name: str) -> str:
    return type(modules[name]).__name__ if name in modules else "missing"


def _constants(ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    mine, other = vars(ours), vars(theirs)
    for key in mine.keys() & other.keys():
        if not key.startswith("_") and all(
            isinstance(one, bool | int | float | str | type(None))
            for one in (mine[key], other[key])
        ):
            yield key, mine[key], other[key]
