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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.machine.memory import baseline_bytes, release_memory, synchronise
from harness.machine.memory import reset_peak as reset_peak
from harness.machine.process import end_with_parent
from harness.measuring.runs import captured_times
from harness.measuring.runs import generate_greedily as generate_greedily
from harness.measuring.runs import token_times as token_times
from harness.measuring.scenario import EAGER_TOKENS, MIN_WARMUP_SECONDS, Scenario
from harness.measuring.weighing import cache_bytes as cache_bytes
from harness.measuring.weighing import memory_peaks, weigh_model
from harness.measuring.weighing import resident_bytes as resident_bytes
from harness.models.adapters import open_weights
from harness.models.checkpoint import model_class

if TYPE_CHECKING:
    from harness.measuring.captured import StaticDecoder

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
    base: str = ""  # folder of the model that the adapter in `path` is laid on; "" for none

    @property
    def model_folder(self) -> Path:
        """The folder with the model's configuration."""
        return Path(self.base or self.path)


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
        self.captured: StaticDecoder | None = None  # of the scenario that is being timed

    def open(self) -> dict[str, Any]:
        """Open the model; return its seconds (without imports) and the peak of memory."""
        import torch

        from harness.models.quantized_cache import give_quantized_cache

        libraries_loaded = preload_libraries(self.job)
        model_class(self.job.model_folder)  # reads the architecture's own module
        self.baseline = baseline_bytes(self.job.device)
        start = time.perf_counter()
        self.model = open_weights(
            Path(self.job.path),
            base=Path(self.job.base) if self.job.base else None,
            dtype=getattr(torch, self.job.dtype),
        )
        self.model.to(self.job.device).eval()
        give_quantized_cache(self.model)
        if self.job.wrap:
            module, _, function = self.job.wrap.partition(":")
            self.model = getattr(importlib.import_module(module), function)(self.model)
        synchronise(self.job.device)
        return {
            "seconds": time.perf_counter() - start,
            "peak": memory_peaks(self.job.device, self.baseline),
            "libraries_loaded": libraries_loaded,
        }

    def warm(self, scenario: dict[str, int], visit_seconds: float) -> dict[str, Any]:
        """Run at full length until two runs in a row agree; return the seconds of each run.

        `runs` and `prefills` are how many of each fill a visit of `visit_seconds`.
        """
        if self.captured is not None:  # of the scenario before
            self.release()
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

    def busy(self, scenario: dict[str, int]) -> dict[str, Any]:
        """Return the shares of a prefill and of decoding in which the GPU computes."""
        from harness.measuring.launches import busy_seconds, busy_shares

        point = Scenario(**scenario)
        ids, tokens = self._ids(point), min(point.new_tokens, EAGER_TOKENS)
        shares = busy_shares(
            lambda count: busy_seconds(lambda: generate_greedily(self.model, ids, count)),
            lambda count: token_times(self.model, ids, count, self.job.device),
            tokens,
        )
        return dict(shares)

    def capture(self, scenario: dict[str, int], visit_seconds: float) -> dict[str, Any]:
        """Capture the scenario's decoding steps, show them right, and warm them up.

        `runs` is how many fill a visit. Raises `NotCaptured`, or whatever a capture raises; this
        process should then time nothing more.
        """
        from harness.measuring.captured import capture_on_cuda, captured_decoder

        point = Scenario(**scenario)
        self.captured = captured_decoder(
            self.model,
            self._ids(point),
            point.new_tokens,
            capture=capture_on_cuda,
            dtype=self.job.dtype,
        )
        runs = [captured_times(self.captured, self.job.device) for _ in range(MIN_WARMUP_RUNS)]
        seconds = [times[-1] - times[0] for times in runs]
        count = max(1, min(50, math.ceil(visit_seconds / min(seconds[1:]))))
        return {"seconds": seconds, "runs": count}

    def release(self) -> dict[str, Any]:
        """Give back what was captured: its cache and its graphs."""
        self.captured = None
        release_memory(self.job.device)
        return {}

    def visit(
        self, scenario: dict[str, int], runs: int, prefills: int, captured: int = 0
    ) -> dict[str, Any]:
        """Time forced runs, then prefills alone, without garbage collection; return their times.

        The times of a run are those of its tokens, in seconds from its start. A prefill is so much
        shorter than a run that a visit needs more of them to time it well. With `captured`, so many
        runs of captured steps are timed too, and the others are short: they stand beside.
        """
        point = Scenario(**scenario)
        ids = self._ids(point)
        new_tokens = min(point.new_tokens, EAGER_TOKENS) if captured else point.new_tokens
        gc.collect()
        gc.disable()
        try:
            lengths = [new_tokens] * runs + [1] * prefills
            clocks = [token_times(self.model, ids, length, self.job.device) for length in lengths]
            captured_clocks = [self._captured_run() for _ in range(captured)]
        finally:
            gc.enable()
        answer = {"stamps": [_from_start(readings) for readings in clocks]}
        if captured:
            answer["captured"] = [_from_start(readings) for readings in captured_clocks]
        return answer

    def _captured_run(self) -> list[float]:
        assert self.captured is not None, "visit() with captured runs before capture()"
        return captured_times(self.captured, self.job.device)

    def weigh(self, scenario: dict[str, int]) -> dict[str, Any]:
        """Return the bytes of weights and cache, and the peaks of a prefill and of a full run."""
        if self.captured is not None:
            self.release()
        point = Scenario(**scenario)
        weighed = weigh_model(
            self.model, self._ids(point), point.new_tokens, self.job.device, self.baseline
        )
        return {**weighed, "kv_tokens": point.prompt_tokens + point.new_tokens - 1}

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
        if job.base:
            import peft  # noqa: F401  lays the adapter on
        config = AutoConfig.from_pretrained(job.model_folder)
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


def _from_start(readings: Sequence[float]) -> list[float]:
    return [reading - readings[0] for reading in readings]


def job_json(job: TimingJob) -> str:
    """Return a job as its process reads it."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
