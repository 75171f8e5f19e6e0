"""The error for a model whose logits are NaN or infinite: it names the module where they begin."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel

if TYPE_CHECKING:
    import torch


class NonFiniteLogits(Exception):
    """The logits after a text are NaN or infinite.

    `non_finite_error` turns it into a message, once the model has its own attention back.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(f"a text of {len(ids)} tokens")
        self.ids = ids


def non_finite_error(opened: LanguageModel, ids: Sequence[int]) -> CellFailed:
    """Return the error for a text with NaN or infinite logits; runs it again to find the module."""
    module = first_non_finite_module(opened, ids)
    cause = (
        f"the first one is in the output of {module}"
        if module
        else "read alone, the text gives finite numbers"
    )
    dtype = str(opened.model.dtype).removeprefix("torch.")
    return CellFailed(
        f"{opened.checkpoint.name} answers a text of {len(ids)} tokens with NaN or infinity, "
        f"computed in {dtype}: {cause}; its weights are "
        "damaged, or its numbers are too large for this type: try --dtype float32"
    )


def first_non_finite_module(opened: LanguageModel, ids: Sequence[int]) -> str:
    """Return the name of the first module to finish with an output that is not finite; "" if none.

    The model's own class is named where the module is the whole model.
    """
    import torch

    names: list[str] = []

    def hook_for(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensors = _float_tensors(output)
            if not names and any(not bool(torch.isfinite(tensor).all()) for tensor in tensors):
                names.append(name or type(module).__name__)

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in opened.model.named_modules():
            hooks.callback(module.register_forward_hook(hook_for(name)).remove)
        opened.model(input_ids=torch.tensor([list(ids)], device=opened.device))
    return names[0] if names else ""


def _float_tensors(output: Any) -> "list[torch.Tensor]":
    """Return the floating-point tensors in what a module returns."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    values = output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _float_tensors(value)]
