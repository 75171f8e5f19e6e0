"""Bytes of a model, of its cache, and of the peak of a run; each storage counts once.

torch inside functions.
"""

import gc
from collections.abc import Iterator, Mapping
from typing import Any

from harness.machine.memory import process_bytes, reset_peak, synchronise
from harness.measuring.runs import generate_greedily
from harness.models.states import cache_arguments, cache_tensors


def weigh_model(
    model: Any, ids_BT: Any, new_tokens: int, device: str, baseline: Mapping[str, int]
) -> dict[str, Any]:
    """Return the bytes of weights and cache, and the peaks of a prefill and of a full run.

    Peaks are above `baseline`, which the process held before the model.
    """
    import torch

    on_gpu = device.startswith("cuda")
    peaks: dict[str, Any] = {}
    kv = None
    for phase, written in (("prefill", 1), ("decode", new_tokens)):
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        has_fresh_peak = on_gpu or reset_peak()
        output = generate_greedily(model, ids_BT, written)
        synchronise(device)
        peaks[phase] = memory_peaks(device, baseline) if has_fresh_peak else None
        kv = cache_bytes(output)
        del output
    return {"weights": resident_bytes(model), "kv": kv, "peaks": peaks}


def memory_peaks(device: str, baseline: Mapping[str, int]) -> dict[str, int] | None:
    """Return the peak of memory above the baseline, in bytes; None where it cannot be read.

    On a GPU by what tensors took and what the allocator reserved, else by the process's memory.
    """
    if device.startswith("cuda"):
        import torch

        current = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    else:
        peak = process_bytes("VmHWM")
        if peak is None:
            return None
        current = {"resident": peak}
    return {kind: max(0, value - baseline[kind]) for kind, value in current.items()}


def _storages_of(tensor: Any) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of the storages of a tensor; a packed one has several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _storages_of(getattr(tensor, name))
    else:
        yield from _attached_storages(tensor)
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def _attached_storages(tensor: Any) -> Iterator[tuple[int, int]]:
    """Yield the storages that bitsandbytes attaches to its parameters as attributes.

    No list of parameters or buffers names them.
    """
    state = getattr(tensor, "quant_state", None)
    attached = [getattr(tensor, "SCB", None)]
    while state is not None:
        attached += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    for value in attached:
        if hasattr(value, "untyped_storage"):
            yield from _storages_of(value)


def _unique_bytes(tensors: Iterator[Any]) -> int:
    """Return the bytes of tensors' storages, each storage once."""
    storages = dict(pair for tensor in tensors for pair in _storages_of(tensor))
    return sum(storages.values())


def resident_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, and of kernels' copies of them.

    Each storage counts once, so tied weights do.
    """
    kernel_copies = sum(int(getattr(module, "kernel_bytes", 0)) for module in model.modules())
    return kernel_copies + _unique_bytes(
        tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors
    )


def cache_bytes(output: Any) -> int | None:
    """Return the bytes of an output's cache, each storage once; None without a cache.

    A single integer, which is a layer's count of its tokens, is left out.
    """
    tensors = cache_tensors(list(cache_arguments(output, None).values()))
    counted = [tensor for tensor in tensors if tensor.numel() > 1 or tensor.is_floating_point()]
    return _unique_bytes(iter(counted)) if counted else None
