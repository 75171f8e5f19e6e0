"""Counts what a device has to be waited for, on tensors that stand in for a GPU's."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Transfers(TorchDispatchMode):
    """Counts what makes a GPU's tensor known to the host: copies, single values, masks' indices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count it where the host learns values from it."""
        name = function.overloadpacket.__name__
        target = (kwargs or {}).get("device")
        to_host = name == "_to_copy" and target is not None and torch.device(target).type == "cpu"
        from_gpu = any(
            isinstance(argument, torch.Tensor) and argument.device.type in ("cuda", "meta")
            for argument in args
        )
        by_mask = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += from_gpu and (
            to_host or by_mask or name in ("_local_scalar_dense", "nonzero")
        )
        return function(*args, **(kwargs or {}))
