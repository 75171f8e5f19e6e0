"""A stand-in for CUDA graphs: a tape of operations, played again on the very same tensors.

Like a graph it leaves nothing changed when it has recorded, holds every Python number of that
moment, writes its results to where they were, and refuses what makes the host wait or send
(`item`, `nonzero`, a tensor made of Python's numbers). It says nothing about streams, memory pools
and speed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `item` by both of its names: in inference mode it is not taken apart
_WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::unique",
    "aten::masked_select",
)


class Tape(TorchDispatchMode):
    """Records the operations of a `with` block; what they changed is as before when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._changed: list[tuple[torch.Tensor, torch.Tensor]] = []  # with what was in it before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, function.name()
        sends = name.startswith("aten::lift_fresh") and args[0].dim() > 0
        if name.startswith(_WAITS) or sends:
            raise RuntimeError(f"operation not permitted when stream is capturing ({name})")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._changed += [
                    (tensor, tensor.clone())
                    for tensor in tree_leaves(value)
                    if isinstance(tensor, torch.Tensor)
                ]
        result = function(*args, **kwargs)
        self._calls.append((function, args, kwargs, result))
        return result

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        for tensor, before in reversed(self._changed):
            tensor.copy_(before)
        self._changed = []

    def replay(self) -> None:
        """Run the operations again; each result goes to where it was."""
        for function, args, kwargs, result in self._calls:
            again = function(*args, **kwargs)
            for kept, fresh in zip(tree_leaves(result), tree_leaves(again), strict=True):
                is_tensor = isinstance(kept, torch.Tensor) and kept.numel() > 0
                if is_tensor and not torch._C._is_alias_of(kept, fresh):
                    kept.copy_(fresh)


def capture_on_tape(work: Callable[[], None]) -> Callable[[], None]:
    """Record work, and return what does it: `capture_on_cuda` on a machine without a GPU."""
    tape = Tape()
    with tape:
        work()
    return tape.replay
