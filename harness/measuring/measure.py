"""Times and weighs models: each in a fresh process of its own, told when to run, base and student
by turns.

The rules (what they guard against stands in docs/measuring.md): the same token ids for every model,
EOS off, full-length warm-up until stable, rounds in the order base, student, student, base, one
ratio a round, an interval by bootstrap over the rounds, raw values kept. Memory is counted by
storages and compared with what the configuration says. Definitions: TTFT is the prefill and the
first token; TPOT = (end to end - TTFT) / (new tokens - 1); decode tokens/s = batch (new tokens - 1)
/ (end to end - TTFT), as MLPerf and vLLM count them. Tokenising is not in any of them.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from harness.contract import Checkpoint, Progress
from harness.errors import CellFailed, HarnessError, how_it_ended
from harness.machine.load import users_environment
from harness.machine.memory import free_bytes
from harness.machine.monitor import InterferenceMonitor
from harness.machine.process import tail_of
from harness.measuring import worker
from harness.measuring.scenario import VISIT_SECONDS, Scenario
from harness.measuring.worker import TimingJob
from harness.models.checkpoint import weight_files
from harness.models.shape import DTYPE_BYTES, Shape, weight_bytes
from harness.records import columns
from harness.records.columns import Quantity
from harness.records.record import Measurement, TaskScore
from harness.statistics.intervals import ratio_of_rounds

ROUNDS = 10
MEMORY_TOLERANCE = 0.02  # share by which arithmetic and count may differ before the row says so
# of a log ratio of two processes: starting the same two again moves it so much (measured:
# measure-aa)
START_SPREAD = 0.015
_MAX_MEMORY_SHARE = 0.9  # of what is free may be asked for
_NO_CACHE = (
    "no cache is handed back between steps: each reads the whole text, and there are no KV bytes"
)
_MIN_PERCENTILE_VALUES = 30  # values, before a 90th percentile is printed


@dataclass(frozen=True)
class TimedModel:
    """A model to be measured, and what is put around it when it is open (`module:function`)."""

    checkpoint: Checkpoint
    wrap: str = ""


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How to measure: the grid, the rounds, and the conditions that every process shares."""

    grid: tuple[Scenario, ...]
    rounds: int = ROUNDS
    visit_seconds: float = VISIT_SECONDS
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1


@dataclass(frozen=True)
class MeasurementResult:
    """What was found about one model beside its base: figures, raw stamps, and what was left out
    and why.
    """

    measurements: tuple[Measurement, ...]
    raw: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


