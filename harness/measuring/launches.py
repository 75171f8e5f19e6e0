"""How long a GPU works while a model runs: its kernels' time, without the waits between launches.

Where it works for a small share of the time, the time is that of Python and not of the model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def busy_seconds(work: Callable[[], Any]) -> float | None:
    """Return the seconds in which the GPU computes while work runs; None if nothing tells.

    By the start and end of each kernel, as the driver reports them (CUPTI).
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=both) as profiler:
        work()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return covered(spans) / 1e6 if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that spans cover together; where they overlap it counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy_shares(
    busy: Callable[[int], float | None], seconds: Callable[[int], list[float]], tokens: int
) -> Mapping[str, float | None]:
    """Return the shares of prefill and decoding in which the GPU computes; None if nothing tells.

    `busy` and `seconds` run a prompt with so many new tokens: the first returns the GPU's seconds,
    the second the times of start and tokens, without whatever watches the first.
    """
    prefill, both = busy(1), busy(tokens)
    if prefill is None or both is None:
        return {"prefill": None, "decode": None}
    times = seconds(tokens)
    return {
        "prefill": min(1.0, prefill / (times[1] - times[0])),
        "decode": min(1.0, max(0.0, both - prefill) / (times[-1] - times[1])),
    }
