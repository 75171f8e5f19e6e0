"""Times and weighs models: each in a fresh process, base and student in turns.

The rules (docs/measuring.md says what each guards against): the same token ids for every model, EOS
off, full-length warm-up until stable, rounds in the order base, student, student, base, one ratio a
round, an interval over the rounds, raw values kept; on a GPU decoding steps that are captured, with
those launched one by one beside them. Memory is counted by storages and
compared with what the configuration says. Definitions: TTFT is the prefill and the first token;
TPOT = (end to end - TTFT) / (new tokens - 1); decode tokens/s = batch (new tokens - 1) / (end to
end - TTFT), as MLPerf and vLLM count them. Tokenising is not in any of them.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from harness.contract import Checkpoint, Progress
from harness.errors import CellFailed, how_it_ended
from harness.machine.load import users_environment
from harness.machine.memory import free_bytes
from harness.machine.process import tail_of
from harness.measuring import worker
from harness.measuring.ratios import Runs, speed_ratios, token_gaps
from harness.measuring.ratios import lower_quartile as lower_quartile
from harness.measuring.rounds import RoundsRule
from harness.measuring.scenario import VISIT_SECONDS, Scenario
from harness.measuring.turns import time_alternately
from harness.measuring.worker import TimingJob
from harness.models.checkpoint import weight_files
from harness.models.llama_cpp import is_served
from harness.models.shape import DTYPE_BYTES, Shape, weight_bytes
from harness.records import columns
from harness.records.columns import Quantity
from harness.records.record import Measurement, TaskScore

ROUNDS = 10
MEMORY_TOLERANCE = 0.02  # share by which count and arithmetic may differ without a remark
# How much a log ratio of two processes changes when both are started again (measured: measure-aa).
START_SPREAD = 0.015
_MAX_MEMORY_SHARE = 0.9  # of the free memory, that a scenario may need
_NO_CACHE = (
    "no cache is handed back between steps: each reads the whole text, and there are no KV bytes"
)
_LIBRARIES_INCLUDED = (
    "activations include what libraries load and reserve: one block of this architecture could not "
    "be tried before"
)
_MIN_PERCENTILE_VALUES = 30  # for a 90th percentile
_BUSY_LIMIT = f"{100 * columns.BUSY_SHARE:.0f} % of the time"
_BOUND = f"bound by launches: the GPU worked for less than {_BUSY_LIMIT}"


@dataclass(frozen=True)
class TimedModel:
    """A model to measure, and a `module:function` applied to it after opening ("" for none)."""

    checkpoint: Checkpoint
    wrap: str = ""


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How to measure: the grid, the rounds, and the conditions that every process shares."""

    grid: tuple[Scenario, ...]
    rounds: int | str = ROUNDS  # as `RoundsRule.parse` reads it
    visit_seconds: float = VISIT_SECONDS
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1


@dataclass(frozen=True)
class MeasurementResult:
    """What was measured of one model: figures, raw times, and what was skipped and why."""

    measurements: tuple[Measurement, ...]
    raw: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


class Stopwatch:
    """The parent's side of one model's timing process."""

    def __init__(self, job: TimingJob, folder: Path, name: str) -> None:
        """Start the process; it opens the model and waits for orders on its standard input."""
        self.name = name
        self.log = folder / f"stopwatch-{name}.txt"
        self._job_file = folder / f"stopwatch-{name}.json"
        self._job_file.write_text(worker.job_json(job), encoding="utf-8")
        self._environment = {
            **users_environment(os.environ),
            "OMP_NUM_THREADS": str(job.threads),
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            "-P",
            "-m",
            "harness.measuring.worker",
            str(self._job_file.resolve()),
            str(os.getpid()),  # it ends when this process does
        ]
        with self.log.open("wb") as errors:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=self._environment,
            )

    def restart(self) -> None:
        """End the process and start another one, which has not opened the model yet."""
        self.process.kill()
        self._close()
        self.process = self._start()
        self.wait_until_ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.process.kill()
        self._close()

    def _close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def wait_until_ready(self) -> None:
        """Wait until the process has imported its libraries."""
        self._answer()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send the process one command and return its answer; raises `CellFailed` if it fails."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: the answer says why
            self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            raise CellFailed(f"measuring the {self.name}: {answer['failed']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        """Read the next answer; raises `CellFailed` where the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):  # nothing or half an answer: the process has ended
            ending = how_it_ended(self.process.wait(), tail_of(self.log))
            raise CellFailed(f"the process that measured the {self.name}: {ending}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(
    student: TimedModel,
    base: TimedModel | None,
    settings: TimingSettings,
    *,
    folder: Path,
    progress: Callable[[Progress], None] = lambda _: None,
) -> MeasurementResult:
    """Measure a model, and its speed as a ratio to `base` where there is one.

    Job files and logs go to `folder`. Scenarios that cannot fit (context, memory) are skipped, with
    the numbers. Raises `CellFailed` when a process fails.
    """
    rule = RoundsRule.parse(settings.rounds)
    folder.mkdir(parents=True, exist_ok=True)
    models = {"student": student} if base is None else {"student": student, "base": base}
    shapes = {
        role: Shape.of_folder(model.checkpoint.model_folder, name=model.checkpoint.name)
        for role, model in models.items()
    }
    grid, skipped = _fitting_scenarios(models, shapes, settings)
    disk_measurements = _disk_measurements(student.checkpoint)
    if not grid:
        return MeasurementResult(tuple(disk_measurements), {}, tuple(skipped))
    vocabulary = min(shape.vocabulary for shape in shapes.values())
    with ExitStack() as stack:
        processes = {
            role: stack.enter_context(_start_stopwatch(role, model, vocabulary, settings, folder))
            for role, model in models.items()
        }
        for process in processes.values():
            process.wait_until_ready()
        opened = {role: process.ask("open") for role, process in processes.items()}
        session = _TimingSession(
            processes, opened, student.checkpoint, shapes["student"], settings, rule, progress
        )
        return session.measure_grid(grid, disk_measurements, skipped)


