"""What a process holds in memory, as Linux reports it. No torch at import."""

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

from harness.errors import says_no_memory
from harness.machine.energy import NvmlReader


def synchronise(device: str) -> None:
    """Wait until the device has done everything asked of it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def return_freed_memory() -> None:
    """Return memory that the allocator holds and nobody uses to the system."""
    # a C library without malloc_trim keeps what it keeps
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Reset this process's peak of resident memory (VmHWM) to its current size; False if it fails.

    Freed memory that the allocator still holds is returned first, or the next run would reuse it
    and raise nothing.
    """
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def process_bytes(name: str) -> int | None:
    """Read VmRSS or VmHWM of this process in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def device_bytes(device: str) -> int:
    """Return the memory of a device in all: a GPU's own, or the machine's."""
    if device.startswith("cuda"):
        return _gpu_bytes(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu_bytes(device: str) -> int:
    """Return a GPU's memory: by NVML, which makes no CUDA context, else by torch."""
    loaded = sys.modules.get("torch")
    if loaded is None or not loaded.cuda.is_initialized():
        library = NvmlReader.open()
        total = library.memory_bytes() if library else None
        if total is not None:
            return total
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def free_bytes(device: str) -> int | None:
    """Return the free memory of the GPU or of the machine, None where it cannot be read.

    What torch's allocator keeps of a GPU and nobody uses is free, though the driver counts it as
    used: after a training that is most of it.
    """
    if device.startswith("cuda"):
        import torch

        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + kept)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None
    )


class CardMemory(NamedTuple):
    """Memory of a GPU in bytes, as its driver counts it: what another process may still take."""

    free: int
    total: int


def cards_memory(device: str) -> tuple[CardMemory, ...]:
    """Return the memory of every visible GPU, the device's own first; nothing for the CPU."""
    if not device.startswith("cuda"):
        return ()
    import torch

    cards = range(torch.cuda.device_count())
    return tuple(CardMemory(*map(int, torch.cuda.mem_get_info(card))) for card in cards)


def baseline_bytes(device: str) -> dict[str, int]:
    """Return what this process holds before the model, in bytes; 0 where the system does not tell.

    Memory that can be freed is freed first.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
    return_freed_memory()
    return {"resident": process_bytes("VmRSS") or 0}


def release_memory(device: str) -> None:
    """Free what models that are no longer used have left with the allocator.

    A card on which a kernel failed refuses this as everything else; whatever is computed next on
    it says so, and what needs no card goes on.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def is_out_of_memory(problem: BaseException) -> bool:
    """Tell whether an exception says that the device or the machine has no memory left."""
    return isinstance(problem, MemoryError) or (
        isinstance(problem, (RuntimeError, OSError)) and says_no_memory(str(problem))
    )
