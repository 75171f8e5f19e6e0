"""What is said when a model's logits are not numbers: in which of its modules the first NaN or
infinity appears.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel

if TYPE_CHECKING:
    import torch


class NoNumber(Exception):
    """The logits behind a text are not numbers; `not_finite` tells it once the model has its own
    attention back.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(f"a text of {len(ids)} tokens")
        self.ids = ids


def not_finite(opened: LanguageModel, ids: Sequence[int]) -> CellFailed:
    """Return the error for a text whose logits are not all numbers; reads it once more, watching
    every module.
    """
    place = first_module(opened, ids)
    where = (
        f"the first stands in the output of {place}"
        if place
        else "read alone, the text gives numbers"
    )
    kind = str(opened.model.dtype).removeprefix("torch.")
    return CellFailed(
        f"{opened.checkpoint.name} answers a text of {len(ids)} tokens with NaN or infinity, "
        f"computed in {kind}: {where}; its weights are "
        "damaged, or its numbers are too large for this type: try --dtype float32"
    )


def first_module(opened: LanguageModel, ids: Sequence[int]) -> str:
    """Return the name of the first module, in the order of their ends, whose output is not finite;
    "" where all are.
    """
    import torch

    bad: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if not bad and any(not bool(torch.isfinite(part).all()) for part in _floats(output)):
                bad.append(name or type(module).__name__)

        return hook

    with ExitStack() as watching, torch.inference_mode():
        for name, module in opened.model.named_modules():
            watching.callback(module.register_forward_hook(watch(name)).remove)
        opened.model(input_ids=torch.tensor([list(ids)], device=opened.device))
    return bad[0] if bad else ""


def _floats(output: Any) -> "list[torch.Tensor]":
    """Return the tensors of floats in what a module returns."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = (
        output.values()
        if isinstance(output, dict)
        else output
        if isinstance(output, tuple | list)
        else ()
    )
    return [tensor for part in parts for tensor in _floats(part)]