def _start_stopwatch(
    role: str, model: TimedModel, vocabulary: int, settings: TimingSettings, folder: Path
) -> Stopwatch:
    """Start the timing process of a model."""
    job = TimingJob(
        path=str(model.checkpoint.path),
        base=str(model.checkpoint.base or ""),
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        vocabulary=vocabulary,
        wrap=model.wrap,
    )
    return Stopwatch(job, folder, role)


@dataclass(frozen=True)
class _TimingSession:
    """The open timing processes of a student and its base, and what is known before timing."""

    processes: Mapping[str, Stopwatch]
    opened: Mapping[str, dict[str, Any]]  # each one's answer to "open"
    checkpoint: Checkpoint
    shape: Shape
    settings: TimingSettings
    rule: RoundsRule
    progress: Callable[[Progress], None]
    # why a model's steps are not captured: asked once, and not again in the next scenario
    not_captured: dict[str, str] = field(default_factory=dict)

    def measure_grid(
        self, grid: Sequence[Scenario], on_disk: Sequence[Measurement], skipped: Sequence[str]
    ) -> MeasurementResult:
        """Time and weigh the student in each scenario.

        A later scenario that fails is left out, and the earlier ones are kept.
        """
        measurements, left_out, timings = [*on_disk], [*skipped], dict[str, Any]()
        for position, scenario in enumerate(grid):
            is_first = position == 0
            try:
                timing = self._time_scenario(scenario, position, count=len(grid))
            except CellFailed as problem:
                if is_first or self._any_ended():
                    raise
                left_out.append(f"{scenario}: {problem}")  # out of memory, most likely
                continue
            timings[str(scenario)] = timing
            measurements += self._measurements(timing, scenario, is_first=is_first)
        if self._on_gpu:  # when all is timed: what watches a GPU's kernels may slow what follows
            for scenario in (point for point in grid if str(point) in timings):
                timings[str(scenario)]["busy"] = self._busy_shares(scenario)
                measurements += _launch_measurements(timings[str(scenario)], scenario)
        settings = asdict(self.settings) | {"grid": [str(point) for point in self.settings.grid]}
        raw = {"settings": settings, "scenarios": timings, "open": self.opened}
        return MeasurementResult(tuple(measurements), raw, tuple(left_out))

    @property
    def _on_gpu(self) -> bool:
        return self.settings.device.startswith("cuda")

    def _busy_shares(self, scenario: Scenario) -> dict[str, Any]:
        """Return the shares of time in which the GPU works for the student; None if nothing tells.

        Nothing optional may fail a timed row: a driver may refuse to be watched.
        """
        try:
            return self.processes["student"].ask("busy", scenario=asdict(scenario))
        except CellFailed:
            return {"prefill": None, "decode": None}

    def _any_ended(self) -> bool:
        """Tell whether a timing process has ended."""
        return any(stopwatch.process.poll() is not None for stopwatch in self.processes.values())

    def _time_scenario(self, scenario: Scenario, position: int, *, count: int) -> dict[str, Any]:
        """Return the raw times of one scenario, and the student's memory."""
        steps = self.rule.most + 1  # of each scenario

        def report_rounds(rounds: int) -> None:
            done = position * steps + rounds
            self.progress(Progress(stage="measure", done=done, total=count * steps, unit="rounds"))

        timing = time_alternately(
            self.processes,
            scenario,
            self.rule,
            report_rounds,
            visit_seconds=self.settings.visit_seconds,
            not_captured=self.not_captured if self._on_gpu else None,
        )
        timing["weighed"] = self.processes["student"].ask("weigh", scenario=asdict(scenario))
        return timing

    def _measurements(
        self, timing: Mapping[str, Any], scenario: Scenario, *, is_first: bool
    ) -> list[Measurement]:
        """Turn a scenario's raw times into measurements; the first has weights and loading too."""
        opened = self.opened["student"]
        measurements = _speed_measurements(timing, scenario, self.rule)
        measurements += _memory_measurements(
            timing["weighed"],
            self.checkpoint,
            self.shape,
            scenario,
            self.settings,
            with_weights=is_first,
            libraries_loaded=opened["libraries_loaded"],
        )
        if is_first:
            measurements += _loading_measurements(opened, timing["warm"]["student"], scenario)
        return measurements


