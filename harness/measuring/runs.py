"""Timed runs: a prefill, then forced greedy steps without EOS, logits of one position.

A stamp is taken at the start and at each token. torch inside functions.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness.models.states import cache_arguments, decoding_options, forward_arguments

if TYPE_CHECKING:
    from harness.measuring.captured import StaticDecoder


def generate_greedily(
    model: Any, ids_BT: Any, new_tokens: int, stamp: Callable[[], None] = lambda: None
) -> Any:
    """Read the prompts and write `new_tokens` greedy tokens; return the last output with its cache.

    EOS does not end the writing. `stamp` is called before the first forward pass and after each
    token is chosen. A model that returns no cache reads the whole text at every step, as in
    scoring.
    """
    import torch

    names = forward_arguments(model)
    options = decoding_options(names)
    with torch.inference_mode():
        stamp()
        output = model(input_ids=ids_BT, **options)
        chosen = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        stamp()
        for _ in range(new_tokens - 1):
            cache = cache_arguments(output, names)
            if not cache:
                ids_BT = torch.cat([ids_BT, chosen], dim=1)
            output = model(input_ids=chosen if cache else ids_BT, **cache, **options)
            chosen = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            stamp()
    return output


def token_times(model: Any, ids_BT: Any, new_tokens: int, device: str) -> list[float]:
    """Return the time of the start and of each token, in seconds."""
    return _stamps(device, lambda stamp: generate_greedily(model, ids_BT, new_tokens, stamp))


def captured_times(decoder: "StaticDecoder", device: str) -> list[float]:
    """Return the time of the start and of each token of a captured decoding, in seconds."""
    import torch

    with torch.inference_mode():
        return _stamps(device, decoder.run)


def _stamps(device: str, run: Callable[[Callable[[], None]], Any]) -> list[float]:
    """Run something that calls a stamp at its start and at each token; return their times.

    By the CPU's steady clock, or by events on a GPU, which are read after one synchronisation at
    the end: none inside the run.
    """
    if not device.startswith("cuda"):
        nanoseconds: list[int] = []
        run(lambda: nanoseconds.append(time.perf_counter_ns()))
        return [reading / 1e9 for reading in nanoseconds]
    import torch

    events: list[Any] = []

    def record() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)

    torch.cuda.synchronize()
    run(record)
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) / 1000 for event in events]
