"""What a process holds in memory, as Linux tells it, and waiting for a device. No torch at import."""

import contextlib
import ctypes
from pathlib import Path


def synchronise(device: str) -> None:
    """Wait until the device has done everything asked of it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def trim() -> None:
    """Give memory that the allocator holds and nobody uses back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Set this process's peak resident memory (VmHWM) back to its current size; False where that cannot be done.

    Freed memory that the allocator still holds goes back to the system first, or the next run would lift nothing.
    """
    trim()
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