def _fitting_scenarios(
    models: Mapping[str, TimedModel], shapes: Mapping[str, Shape], settings: TimingSettings
) -> tuple[list[Scenario], list[str]]:
    """Return the scenarios that fit every model's context and the memory, and why others do not."""
    item = DTYPE_BYTES[settings.dtype]
    free = free_bytes(settings.device)
    weights = sum(_weights_in_memory(model.checkpoint, settings.dtype) for model in models.values())
    grid: list[Scenario] = []
    skipped: list[str] = []
    for scenario in settings.grid:
        tokens = scenario.prompt_tokens + scenario.new_tokens
        too_short = next((shape for shape in shapes.values() if tokens > shape.context), None)
        on_gpu = settings.device.startswith("cuda")
        caches = 2 if on_gpu else 1  # that of captured steps stays beside the other
        running_bytes = [
            caches * shape.kv_bytes(batch=scenario.batch, tokens=tokens, item=item)
            + shape.decoded_bytes(batch=scenario.batch, tokens=tokens, item=item)
            + working_bytes(shape, scenario, item)
            for shape in shapes.values()
        ]
        # An idle process gives a CPU's memory back; a GPU's allocator keeps what it once reserved.
        needed = weights + (sum(running_bytes) if on_gpu else max(running_bytes))
        if too_short is not None:
            skipped.append(
                f"{scenario}: {tokens} tokens are more than the context of {too_short.context} of "
                f"{too_short.name}"
            )
        elif free is not None and needed > _MAX_MEMORY_SHARE * free:
            skipped.append(
                f"{scenario}: about {needed / 2**30:.1f} GiB would be needed and "
                f"{free / 2**30:.1f} GiB are free"
            )
        else:
            grid.append(scenario)
    return grid, skipped


