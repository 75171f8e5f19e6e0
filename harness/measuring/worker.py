"""The process that holds one model and times it: `python -P -m harness.measuring.worker JOB.json`.

Its parent (`harness/measuring/measure.py`) sends commands as lines of JSON on standard input, one
at a time, and waits; between two commands this process does nothing. Nothing is imported here
beyond what opening and running the model needs, because the memory before the model is opened is
the baseline of the model's own memory.

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

MIN_WARMUP_RUNS, MAX_WARMUP_RUNS = 3, 12  # of full length
WARMUP_TOLERANCE = 0.05  # stable: two runs in a row differ by no more than this share


@dataclass(frozen=True, kw_only=True)
class TimingJob:
    """Which model to time, and how."""

    path: str
    device: str
    dtype: str
    threads: int
    vocabulary: int  # token ids are below it: the smallest of the compared models'
    wrap: str = ""  # module:function applied to the opened model, as torch.compile


def main(argv: Sequence[str]) -> int:
    """Answer the parent's commands until it closes standard input."""
    job = TimingJob(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    end_with_parent(int(argv[2]))
    import torch
    import transformers  # noqa: F401  before the baseline

    import harness.models.packed  # noqa: F401  the formats of our own students

    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    timing_worker = TimingWorker(job)
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("do")
        try:
            answer = getattr(timing_worker, command)(**request)
        except Exception as problem:  # noqa: BLE001  the parent decides, and gets one line
            traceback.print_exc()
            first_line = next(iter(str(problem).strip().splitlines()), "")
            answer = {"failed": f"{type(problem).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")
    return 0


class TimingWorker:
    """The model of this process, and the parent's commands as methods."""

    def __init__(self, job: TimingJob) -> None:
        self.job = job
        self.model: Any = None
        self.baseline: dict[str, int] = {}

    def open(self) -> dict[str, Any]:
        """Open the model; return its seconds (without imports) and the peak of memory."""
        import torch

        libraries_loaded = preload_libraries(self.job)
        opener = model_class(Path(self.job.path))
        self.baseline = baseline_bytes(self.job.device)
        start = time.perf_counter()
        self.model = opener.from_pretrained(self.job.path, dtype=getattr(torch, self.job.dtype))
        self.model.to(self.job.device).eval()
        if self.job.wrap:
            module, _, function = self.job.wrap.partition(":")
            self.model = getattr(importlib.import_module(module), function)(self.model)
        synchronise(self.job.device)
        return {
            "seconds": time.perf_counter() - start,
            "peak": self._peaks(),
            "libraries_loaded": libraries_loaded,
        }

    def warm(self, scenario: dict[str, int], visit_seconds: float) -> dict[str, Any]:
        """Run at full length until two runs in a row agree; return the seconds of each run.

        `runs` and `prefills` are how many of each fill a visit of `visit_seconds`.
        """
        point = Scenario(**scenario)
        seconds: list[float] = []  # of each run
        prefill_seconds: list[float] = []
        while True:
            times = self._run(point)
            prefill_seconds.append(times[1] - times[0])
            seconds.append(times[-1] - times[0])
            if _is_warm(seconds):
                break
        runs = max(1, min(50, math.ceil(visit_seconds / min(seconds[1:]))))
        prefills = math.ceil(0.25 * visit_seconds / min(prefill_seconds[1:])) - runs
        return {"seconds": seconds, "runs": runs, "prefills": max(0, min(50, prefills))}

    def visit(self, scenario: dict[str, int], runs: int, prefills: int) -> dict[str, Any]:
        """Time forced runs, then prefills alone, without garbage collection; return their times.

        The times of a run are those of its tokens, in seconds from its start. A prefill is so much
        shorter than a run that a visit needs more of them to time it well.
        """
        point = Scenario(**scenario)
        ids = self._ids(point)
        gc.collect()
        gc.disable()
        try:
            lengths = [point.new_tokens] * runs + [1] * prefills
            clocks = [token_times(self.model, ids, length, self.job.device) for length in lengths]
        finally:
            gc.enable()
        return {"stamps": [[reading - readings[0] for reading in readings] for readings in clocks]}

    def weigh(self, scenario: dict[str, int]) -> dict[str, Any]:
        """Return the bytes of weights and cache, and the peaks of a prefill and of a full run."""
        import torch

        point = Scenario(**scenario)
        ids = self._ids(point)
        on_gpu = self.job.device.startswith("cuda")
        peaks: dict[str, Any] = {}
        kv = None
        for phase, new_tokens in (("prefill", 1), ("decode", point.new_tokens)):
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            has_fresh_peak = on_gpu or reset_peak()
            output = generate_greedily(self.model, ids, new_tokens)
            synchronise(self.job.device)
            peaks[phase] = self._peaks() if has_fresh_peak else None
            kv = cache_bytes(output)
            del output
        return {
            "weights": resident_bytes(self.model),
            "kv": kv,
            "peaks": peaks,
            "kv_tokens": point.prompt_tokens + point.new_tokens - 1,
        }

    def _peaks(self) -> dict[str, int] | None:
        """Return the peak of memory above the baseline, in bytes; None where it cannot be read.

        On a GPU by what tensors took and what the allocator reserved, else by the process's memory.
        """
        if self.job.device.startswith("cuda"):
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
        return {kind: max(0, value - self.baseline[kind]) for kind, value in current.items()}

    def _ids(self, scenario: Scenario) -> Any:
        """Return the token ids of a scenario's prompts, (B, T), the same for every model."""
        import torch

        generator = random.Random(0)
        rows = [
            [generator.randrange(self.job.vocabulary) for _ in range(scenario.prompt_tokens)]
            for _ in range(scenario.batch)
        ]
        return torch.tensor(rows, device=self.job.device)

    def _run(self, scenario: Scenario) -> list[float]:
        """Run a scenario once; return the times of its tokens."""
        return token_times(self.model, self._ids(scenario), scenario.new_tokens, self.job.device)


def _is_warm(seconds: Sequence[float]) -> bool:
    """Tell whether runs that took so many seconds were enough to warm up."""
    total = sum(seconds)
    if len(seconds) < MIN_WARMUP_RUNS or total < MIN_WARMUP_SECONDS:
        return False
    is_stable = abs(seconds[-1] - seconds[-2]) <= WARMUP_TOLERANCE * seconds[-1]
    return is_stable or len(seconds) >= MAX_WARMUP_RUNS or total > 10 * MIN_WARMUP_SECONDS


def preload_libraries(job: TimingJob) -> bool:
    """Save, open and run one block of the architecture; False where any of that fails.

    So what libraries load and reserve (a model's code, thread pools, kernels' scratch space) is in
    the baseline. It is not the model's, and would otherwise count as its activations.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Some architectures cannot be built so small; they are measured without preloading.
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(job.path)
        text_config = config.get_text_config()
        if hasattr(config, "quantization_config"):  # the block holds floats
            del config.quantization_config
        text_config.num_hidden_layers, text_config.vocab_size = 1, 64
        text_config.pad_token_id = text_config.bos_token_id = None
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = text_config.layer_types[:1]
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job.dtype))
        ids = torch.zeros((1, 32), dtype=torch.long, device=job.device)
        generate_greedily(model.to(job.device).eval(), ids, 3)
        synchronise(job.device)
        return True
    return False


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
    options = {
        name: value
        for name, value in (("use_cache", True), ("logits_to_keep", 1))
        if names is None or {name, "kwargs"} & names
    }
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
    """Return the time of the start and of each token, in seconds.

    By the CPU's steady clock, or by events on a GPU, which are read after one synchronisation at
    the end: none inside the run.
    """
    if not device.startswith("cuda"):
        nanoseconds: list[int] = []
        generate_greedily(
            model, ids_BT, new_tokens, lambda: nanoseconds.append(time.perf_counter_ns())
        )
        return [reading / 1e9 for reading in nanoseconds]
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


def job_json(job: TimingJob) -> str:
    """Return a job as its process reads it."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
