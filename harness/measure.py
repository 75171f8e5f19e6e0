"""Times and weighs a model beside its base: same token ids, EOS off, rounds in the order base, student, student, base.

The seam of a later, more rigorous stopwatch: `measure` takes two opened models and returns measurements.
"""

import contextlib
import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint import weight_files
from harness.contract import Checkpoint, Progress
from harness.model import LanguageModel
from harness.record import Measurement, TaskScore


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One point of the grid: prompt length, forced output length, batch, rounds."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    rounds: int = 4
    warmup: int = 1

    def __str__(self) -> str:
        return f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens, batch {self.batch}"


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def time_once(opened: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
    """Return (prefill seconds, decode seconds) of one forced-length greedy run; EOS is ignored."""
    import torch

    ids = torch.tensor(prompts, device=opened.device)
    with torch.inference_mode():
        _synchronise(opened.device)
        began = time.perf_counter()
        out = opened.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        _synchronise(opened.device)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = opened.model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        _synchronise(opened.device)
        return first - began, time.perf_counter() - first


def measure(
    student: LanguageModel, base: LanguageModel, *, scenario: Scenario, scores: Sequence[TaskScore], progress: Callable[[Progress], None]
) -> tuple[Measurement, ...]:
    """Measure speed against the base in alternating rounds, bytes by count, and the peak of this process."""
    draw = random.Random(0)
    shared = min(int(model.model.config.vocab_size) for model in (student, base))
    prompts = [[draw.randrange(shared) for _ in range(scenario.prompt_tokens)] for _ in range(scenario.batch)]
    timings: dict[str, list[tuple[float, float]]] = {"student": [], "base": []}
    models = {"student": student, "base": base}
    for opened in models.values():
        for _ in range(scenario.warmup):
            time_once(opened, prompts, scenario.new_tokens)
    gc.collect()
    gc.disable()
    try:
        for done in range(scenario.rounds):
            for who in ("base", "student", "student", "base"):
                timings[who].append(time_once(models[who], prompts, scenario.new_tokens))
            progress(Progress(stage="measure", done=done + 1, total=scenario.rounds, unit="rounds"))
    finally:
        gc.enable()
    peak = peak_rise(student, prompts, scenario.new_tokens)
    return (
        *_speeds(timings, scenario),
        *_bytes(student),
        *([peak] if peak else []),
        *_per_problem(scores),
    )


def _speeds(timings: dict[str, list[tuple[float, float]]], scenario: Scenario) -> list[Measurement]:
    """Turn raw seconds into tokens per second and ratios to the base, one ratio a round."""
    found = []
    for index, name, tokens in ((0, "prefill", scenario.prompt_tokens), (1, "decode", scenario.new_tokens - 1)):
        seconds = {who: [pair[index] for pair in pairs] for who, pairs in timings.items()}
        speeds = [tokens * scenario.batch / one for one in seconds["student"]]
        found.append(
            Measurement(
                name=f"{name}_tokens_per_second", value=_median(speeds), unit="tokens/s", higher_is_better=True,
                values=tuple(speeds), condition=str(scenario),
            )
        )  # fmt: skip
        ratios = [
            (seconds["base"][at] + seconds["base"][at + 1]) / (seconds["student"][at] + seconds["student"][at + 1])
            for at in range(0, len(seconds["base"]), 2)
        ]
        geometric = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found.append(
            Measurement(
                name=f"{name}_speedup", value=geometric, unit="ratio", higher_is_better=True, values=tuple(ratios), condition=str(scenario)
            )
        )
    return found


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def resident_bytes(model: Any) -> int:
    """Sum the bytes of a model's parameters and buffers, each storage once (tied weights count once)."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def disk_bytes(checkpoint: Checkpoint) -> int:
    """Sum the bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in weight_files(checkpoint.path))


def _bytes(student: LanguageModel) -> list[Measurement]:
    return [
        Measurement(name="weight_bytes_disk", value=disk_bytes(student.checkpoint), unit="bytes", higher_is_better=False),
        Measurement(
            name="weight_bytes_resident", value=resident_bytes(student.model), unit="bytes", higher_is_better=False,
            condition=str(student.model.dtype).removeprefix("torch."),
        ),
    ]  # fmt: skip


def _per_problem(scores: Sequence[TaskScore]) -> list[Measurement]:
    """Seconds per problem of the scored run, batched as scored: natural answer lengths, so not a latency."""
    return [
        Measurement(name=f"seconds_per_problem:{score.task}", value=score.seconds / score.n, unit="s", higher_is_better=False)
        for score in scores
    ]


def reset_peak() -> bool:
    """Set this process's peak resident memory (VmHWM) back to its current size; False where that cannot be done.

    Freed memory that the allocator still holds goes back to the system first, or the next run would lift nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def process_bytes(field: str) -> int | None:
    """Read VmRSS or VmHWM of this process in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def peak_rise(opened: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> Measurement | None:
    """Measure how far one inference run lifts the peak above the model at rest: caches and activations."""
    if opened.device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_once(opened, prompts, new_tokens)
        rise: int | None = torch.cuda.max_memory_allocated() - before
    else:
        before_cpu = process_bytes("VmRSS") if reset_peak() else None
        time_once(opened, prompts, new_tokens)
        after = process_bytes("VmHWM")
        rise = None if before_cpu is None or after is None else max(0, after - before_cpu)
    if rise is None:
        return None
    return Measurement(name="inference_rise_bytes", value=rise, unit="bytes", higher_is_better=False)


def forward_flops_per_token(model: Any, length: float) -> float:
    """Count the FLOPs of one token's forward pass: 2 per weight outside the embedding, the head and attention included.

    Attention adds 4 * heads * head size * (length / 2) per block: scores and mixture over half the sequence on average.
    """
    config = model.config
    embeddings = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    body = sum(p.numel() for p in model.parameters() if id(p) not in embeddings and (head is None or p is not head.weight))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * width * length / 2
    return float(2 * body + 2 * config.hidden_size * config.vocab_size + attention)