class Stopwatch:
    """The process of one model, as its parent sees it."""

    def __init__(self, job: TimingJob, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"stopwatch-{name}.txt"
        path = folder / f"stopwatch-{name}.json"
        path.write_text(worker.job_json(job), encoding="utf-8")
        environment = {
            **users_environment(os.environ),
            "OMP_NUM_THREADS": str(job.threads),
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "harness.measuring.worker",
                    str(path.resolve()),
                    str(os.getpid()),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=environment,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        if kind is not None:
            self.process.kill()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def wait_until_ready(self) -> None:
        """Wait for the imports to be over."""
        self._answer()

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """Tell the process to do one thing now, and block until it has."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: the answer says why
            self.process.stdin.write(json.dumps({"do": do, **question}) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            raise CellFailed(f"measuring the {self.name}: {answer['failed']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):  # its end, or half an answer
            how = how_it_ended(self.process.wait(), tail_of(self.log))
            raise CellFailed(f"the process that measured the {self.name}: {how}")
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
    """Measure a model, its speed as a ratio to `base` where one is given; job files and logs go to
    `folder`.

    What cannot fit (context, memory) is skipped with the numbers. Raises `CellFailed` when a
    process fails.
    """
    if settings.rounds < 1:
        raise HarnessError(
            f"--rounds {settings.rounds}: at least one round is needed; 10 give an interval"
        )
    folder.mkdir(parents=True, exist_ok=True)
    subjects = {"student": student} if base is None else {"student": student, "base": base}
    shapes = {
        who: Shape.of_folder(one.checkpoint.path, name=one.checkpoint.name)
        for who, one in subjects.items()
    }
    grid, skipped = _fitting_scenarios(subjects, shapes, settings)
    on_disk = _disk_measurements(student.checkpoint)
    if not grid:
        return MeasurementResult(tuple(on_disk), {}, tuple(skipped))
    vocabulary = min(shape.vocabulary for shape in shapes.values())
    with ExitStack() as stack:
        processes = {
            who: stack.enter_context(_start_stopwatch(who, one, vocabulary, settings, folder))
            for who, one in subjects.items()
        }
        for process in processes.values():
            process.wait_until_ready()
        opened = {who: process.ask("open") for who, process in processes.items()}
        session = _TimingSession(
            processes, opened, student.checkpoint, shapes["student"], settings, progress
        )
        return session.over(grid, on_disk, skipped)


def _start_stopwatch(
    name: str, subject: TimedModel, vocabulary: int, settings: TimingSettings, folder: Path
) -> Stopwatch:
    job = TimingJob(
        path=str(subject.checkpoint.path),
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        vocabulary=vocabulary,
        wrap=subject.wrap,
    )
    return Stopwatch(job, folder, name)


@dataclass(frozen=True)
class _TimingSession:
    """The processes of a model and of its base, both open, and what is known of the model before it
    is timed.
    """

    processes: Mapping[str, Stopwatch]
    opened: Mapping[str, dict[str, Any]]  # what each said of opening its model
    checkpoint: Checkpoint
    shape: Shape
    settings: TimingSettings
    progress: Callable[[Progress], None]

    def over(
        self, grid: Sequence[Scenario], on_disk: Sequence[Measurement], skipped: Sequence[str]
    ) -> MeasurementResult:
        """Time and weigh the model in each scenario; a later one that fails is left out, and what
        came before stands.
        """
        figures, left_out, timings = [*on_disk], [*skipped], dict[str, Any]()
        for number, scenario in enumerate(grid):
            try:
                timed = self._timed(scenario, number, of=len(grid))
            except CellFailed as problem:
                if (
                    any(process.process.poll() is not None for process in self.processes.values())
                    or number == 0
                ):
                    raise
                left_out.append(f"{scenario}: {problem}")  # out of memory, most likely
                continue
            timings[str(scenario)] = timed
            figures += self._figures(timed, scenario, is_first=number == 0)
        said = {**asdict(self.settings), "grid": [str(scenario) for scenario in self.settings.grid]}
        return MeasurementResult(
            tuple(figures),
            {"settings": said, "scenarios": timings, "open": self.opened},
            tuple(left_out),
        )

    def _timed(self, scenario: Scenario, number: int, *, of: int) -> dict[str, Any]:
        """Return the raw stamps of one scenario, the model's memory among them."""
        each = self.settings.rounds + 1

        def done(rounds: int) -> None:
            self.progress(
                Progress(
                    stage="measure", done=number * each + rounds, total=of * each, unit="rounds"
                )
            )

        timed = _time_alternately(self.processes, scenario, self.settings, done)
        timed["weighed"] = self.processes["student"].ask("weigh", scenario=asdict(scenario))
        return timed

    def _figures(
        self, timed: Mapping[str, Any], scenario: Scenario, *, is_first: bool
    ) -> list[Measurement]:
        """Turn the raw stamps of a scenario into measurements; weights, loading and the first call
        are said once.
        """
        opened = self.opened["student"]
        figures = _speed_measurements(timed, scenario)
        figures += _memory_measurements(
            timed["weighed"],
            self.checkpoint,
            self.shape,
            scenario,
            self.settings,
            with_weights=is_first,
            exercised=opened["exercised"],
        )
        return figures + (
            _loading_measurements(opened, timed["warm"]["student"], scenario) if is_first else []
        )


def _fitting_scenarios(
    subjects: Mapping[str, TimedModel], shapes: Mapping[str, Shape], settings: TimingSettings
) -> tuple[list[Scenario], list[str]]:
    """Return the scenarios that every model's context and the memory allow, and why the others were
    left out.
    """
    item = DTYPE_BYTES[settings.dtype]
    free = free_bytes(settings.device)
    weights = {
        who: weight_bytes(one.checkpoint.path, settings.dtype) for who, one in subjects.items()
    }
    grid: list[Scenario] = []
    skipped: list[str] = []
    for scenario in settings.grid:
        tokens = scenario.prompt_tokens + scenario.new_tokens
        short = next((shape for shape in shapes.values() if tokens > shape.context), None)
        running = [
            shape.kv_bytes(batch=scenario.batch, tokens=tokens, item=item)
            + working_bytes(shape, scenario, item)
            for shape in shapes.values()
        ]
        # An idle process gives a CPU's memory back; a GPU's allocator keeps what it once reserved.
        need = sum(weights.values()) + (
            sum(running) if settings.device.startswith("cuda") else max(running)
        )
        if short is not None:
            skipped.append(
                f"{scenario}: {tokens} tokens are more than the context of {short.context} of "
                f"{short.name}"
            )
        elif free is not None and need > _MAX_MEMORY_SHARE * free:
            skipped.append(
                f"{scenario}: about {need / 2**30:.1f} GiB would be needed and {free / 2**30:.1f} "
                "GiB are free"
            )
        else:
            grid.append(scenario)
    return grid, skipped


def working_bytes(shape: Shape, scenario: Scenario, item: int) -> int:
    """Estimate what a prefill holds beside weights and cache: the widest layer's inputs and
    outputs, and one position of logits.
    """
    rows = scenario.batch * scenario.prompt_tokens
    block = (
        rows * (4 * shape.hidden + 3 * shape.intermediate + shape.heads * shape.head_size) * item
    )
    return block + scenario.batch * shape.vocabulary * 4


def _time_alternately(
    held: Mapping[str, Stopwatch],
    scenario: Scenario,
    settings: TimingSettings,
    done: Callable[[int], None],
) -> dict[str, Any]:
    """Warm every model up, then visit them by turns; return the raw stamps of each visit and what
    spoiled them.
    """
    asked = asdict(scenario)
    warm = {
        who: one.ask("warm", scenario=asked, visit_seconds=settings.visit_seconds)
        for who, one in held.items()
    }
    watch = InterferenceMonitor(
        [one.process.pid for one in held.values()], gpu=settings.device.startswith("cuda")
    )
    visits: dict[str, list[list[list[float]]]] = {who: [] for who in held}
    order = ("base", "student", "student", "base") if "base" in held else ("student", "student")
    done(0)
    watch.begin()
    for number in range(settings.rounds):
        for who in order:
            told = held[who].ask(
                "visit", scenario=asked, runs=warm[who]["runs"], prefills=warm[who]["prefills"]
            )
            visits[who].append(told["stamps"])
        done(number + 1)
    dirty = list(watch.end())
    every = [stamps for each in visits.values() for runs in each for stamps in runs]
    if any(later <= sooner for stamps in every for sooner, later in pairwise(stamps)):
        dirty.append("the clock stood still or ran backwards")
    return {"warm": warm, "visits": visits, "dirty": dirty}


def lower_quartile(values: Sequence[float]) -> float:
    """Return the lower quartile (linear between ranks): what a run takes when nothing gets in its
    way.

    Others on the machine only ever add time, so low quantiles repeat where means do not (Chen and
    Revels, 2016, "Robust benchmarking in noisy environments", take the least); the least of all
    would rest on one lucky value.
    """
    ordered = sorted(values)
    place = 0.25 * (len(ordered) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (
        ordered[min(below + 1, len(ordered) - 1)] - ordered[below]
    )


def _round_seconds(runs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return a model's seconds in one round, its visits pooled: the lower quartiles of first tokens
    and of later ones.
    """
    first = lower_quartile([stamps[1] for stamps in runs])
    steps = max(len(stamps) for stamps in runs) - 2
    later = lower_quartile([b - a for stamps in runs for a, b in pairwise(stamps[1:])]) * steps
    return {"prefill": first, "decode": later, "end_to_end": first + later}


def measurement_of(quantity: Quantity, value: float, part: str = "", **rest: Any) -> Measurement:
    """Return a measurement of a quantity, or of one part of it (a task, a kind of memory): unit and
    direction are the table's.
    """
    name = f"{quantity.key}:{part}" if part else quantity.key
    return Measurement(
        name=name,
        value=value,
        unit=quantity.stored,
        higher_is_better=quantity.better == "higher",
        **rest,
    )


# by `_of_a_round`'s names
_SPEEDUPS = {
    "prefill": columns.PREFILL_X,
    "decode": columns.DECODE_X,
    "end_to_end": columns.END_TO_END_X,
}
_PEAKS = {"prefill": columns.PREFILL_PEAK, "decode": columns.PEAK}


def _speed_measurements(timed: Mapping[str, Any], scenario: Scenario) -> list[Measurement]:
    """Turn stamps into seconds, tokens per second, and one ratio to the base a round."""
    condition, dirty = str(scenario), "; ".join(timed["dirty"])
    visits = timed["visits"]
    # whole runs, and prefills alone: two stamps
    every = [stamps for visit in visits["student"] for stamps in visit]
    runs = [stamps for stamps in every if len(stamps) > 2]
    steps = scenario.new_tokens - 1

    def figure(quantity: Quantity, values: Sequence[float]) -> Measurement:
        return measurement_of(
            quantity, median(values), values=tuple(values), condition=condition, remark=dirty
        )

    found = [
        figure(columns.TTFT, [stamps[1] for stamps in every]),
        figure(columns.TPOT, [(stamps[-1] - stamps[1]) / steps for stamps in runs]),
        figure(columns.END_TO_END, [stamps[-1] for stamps in runs]),
        figure(
            columns.PREFILL_RATE, [scenario.batch * scenario.prompt_tokens / s[1] for s in every]
        ),
        figure(columns.DECODE_RATE, [scenario.batch * steps / (s[-1] - s[1]) for s in runs]),
    ]
    gaps = sorted(later - sooner for stamps in runs for sooner, later in pairwise(stamps[1:]))
    # pooled over the runs: averaging each run's own percentile would hide the spikes
    if len(gaps) >= _MIN_PERCENTILE_VALUES:
        value = gaps[math.ceil(0.9 * len(gaps)) - 1]
        found.append(measurement_of(columns.GAP_P90, value, condition=condition, remark=dirty))
    if "base" in visits:
        rounds = {
            who: [_round_seconds([*each[at], *each[at + 1]]) for at in range(0, len(each), 2)]
            for who, each in visits.items()
        }
        for name, quantity in _SPEEDUPS.items():
            ratios = [
                base[name] / own[name]
                for base, own in zip(rounds["base"], rounds["student"], strict=True)
            ]
            interval = ratio_of_rounds(ratios, spread=START_SPREAD)
            assert interval.value is not None
            found.append(
                measurement_of(
                    quantity,
                    interval.value,
                    values=tuple(ratios),
                    condition=condition,
                    low=interval.low,
                    high=interval.high,
                    remark=dirty,
                )
            )
    return found


def _disk_measurements(checkpoint: Checkpoint) -> list[Measurement]:
    return [measurement_of(columns.DISK, disk_bytes(checkpoint))]


def disk_bytes(checkpoint: Checkpoint) -> int:
    """Sum the bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in weight_files(checkpoint.path))


def _memory_measurements(
    weighed: Mapping[str, Any],
    checkpoint: Checkpoint,
    shape: Shape,
    scenario: Scenario,
    settings: TimingSettings,
    *,
    with_weights: bool,
    exercised: bool,
) -> list[Measurement]:
    """Turn counts into measurements, each beside what the configuration says; the activations are
    the rest of the peak.
    """
    condition, found = str(scenario), []
    if with_weights:
        expected = weight_bytes(checkpoint.path, settings.dtype)
        remark = _count_mismatch("weights", weighed["weights"], expected)
        found.append(
            measurement_of(
                columns.WEIGHTS, weighed["weights"], condition=settings.dtype, remark=remark
            )
        )
    kv = weighed["kv"]
    if kv is None:
        found.append(
            Measurement(
                name="skipped_kv", value=0, unit="", higher_is_better=False, remark=_NO_CACHE
            )
        )
    else:
        expected = shape.kv_bytes(
            batch=scenario.batch, tokens=weighed["kv_tokens"], item=DTYPE_BYTES[settings.dtype]
        )
        # The arithmetic knows keys and values; what recurrent layers keep is counted alone.
        remark = "" if shape.stateful else _count_mismatch("keys and values", kv, expected)
        found.append(measurement_of(columns.KV, kv, condition=condition, remark=remark))
    for phase, peaks in weighed["peaks"].items():
        for kind, value in (peaks or {}).items():
            found.append(measurement_of(_PEAKS[phase], value, kind, condition=condition))
    both = [one for one in weighed["peaks"].values() if one]
    if both:
        peak = max(one.get("allocated", one.get("resident", 0)) for one in both)
        remark = (
            ""
            if exercised
            else "activations include what libraries load and reserve: this architecture has no "
            "block to try them on"
        )
        rest = max(0, peak - weighed["weights"] - (kv or 0))
        found.append(measurement_of(columns.ACTIVATIONS, rest, condition=condition, remark=remark))
    return found


def _count_mismatch(what: str, counted: int, expected: int) -> str:
    """Say by how much a count differs from the arithmetic, "" where they agree to 2 % (or 64 KiB:
    rotary tables and the like).
    """
    if abs(counted - expected) <= max(MEMORY_TOLERANCE * expected, 2**16):
        return ""
    return f"{what}: {counted / 2**20:.2f} MiB counted, {expected / 2**20:.2f} MiB by arithmetic"


def _loading_measurements(
    opened: Mapping[str, Any], warm: Mapping[str, Any], scenario: Scenario
) -> list[Measurement]:
    """Return loading and the first call, which every later call is spared."""
    return [
        measurement_of(
            columns.LOAD,
            opened["seconds"],
            condition="a fresh process, imports done, files perhaps in the page cache",
        ),
        measurement_of(columns.FIRST_CALL, warm["seconds"][0], condition=str(scenario)),
    ]


def seconds_per_problem(scores: Sequence[TaskScore]) -> list[Measurement]:
    """Seconds per problem and per correct answer of the scored run, batched as scored: natural
    answer lengths, so not a latency.
    """
    found = []
    for score in scores:
        found.append(measurement_of(columns.PER_PROBLEM, score.seconds / score.n, score.task))
        right = (
            score.value * score.n
            if score.retains and score.unit == "share" and not score.form
            else 0
        )
        if right:
            found.append(measurement_of(columns.PER_CORRECT, score.seconds / right, score.task))
    return found