def _weights_in_memory(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of a checkpoint's weights in memory: of an adapter, its base's too.

    llama.cpp keeps a file's weights as they are.
    """
    if is_served(checkpoint):
        return checkpoint.bytes_on_disk
    folders = [folder for folder in (checkpoint.base, checkpoint.path) if folder is not None]
    return sum(weight_bytes(folder, dtype) for folder in folders)


def working_bytes(shape: Shape, scenario: Scenario, item: int) -> int:
    """Estimate what a prefill holds beside weights and cache, in bytes.

    That is the widest layer's inputs and outputs, and one position of logits.
    """
    rows = scenario.batch * scenario.prompt_tokens
    block = (
        rows * (4 * shape.hidden + 3 * shape.intermediate + shape.heads * shape.head_size) * item
    )
    return block + scenario.batch * shape.vocabulary * 4


def measurement_of(quantity: Quantity, value: float, part: str = "", **rest: Any) -> Measurement:
    """Return a measurement of a quantity, or of one part of it (a task, a kind of memory).

    Its unit and direction are those of the table of quantities.
    """
    name = f"{quantity.key}:{part}" if part else quantity.key
    return Measurement(
        name=name,
        value=value,
        unit=quantity.stored,
        higher_is_better=quantity.better == "higher",
        **rest,
    )


# By the names of `speed_ratios`.
_SPEEDUPS = {
    "prefill": columns.PREFILL_X,
    "decode": columns.DECODE_X,
    "end_to_end": columns.END_TO_END_X,
}
_BUSY = {"prefill": columns.PREFILL_BUSY, "decode": columns.DECODE_BUSY}
_PEAKS = {"prefill": columns.PREFILL_PEAK, "decode": columns.PEAK}


def _speed_measurements(
    timing: Mapping[str, Any], scenario: Scenario, rule: RoundsRule
) -> list[Measurement]:
    """Turn raw times into seconds, tokens per second, and ratios to the base, one a round.

    Steps that were captured count, and those launched one by one stand beside them.
    """
    visits, captured = timing["visits"], timing.get("captured")
    shared = {"condition": str(scenario), "remark": "; ".join(timing["dirty"])}
    eager_runs = [times for visit in visits["student"] for times in visit]
    # Of a prefill alone there are two times: its start and its token.
    full_runs = [
        times for visit in (captured or visits)["student"] for times in visit if len(times) > 2
    ]
    measurements = _rate_measurements(eager_runs, full_runs, scenario, shared)
    ratios = speed_ratios(visits, captured)
    quantities = {name: _SPEEDUPS[name] for name in ratios}
    measurements += [
        _speedup(quantities[name], values, rule, shared) for name, values in ratios.items()
    ]
    if captured:
        measurements.append(_eager_step(eager_runs, shared))
        if ratios:
            eager = speed_ratios(visits)["decode"]
            measurements.append(_speedup(columns.EAGER_DECODE_X, eager, rule, shared))
    return measurements


def _rate_measurements(
    eager_runs: Runs, full_runs: Runs, scenario: Scenario, shared: Mapping[str, str]
) -> list[Measurement]:
    """Return the seconds and rates of prefills (by `eager_runs`) and of whole runs."""
    steps = scenario.new_tokens - 1
    prompt_tokens = scenario.batch * scenario.prompt_tokens
    values = {
        columns.TTFT: [times[1] for times in eager_runs],
        columns.TPOT: [(times[-1] - times[1]) / steps for times in full_runs],
        columns.END_TO_END: [times[-1] for times in full_runs],
        columns.PREFILL_RATE: [prompt_tokens / times[1] for times in eager_runs],
        columns.DECODE_RATE: [
            scenario.batch * steps / (times[-1] - times[1]) for times in full_runs
        ],
    }
    measurements = [
        measurement_of(quantity, median(numbers), values=tuple(numbers), **shared)
        for quantity, numbers in values.items()
    ]
    gaps = sorted(token_gaps(full_runs))
    # pooled over the runs: averaging each run's own percentile would hide the spikes
    if len(gaps) >= _MIN_PERCENTILE_VALUES:
        percentile = gaps[math.ceil(0.9 * len(gaps)) - 1]
        measurements.append(measurement_of(columns.GAP_P90, percentile, **shared))
    return measurements


def _speedup(
    quantity: Quantity, ratios: Sequence[float], rule: RoundsRule, shared: Mapping[str, str]
) -> Measurement:
    """Return how many times faster than the base the student is, with its interval."""
    interval = rule.interval(ratios, spread=START_SPREAD)
    assert interval.value is not None
    return measurement_of(
        quantity,
        interval.value,
        values=tuple(ratios),
        low=interval.low,
        high=interval.high,
        **shared,
    )


def _eager_step(eager_runs: Runs, shared: Mapping[str, str]) -> Measurement:
    """Return the seconds of a step that is launched kernel by kernel."""
    steps = [(times[-1] - times[1]) / (len(times) - 2) for times in eager_runs if len(times) > 2]
    return measurement_of(columns.EAGER_TPOT, median(steps), values=tuple(steps), **shared)


def _launch_measurements(timing: Mapping[str, Any], scenario: Scenario) -> list[Measurement]:
    """Return which share of a prefill and of eager decoding the GPU works, and what follows.

    A remark says that steps were not captured and why, and what is bound by launches.
    """
    condition, busy = str(scenario), timing["busy"]
    remarks = {
        "skipped_prefill_capture": f"reading the prompt is {_BOUND}"
        if _is_bound(busy["prefill"])
        else "",
        columns.NOT_CAPTURED: _not_captured_remark(timing["not_captured"], busy["decode"]),
    }
    shares = [
        measurement_of(quantity, busy[phase], condition=condition)
        for phase, quantity in _BUSY.items()
        if busy[phase] is not None
    ]
    remarked = [
        Measurement(
            name=name, value=0, unit="", higher_is_better=False, condition=condition, remark=remark
        )
        for name, remark in remarks.items()
        if remark
    ]
    return shares + remarked


def _is_bound(share: float | None) -> bool:
    return share is not None and share < columns.BUSY_SHARE


def _not_captured_remark(reasons: Mapping[str, str], share: float | None) -> str:
    """Return why the decoding was launched step by step, and what its times are times of."""
    if not reasons:
        return ""
    role = "student" if "student" in reasons else "base"
    whose = "" if role == "student" else "the base's step could not be: "
    verdict = (
        "whether launches bound it could not be measured"
        if share is None
        else _BOUND
        if _is_bound(share)
        else f"the GPU worked for {_BUSY_LIMIT} or more"
    )
    return f"decoding is eager, not captured in a graph ({whose}{reasons[role]}); {verdict}"


def _disk_measurements(checkpoint: Checkpoint) -> list[Measurement]:
    """Return the bytes on disk as a measurement."""
    return [measurement_of(columns.DISK, disk_bytes(checkpoint))]


def disk_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's weight files, as they were stored for it.

    Of an unpacked GGUF file they are those of that file, of an adapter its base's too.
    """
    return checkpoint.bytes_on_disk or sum(
        path.stat().st_size for path in weight_files(checkpoint.path)
    )


def _memory_measurements(
    weighed: Mapping[str, Any],
    checkpoint: Checkpoint,
    shape: Shape,
    scenario: Scenario,
    settings: TimingSettings,
    *,
    with_weights: bool,
    libraries_loaded: bool,
) -> list[Measurement]:
    """Turn counted bytes into measurements, each compared with what the configuration says.

    Activations are what remains of the peak.
    """
    condition, measurements = str(scenario), []
    weights, kv = weighed["weights"], weighed["kv"]
    if with_weights:
        expected = _weights_in_memory(checkpoint, settings.dtype)
        remark = _count_mismatch("weights", weights, expected)
        measurements.append(
            measurement_of(columns.WEIGHTS, weights, condition=settings.dtype, remark=remark)
        )
    if kv is None:
        no_kv = Measurement(
            name="skipped_kv", value=0, unit="", higher_is_better=False, remark=_NO_CACHE
        )
        measurements.append(no_kv)
    else:
        expected = shape.kv_bytes(
            batch=scenario.batch, tokens=weighed["kv_tokens"], item=DTYPE_BYTES[settings.dtype]
        )
        # The arithmetic knows keys and values; what recurrent layers keep is counted alone.
        remark = "" if shape.stateful else _count_mismatch("keys and values", kv, expected)
        measurements.append(measurement_of(columns.KV, kv, condition=condition, remark=remark))
        stored_tokens = scenario.batch * weighed["kv_tokens"]
        measurements.append(
            measurement_of(columns.KV_PER_TOKEN, kv / stored_tokens, condition=condition)
        )
    for phase, peaks in weighed["peaks"].items():
        for kind, value in (peaks or {}).items():
            measurements.append(measurement_of(_PEAKS[phase], value, kind, condition=condition))
    totals = [
        peaks.get("allocated", peaks.get("resident", 0))
        for peaks in weighed["peaks"].values()
        if peaks
    ]
    if totals:
        activations = max(0, max(totals) - weights - (kv or 0))
        remark = "" if libraries_loaded else _LIBRARIES_INCLUDED
        measurements.append(
            measurement_of(columns.ACTIVATIONS, activations, condition=condition, remark=remark)
        )
    return measurements


def _count_mismatch(what: str, counted: int, expected: int) -> str:
    """Return how a counted size differs from the arithmetic, "" within 2 % or 64 KiB.

    The tolerance allows for rotary tables and the like.
    """
    if abs(counted - expected) <= max(MEMORY_TOLERANCE * expected, 2**16):
        return ""
    return f"{what}: {counted / 2**20:.2f} MiB counted, {expected / 2**20:.2f} MiB by arithmetic"


def _loading_measurements(
    opened: Mapping[str, Any], warm: Mapping[str, Any], scenario: Scenario
) -> list[Measurement]:
    """Return the seconds of loading and of the first call, which is slower than later ones."""
    return [
        measurement_of(
            columns.LOAD,
            opened["seconds"],
            condition="a fresh process, imports done, files perhaps in the page cache",
        ),
        measurement_of(columns.FIRST_CALL, warm["seconds"][0], condition=str(scenario)),
    ]


def seconds_per_problem(scores: Sequence[TaskScore]) -> list[Measurement]:
    """Return the seconds per problem and per correct answer of the scored run.

    Problems are batched as they were scored and answers have their natural length, so these are no
    latencies.
    """
    measurements = []
    for score in scores:
        measurements.append(
            measurement_of(columns.PER_PROBLEM, score.seconds / score.n, score.task)
        )
        correct = (
            score.value * score.n
            if score.retains and score.unit == "share" and not score.form
            else 0
        )
        if correct:
            measurements.append(
                measurement_of(columns.PER_CORRECT, score.seconds / correct, score.task)
            )
    return measurements
