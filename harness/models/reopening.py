"""Opens a saved student block by block and compares it with what was to be saved."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import CellFailed, in_one_line
from harness.models.blocks import is_tied
from harness.models.blockwise import BlockwiseModel, NotBlockwise
from harness.models.checkpoint import first_non_finite
from harness.models.packed import (
    equal_as_saved,
    packed_modules,
    refuse_changed_by_saving,
    refuse_wrong_layers,
)


def refuse_changed_blocks(
    folder: Path, state: Mapping[str, Tensor], *, name: str, dtype: torch.dtype, tied: bool
) -> None:
    """Open what was saved, and raise `CellFailed` where it differs from `state`.

    `state` may read a tensor when it is asked for it. Compared are all tensors and the tie of head
    and table; a packed student is run. A student that can only be opened whole is opened whole.
    """
    # Asked for fp16, a packed model would be opened in bf16, which rounds what is compared.
    open_dtype = torch.float32 if dtype == torch.float16 else dtype
    try:
        reopened = BlockwiseModel.of_folder(folder, device="cpu", dtype=open_dtype)
    except NotBlockwise:
        refuse_changed_by_saving(folder, state, name=name, dtype=dtype, tied=tied)
        return
    except Exception as problem:  # whatever its class raises
        raise CellFailed(
            f"{name}: the saved student cannot be opened again ({in_one_line(problem)})"
        ) from problem
    lost = next((key for key in state if key not in reopened.weights.weights), "")
    if lost:
        raise CellFailed(f"{name}: {lost} is lost when the saved student is opened again")
    for block in (*reopened.block_names(), ""):
        with reopened.holding(block):
            names = reopened.weights.names_below(block) if block else reopened.rest()
            _refuse_changed_part(reopened.state_of(names), state, name)
    if is_tied(reopened.model) != tied:
        raise CellFailed(
            f"{name}: head and table are {'one matrix' if tied else 'two'}, and not so when the "
            "saved student is opened again"
        )
    if packed_modules(reopened.model):
        refuse_wrong_layers(reopened.model, name)


def _refuse_changed_part(
    reopened: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str
) -> None:
    """Raise `CellFailed` where tensors of the opened student are others, or not finite."""
    for key, tensor in reopened.items():
        if key in state and not equal_as_saved(tensor, state[key]):
            raise CellFailed(
                f"{name}: {key} holds other numbers when the saved student is opened again"
            )
    non_finite = first_non_finite(reopened.items())
    if non_finite:
        raise CellFailed(
            f"{name}: the saved student holds a number that is not finite: {non_finite}"
        )
