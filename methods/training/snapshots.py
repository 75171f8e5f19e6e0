"""A training's state as copies in the processor's memory, and a thread that writes such copies.

A GPU need not wait for a disk: what `accelerator.save_state` would write is copied at the step, and
training goes on. The files are those that accelerate itself writes and reads.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.machine.memory import free_bytes

KEPT_FREE = 0.1  # of what is free of the processor's memory: other processes grow as well


def writes_in_background(device: torch.device) -> bool:
    """Tell whether states are written beside the training: on a GPU.

    On a processor copies would take the training's own memory, and writing its own cores.
    """
    return bool(device.type == "cuda")


class _KeptOptimizer(NamedTuple):
    """What accelerate asks an optimizer for when it saves it."""

    kept: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the copy of the optimizer's state."""
        return self.kept


class Snapshot:
    """The models, optimizers and random states of an accelerator at one moment."""

    def __init__(self, accelerator: Any, folder: Path) -> None:
        """Copy them; `folder` is a new one, in which they will be written."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        self.accelerator, self.folder = accelerator, folder
        self.weights = [
            OrderedDict(_copied(accelerator.get_state_dict(model, unwrap=False), copies))
            for model in accelerator._models
        ]
        self.optimizers = [
            _KeptOptimizer(_copied(optimizer.state_dict(), copies))
            for optimizer in accelerator._optimizers
        ]
        folder.mkdir(parents=True)
        self._save([], [])
        self.random_states = {path: path.read_bytes() for path in folder.iterdir()}

    def write(self) -> None:
        """Write the copies into the folder."""
        self._save(self.weights, self.optimizers)
        for path, random_state in self.random_states.items():  # that of the moment, not of now
            path.write_bytes(random_state)

    def _save(self, weights: list[Any], optimizers: list[Any]) -> None:
        from accelerate.checkpointing import save_accelerator_state

        accelerator = self.accelerator
        save_accelerator_state(
            str(self.folder),
            weights,
            optimizers,
            [],
            [],
            accelerator.process_index,
            accelerator.step,
            accelerator.scaler,
        )


def _copied(value: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """Return a value with copies of its tensors; tensors that share memory share their copy."""
    if is_traceable_wrapper_subclass(value):  # 8-bit moments: memory is that of their parts
        names, context = value.__tensor_flatten__()
        parts = {name: _copied(getattr(value, name), copies) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if isinstance(value, Tensor):
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in copies or not value.numel():
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(value, dict):
        return {key: _copied(element, copies) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(element, copies) for element in value)
    return value


def copies_fit(accelerator: Any) -> bool:
    """Tell whether the processor's memory has room for a copy of the state."""
    free = free_bytes("cpu")
    if free is None:
        return True
    parameters = {weight for model in accelerator._models for weight in model.parameters()}
    states = [optimizer.state_dict() for optimizer in accelerator._optimizers]
    return _tensor_bytes([*parameters]) + _tensor_bytes(states) <= (1 - KEPT_FREE) * free


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a value."""
    if is_traceable_wrapper_subclass(value):
        return _tensor_bytes([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    if isinstance(value, Tensor):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0


class BackgroundWriter:
    """Does one piece of writing at a time in a thread; its errors are raised where it is asked."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="training-state")
        self._writing: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Tell whether something is still being written; raise what the last writing raised."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._writing is not None

    def start(self, write: Callable[[], None]) -> None:
        """Write in the thread, after what is being written."""
        self.wait()
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until all is written; raise what writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait until all is written, and end the thread; errors were to be asked for before."""
        self._pool.shutdown(wait=True)
