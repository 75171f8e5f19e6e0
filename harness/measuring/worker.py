"""The process that holds one model and times it when it is told to: `python -P -m
harness.measuring.worker JOB.json`.

Its parent (`harness/measuring/measure.py`) asks by lines of JSON on standard input, one at a time,
and waits; between two questions this process does nothing. Nothing else is imported here than what
opening and running the model needs: the memory before the model is opened is the baseline that the
model's own memory is counted from.

A timed run: fixed token ids, a prefill, then forced greedy steps without EOS, logits of one
position, a fresh cache.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.machine.memory import baseline_bytes, process_bytes, synchronise
from harness.machine.memory import reset_peak as reset_peak
from harness.machine.process import end_with_parent
from harness.measuring.scenario import MIN_WARMUP_SECONDS, Scenario
from harness.models.checkpoint import model_class
from harness.models.states import cache_arguments, cache_tensors, forward_arguments

WARMUP_RUNS = (3, 12)  # full-length runs: at least, at most
WARMUP_TOLERANCE = 0.05  # two warm-ups in a row within this share of each other: stable


@dataclass(frozen=True, kw_only=True)
class TimingJob:
    """Which model to hold, and how."""

    path: str
    device: str
    dtype: str
    threads: int
    vocabulary: int  # ids are drawn below it: the smallest of the compared models'
    # module:function applied to the opened model (a wrapper of one's own, a compiled form)
    wrap: str = ""


def main(argv: Sequence[str]) -> int:
    """Answer the parent's questions until it closes the line."""
    job = TimingJob(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    end_with_parent(int(argv[2]))
    import torch
    import transformers  # noqa: F401  before the baseline

    import harness.models.packed  # noqa: F401  the formats of our own students

    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    held = TimingWorker(job)
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        name = question.pop("do")
        try:
            answer = getattr(held, name)(**question)
        except Exception as problem:  # noqa: BLE001  told to the parent in one line, which decides
            traceback.print_exc()
            answer = {
                "failed": f"{type(problem).__name__}: "
                f"{str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
            }
        answers.write(json.dumps(answer) + "\n")
    return 0


class TimingWorker:
    """The model of this process and what can be asked about it."""

    def __init__(self, job: TimingJob) -> None:
        self.job = job
        self.model: Any = None
        self.baseline: dict[str, int] = {}

    def open(self) -> dict[str, Any]:
        """Open the model; return the seconds (imports not counted) and what loading lifted the
        memory by.
        """
        import torch

        exercised = preload_libraries(self.job)
        opens = model_class(Path(self.job.path))
        self.baseline = baseline_bytes(self.job.device)
        began = time.perf_counter()
        self.model = opens.from_pretrained(self.job.path, dtype=getattr(torch, self.job.dtype))
        self.model.to(self.job.device).eval()
        if self.job.wrap:
            module, _, function = self.job.wrap.partition(":")
            self.model = getattr(importlib.import_module(module), function)(self.model)
        synchronise(self.job.device)
        return {
            "seconds": time.perf_counter() - began,
            "peak": self._peaks(),
            "exercised": exercised,
        }

    def warm(self, scenario: dict[str, int], visit_seconds: float) -> dict[str, Any]:
        """Run at full length until two runs in a row agree; return the seconds of each, the first
        among them.
        """
        asked = Scenario(**scenario)
        seconds: list[float] = []
        first: list[float] = []
        while True:
            stamps = self._run(asked)
            first.append(stamps[1] - stamps[0])
            seconds.append(stamps[-1] - stamps[0])
            steady = (
                len(seconds) > 1
                and abs(seconds[-1] - seconds[-2]) <= WARMUP_TOLERANCE * seconds[-1]
            )
            enough = len(seconds) >= WARMUP_RUNS[0] and sum(seconds) >= MIN_WARMUP_SECONDS
            tried = len(seconds) >= WARMUP_RUNS[1] or sum(seconds) > 10 * MIN_WARMUP_SECONDS
            if enough and (steady or tried):
                break
        runs = max(1, min(50, math.ceil(visit_seconds / min(seconds[1:]))))
        prefills = max(0, min(50, math.ceil(0.25 * visit_seconds / min(first[1:])) - runs))
        return {"seconds": seconds, "runs": runs, "prefills": prefills}

    def visit(self, scenario: dict[str, int], runs: int, prefills: int) -> dict[str, Any]:
        """Time forced runs, then prefills alone, with the garbage collector off; return the stamps
        of each, in seconds from its start.

        A prefill is so much shorter than a run that a visit without more of them would time it too
        seldom.
        """
        asked = Scenario(**scenario)
        ids = self._ids(asked)
        gc.collect()
        gc.disable()
        try:
            lengths = [asked.new_tokens] * runs + [1] * prefills
            found = [token_times(self.model, ids, length, self.job.device) for length in lengths]
        finally:
            gc.enable()
        return {"stamps": [[stamp - stamps[0] for stamp in stamps] for stamps in found]}

    def weigh(self, scenario: dict[str, int]) -> dict[str, Any]:
        """Count weights and cache by their storages, and measure the peak of a prefill and of a
        whole run; all in bytes.
        """
        import torch

        asked = Scenario(**scenario)
        ids = self._ids(asked)
        on_gpu = self.job.device.startswith("cuda")
        peaks: dict[str, Any] = {}
        kv = None
        for phase, new_tokens in (("prefill", 1), ("decode", asked.new_tokens)):
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            resets = on_gpu or reset_peak()
            out = generate_greedily(self.model, ids, new_tokens)
            synchronise(self.job.device)
            peaks[phase] = self._peaks() if resets else None
            kv = cache_bytes(out)
            del out
        return {
            "weights": resident_bytes(self.model),
            "kv": kv,
            "peaks": peaks,
            "kv_tokens": asked.prompt_tokens + asked.new_tokens - 1,
        }

    def _peaks(self) -> dict[str, int] | None:
        """Return the peak above the baseline: what tensors took and what the allocator reserved, or
        the process's memory.
        """
        if self.job.device.startswith("cuda"):
            import torch

            now = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
        else:
            peak = process_bytes("VmHWM")
            if peak is None:
                return None
            now = {"resident": peak}
        return {kind: max(0, value - self.baseline[kind]) for kind, value in now.items()}

    def _ids(self, scenario: Scenario) -> Any:
        import torch

        draw = random.Random(0)
        rows = [
            [draw.randrange(self.job.vocabulary) for _ in range(scenario.prompt_tokens)]
            for _ in range(scenario.batch)
        ]
        return torch.tensor(rows, device=self.job.device)

    def _run(self, scenario: Scenario) -> list[float]:
        return token_times(self.model, self._ids(scenario), scenario.new_tokens, self.job.device)


def preload_libraries(job: TimingJob) -> bool:
    """Save, open and run one block of the same architecture, so that what libraries load and
    reserve is in the baseline.

    The imports of a model's code, thread pools and kernels' scratch space belong to no model;
    without this they would stand as the activations of the first. False where the architecture
    cannot be cut so: then they do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # an architecture that cannot be cut so: no harm
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(job.path)
        inner = config.get_text_config()
        if hasattr(config, "quantization_config"):  # the block is tried in floats
            del config.quantization_config
        inner.num_hidden_layers, inner.vocab_size, inner.pad_token_id, inner.bos_token_id = (
            1,
            64,
            None,
            None,
        )
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[:1]
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job.dtype))
        generate_greedily(
            model.to(job.device).eval(),
            torch.zeros((1, 32), dtype=torch.long, device=job.device),
            3,
        )
        synchronise(job.device)
        return True
    return False


def generate_greedily(
    model: Any, ids_BT: Any, new_tokens: int, stamp: Callable[[], None] = lambda: None
) -> Any:
    """Read the prompts and write `new_tokens` greedy tokens whatever they are; return the last
    output, its cache inside.

    `stamp` is called before the first forward pass and after each token is chosen. A model that
    hands no cache back reads the whole text at every step, as the scorer lets it.
    """
    import torch

    names = forward_arguments(model)
    settings = {
        name: value
        for name, value in (("use_cache", True), ("logits_to_keep", 1))
        if names is None or {name, "kwargs"} & names
    }
    with torch.inference_mode():
        stamp()
        out = model(input_ids=ids_BT, **settings)
        chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        stamp()
        for _ in range(new_tokens - 1):
            held = cache_arguments(out, names)
            if not held:
                ids_BT = torch.cat([ids_BT, chosen], dim=1)
            out = model(input_ids=chosen if held else ids_BT, **held, **settings)
            chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            stamp()
    return out


def token_times(model: Any, ids_BT: Any, new_tokens: int, device: str) -> list[float]:
    """Return the time of the start and of each token, in seconds: by the CPU's steady clock, or by
    events on the GPU.

    On a GPU the events are read after one synchronisation at the end: none inside the run.
    """
    if not device.startswith("cuda"):
        clock: list[int] = []
        generate_greedily(model, ids_BT, new_tokens, lambda: clock.append(time.perf_counter_ns()))
        return [stamp / 1e9 for stamp in clock]
    import torch

    events: list[Any] = []

    def record() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)

    torch.cuda.synchronize()
    generate_greedily(model, ids_BT, new_tokens, record)
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) / 1000 for event in events]


def _storages_of(tensor: Any) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of the storages behind a tensor; packed tensors consist of several
    (values, scales, zeros).
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _storages_of(getattr(tensor, name))
    else:
        yield from _attached_storages(tensor)
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def _attached_storages(tensor: Any) -> Iterator[tuple[int, int]]:
    """Yield what bitsandbytes hangs on its parameters as attributes, which no list of parameters or
    buffers names.
    """
    state = getattr(tensor, "quant_state", None)
    beside = [getattr(tensor, "SCB", None)]
    while state is not None:
        beside += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    for one in beside:
        if hasattr(one, "untyped_storage"):
            yield from _storages_of(one)


def _unique_bytes(tensors: Iterator[Any]) -> int:
    found = dict(pair for tensor in tensors for pair in _storages_of(tensor))
    return sum(found.values())


def resident_bytes(model: Any) -> int:
    """Sum the bytes of a model's parameters and buffers, each storage once (tied weights count
    once), and of what kernels hold beside.
    """
    beside = sum(int(getattr(module, "kernel_bytes", 0)) for module in model.modules())
    return beside + _unique_bytes(
        tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors
    )


def cache_bytes(out: Any) -> int | None:
    """Sum the bytes of all that stands in the cache behind an output, each storage once; None where
    there is none.

    A layer's own count of its tokens, a single integer, is no part of them.
    """
    tensors = cache_tensors(list(cache_arguments(out, None).values()))
    held = [one for one in tensors if one.numel() > 1 or one.is_floating_point()]
    return _unique_bytes(iter(held)) if held else None


def job_json(job: TimingJob) -> str:
    """Return a job as its process reads it."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
