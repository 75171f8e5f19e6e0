"""Estimates a chain before it runs: memory, time, tokens and money of each stage (`harness plan`).

Everything is a formula over shapes (`harness/models/shape.py`) and rates. Rates come from this
machine's own records if there are any, else from the data sheet of the hardware times a stated
efficiency. No torch, no weights, no network. Formulas: training takes 6 N FLOPs per token and a
forward pass 2 N (Kaplan et al., 2020); each decoding step reads all weights and the key-value
cache; memory is that of `harness/estimating/memory.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple

from harness.estimating.advice import advice
from harness.estimating.hardware import GIB, Hardware, records_of
from harness.estimating.memory import (
    PROCESS_BYTES,
    Parts,
    Peak,
    Precision,
    activation_bytes,
    available_memory,
    bytes_text,
    compression_parts,
    forward_bytes,
    loss_bytes,
    model_bytes,
    peak_text,
    reading_parts,
    rows_written_at_once,
    scoring_parts,
    state_copy_bytes,
    state_parts,
    timing_parts,
    training_precision,
    unpacked_bytes,
    writing_parts,
)
from harness.estimating.workload import (
    ITEM_TOKENS,
    OTHER_ITEM_TOKENS,
    TOP_K,
    TOP_K_VALUE_BYTES,
    EstimateRequest,
    Packed,
    Workload,
)
from harness.measuring.scenario import (
    EAGER_TOKENS,
    MIN_WARMUP_SECONDS,
    VISIT_SECONDS,
    Scenario,
    parse_grid,
)
from harness.models.shape import MAX_DENSE_VOCABULARY, Shape
from harness.records import columns
from harness.records.record import RunRecord

_START_SECONDS = 14.0  # a cell's imports, opening, saving
_STOPWATCH_SECONDS = 9.0  # starting two processes that open a model each
# of one block's kernels on a GPU, launched from Python: 15 to 22 ms for 28 blocks, by estimate
_LAUNCH_SECONDS = 6.5e-4
_CAPTURE_RUNS = 4  # eager runs of showing that captured steps are right, and of the GPU's share
_STEP_SECONDS = 2.5e-4  # Python and kernel starts, for each block and decoding step


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage of a plan needs."""

    name: str
    seconds: float
    memory: float  # bytes of each device (CPU: of the process)
    layout: str  # how it is placed on the devices
    tokens: float = 0.0
    fits: bool = True
    shared: bool = False  # computed once for all rows of the table
    note: str = ""
    # what its memory is made of: `memory` is that of the largest
    peaks: tuple[Peak, ...] = ()
    # of a training: its memory with the settings that it has, and the most that there is for it
    memory_as_set: float = 0.0
    memory_limit: float = 0.0
    # of a training on a GPU: bytes of the processor's memory, while its state is written beside it
    state_copy: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan in numbers."""

    request: EstimateRequest
    hardware: Hardware
    stages: tuple[StageEstimate, ...]
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Wall time of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> float:
        """The largest memory that any stage needs on a device, in bytes."""
        return max(stage.memory for stage in self.stages)


def estimate(
    request: EstimateRequest,
    workloads: Mapping[str, Workload],
    hardware: Hardware,
    records: Sequence[RunRecord],
    *,
    with_teacher: bool,
) -> Estimate:
    """Estimate a chain stage by stage; `workloads` are by the names of its methods.

    `with_teacher` adds the scoring of the teacher, which a table needs once.
    """
    stages: list[StageEstimate] = []
    if with_teacher:
        stages.append(
            scoring_stage("score the teacher", request.teacher, request, hardware, records)
        )
    from_teacher = workloads[request.chain[0]].starts_from_teacher
    shape = request.teacher if from_teacher else request.student
    packed: Packed | None = None
    for name in request.chain:
        workload = replace(workloads[name], packed_start=packed)
        stages += student_stages(name, workload, shape, request, hardware)
        shape, packed = workload.student_shape(shape), workload.packed or packed
    stages.append(
        scoring_stage(
            "score and time the student",
            shape,
            request,
            hardware,
            records,
            timing_base=request.teacher,
            packed=packed,
        )
    )
    fits = all(stage.fits for stage in stages)
    lines = advice(request, workloads, hardware, fits=fits, records=records)
    return Estimate(request=request, hardware=hardware, stages=tuple(stages), advice=tuple(lines))


def student_stages(
    name: str, workload: Workload, shape: Shape, request: EstimateRequest, hardware: Hardware
) -> list[StageEstimate]:
    """Return the stages of one method of a chain, for a model of a shape.

    The teacher's part, which rows share, comes before the method's own.
    """
    stages = [_traces_stage(workload, request, hardware)] if workload.writes_traces else []
    cached = _is_cached(workload, request)
    if cached:
        stages.append(_teacher_reading_stage(request, hardware))
    if workload.trains:
        live = workload.reads_teacher and not cached
        stages.append(_training_stage(name, workload, shape, request, hardware, live=live))
    elif workload.changes_weights:
        stages.append(_posthoc_stage(name, workload, shape, hardware))
    return stages


def _single_device(hardware: Hardware) -> str:
    return "one process" if hardware.kind == "cpu" else "one GPU"


def _is_cached(workload: Workload, request: EstimateRequest) -> bool:
    """Tell whether a method caches the teacher's distributions.

    It does if it needs nothing else of the teacher, the cache keeps as many tokens as it needs, and
    the budget reads every row at least once.
    """
    all_tokens = request.rows * request.row_tokens.mean
    needs_only_logits = workload.reads_teacher and not workload.reads_teacher_live
    return needs_only_logits and _is_cacheable(workload, request) and request.budget >= all_tokens


def _is_cacheable(workload: Workload, request: EstimateRequest) -> bool:
    """Tell whether a cache can keep what a method needs of the teacher's distributions."""
    keeps_all = request.teacher.vocabulary <= MAX_DENSE_VOCABULARY
    return not workload.reads_teacher_live and (keeps_all or not workload.needs_all_probabilities)


def _teacher_reading_stage(request: EstimateRequest, hardware: Hardware) -> StageEstimate:
    """Estimate the teacher's forward pass over every distinct row, and the cache that it fills.

    The cache holds log-probabilities of the trained positions: all, or the likeliest of many.
    """
    row, teacher = request.row_tokens, request.teacher
    tokens = request.rows * row.mean
    seconds = tokens * teacher.forward_flops(row.mean) / (hardware.forward * hardware.count)
    parts = reading_parts(teacher, row.in_longest_batch, hardware.value_bytes)
    placement = _place_model(parts, hardware)
    position_bytes = (
        teacher.vocabulary * 2
        if teacher.vocabulary <= MAX_DENSE_VOCABULARY
        else TOP_K * (TOP_K_VALUE_BYTES + (teacher.vocabulary - 1).bit_length() / 8)
    )
    return StageEstimate(
        name="teacher reads the rows (once, cached)",
        seconds=seconds,
        memory=placement.peak("teacher reads", hardware).total,
        peaks=(placement.peak("teacher reads", hardware),),
        layout=placement.layout,
        tokens=float(tokens),
        fits=placement.fits,
        shared=True,
        note=f"{tokens * row.trained_share * position_bytes / GIB:.2f} GiB of cache",
    )


def _training_stage(
    name: str,
    workload: Workload,
    student: Shape,
    request: EstimateRequest,
    hardware: Hardware,
    *,
    live: bool,
) -> StageEstimate:
    """Estimate the training of a student; `live`: the teacher runs beside it."""
    row = request.row_tokens
    needed = _training_memory(workload, student, request, hardware, live=live)
    available = available_memory(hardware)
    layout = _choose_layout(needed, student, available, hardware)
    flops = 3 * layout.compute * student.forward_flops(row.mean) * request.budget
    seconds = flops / (hardware.train * hardware.count)
    validations = 2 + request.budget // (request.rows * row.mean)
    validation_tokens = validations * request.validation_rows * row.mean
    forward_rate = hardware.forward * hardware.count
    seconds += validation_tokens * student.forward_flops(row.mean) / forward_rate
    if live:  # with a cache each row is read once, without one at every pass
        tokens = request.rows * row.mean if layout.cached else request.budget
        seconds += request.teacher.forward_flops(row.mean) * tokens / forward_rate
    fits = layout.memory <= available
    peak = _with_process(f"train: {name}", layout.parts, hardware)
    as_set = min(
        layout.memory for layout in _layouts(needed, student, hardware) if not layout.settings
    )
    process = PROCESS_BYTES[hardware.kind]
    return StageEstimate(
        name=f"train: {name}",
        seconds=seconds + _START_SECONDS,
        memory=peak.total,
        memory_as_set=process + as_set,
        memory_limit=process + available,
        peaks=(peak,),
        state_copy=state_copy_bytes(needed.states) if hardware.kind == "cuda" else 0.0,
        layout=layout.name,
        tokens=float(request.budget),
        fits=fits,
        note=layout.settings.replace("METHOD", name)
        if fits
        else "give a smaller student, or a device with more memory",
    )


def _with_process(name: str, parts: Parts, hardware: Hardware) -> Peak:
    """Return a peak with what the process holds beside its models and their data."""
    return Peak(name, {**parts, "process": PROCESS_BYTES[hardware.kind]})


@dataclass(frozen=True, kw_only=True)
class _TrainingMemory:
    """The bytes that training needs, by what needs them."""

    rows: int  # of a micro-batch
    states: Parts  # weights, gradients and moments of the student
    unpacked: float  # of a packed layer, the float values that are computed with
    activations: float
    logits: float
    whole_logits: float  # where they are not computed in parts, as over several devices
    head: float  # the copy of the head's weight that makes them
    teacher: float
    cacheable: bool  # the teacher's log-probabilities could come from a cache

    def parts(
        self,
        *,
        teacher: float | None = None,
        batch_share: float = 1.0,
        kept_activations: float = 1.0,
        whole_logits: bool = False,
    ) -> Parts:
        """Return the parts of a layout; a teacher of 0 bytes is left out."""
        teacher_bytes = self.teacher if teacher is None else teacher
        most = self.whole_logits * batch_share
        parts = {
            **self.states,
            "activations": self.activations * kept_activations * batch_share,
            "logits": self.head + (most if whole_logits else min(self.logits, most)),
        }
        beside = {"unpacked layer": self.unpacked, "teacher": teacher_bytes}
        return {**parts, **{name: size for name, size in beside.items() if size}}


def _training_memory(
    workload: Workload,
    student: Shape,
    request: EstimateRequest,
    hardware: Hardware,
    *,
    live: bool,
) -> _TrainingMemory:
    row, item = request.row_tokens, hardware.value_bytes
    # a batch has rows of similar length: the longest batch decides the memory
    tokens = request.micro_batch_size * row.in_longest_batch
    vocabulary = student.vocabulary
    if workload.reads_teacher:
        vocabulary = max(vocabulary, request.teacher.vocabulary)
    precision = training_precision(workload.recipe, item)
    activations = activation_bytes(student, tokens, precision)
    if workload.recomputes:
        activations = _recomputed_activations(student, tokens, precision)
    teacher = model_bytes(request.teacher, item) if live else 0.0
    teacher += forward_bytes(request.teacher, tokens, item) if live else 0.0
    head = 2.0 * student.embedding if precision == "mixed" else 0.0
    losses = partial(loss_bytes, vocabulary, tokens * row.trained_share, teacher=live)
    return _TrainingMemory(
        rows=request.micro_batch_size,
        states=state_parts(workload, student, item),
        unpacked=unpacked_bytes(workload, student, item),
        activations=activations,
        logits=losses(in_parts=workload.logits_in_parts),
        whole_logits=losses(in_parts=False),
        head=head,
        teacher=teacher,
        cacheable=live and _is_cacheable(workload, request),
    )


def _recomputed_activations(student: Shape, tokens: float, precision: Precision) -> float:
    """Return what is kept where activations are computed again: the blocks' inputs, one block."""
    inputs = tokens * student.layers * student.hidden * (2.0 if precision == "bfloat16" else 4.0)
    return inputs + activation_bytes(replace(student, layers=1), tokens, precision)


@dataclass(frozen=True)
class _Layout:
    """One way to place training on the devices."""

    name: str
    parts: Parts  # bytes of each device
    settings: str = ""  # flags that it needs
    compute: float = 1.0  # cost of forward and backward passes, as a factor
    cached: bool = False  # the teacher's log-probabilities come from the cache

    @property
    def memory(self) -> float:
        """The bytes of each device."""
        return sum(self.parts.values())


def _choose_layout(
    needed: _TrainingMemory, student: Shape, available: float, hardware: Hardware
) -> _Layout:
    """Return the simplest layout that fits in the available memory, else the smallest one."""
    layouts = [*_layouts(needed, student, hardware)]
    smallest = min(layouts, key=lambda layout: layout.memory)
    return next((layout for layout in layouts if layout.memory <= available), smallest)


def _layouts(needed: _TrainingMemory, student: Shape, hardware: Hardware) -> Iterator[_Layout]:
    """Yield the possible layouts of training, simpler ones first."""
    devices = hardware.count
    states = needed.states
    if devices == 1:
        name = _single_device(hardware)
        with_teacher = ", teacher beside it" if needed.teacher else ""
        yield _Layout(f"{name}{with_teacher}", needed.parts())
        yield _Layout(
            f"{name}{with_teacher}, micro_batch_size=1",
            needed.parts(batch_share=1 / needed.rows),
            "--set METHOD.micro_batch_size=1",
        )
    else:
        name, states = f"FSDP2 over {devices}", _sharded_states(needed, student, devices)
        yield from _layouts_over(devices, needed, student, states)
    if needed.cacheable:
        yield _Layout(
            f"{name}, teacher's log-probabilities from the cache",
            {**needed.parts(teacher=0.0, whole_logits=devices > 1), **states},
            "--set METHOD.cache=on",
            cached=True,
        )


def _layouts_over(
    devices: int, needed: _TrainingMemory, student: Shape, sharded_states: Parts
) -> Iterator[_Layout]:
    """Yield the layouts over several devices that need no cache; logits are whole there."""
    parts_with = partial(needed.parts, whole_logits=True)
    teacher_share = needed.teacher / devices
    # DDP copies gradients into buckets of its own
    buckets = {"buckets": 4.0 * student.parameters}
    with_teacher = ", teacher beside it" if needed.teacher else ""
    yield _Layout(f"DDP over {devices}{with_teacher}", {**parts_with(), **buckets})
    sharded = ", teacher sharded" if needed.teacher else ""
    if needed.teacher:
        yield _Layout(
            f"DDP over {devices}{sharded}", {**parts_with(teacher=teacher_share), **buckets}
        )
    yield _Layout(
        f"FSDP2 over {devices}{sharded}", {**parts_with(teacher=teacher_share), **sharded_states}
    )
    # checkpointing keeps each block's input; logits stay as they are
    yield _Layout(
        f"FSDP2 over {devices}{sharded}, activations recomputed",
        {**parts_with(teacher=teacher_share, kept_activations=0.25), **sharded_states},
        compute=4 / 3,  # one more forward pass
    )


def _sharded_states(needed: _TrainingMemory, student: Shape, devices: int) -> Parts:
    """Return the bytes of states on each device under FSDP.

    At each moment a device also has the full weights and gradients of one unit: of the widest block
    and the embedding, and of the head if its weights are its own.
    """
    embeddings = student.embedding * (1 if student.tied else 2)
    unit_bytes = 4.0 * 2 * (student.body / student.layers + embeddings)
    shares = {name: size / devices for name, size in needed.states.items()}
    return {**shares, "gathered": unit_bytes}


class _Placement(NamedTuple):
    """Where a model is that is only read."""

    layout: str
    parts: Parts  # bytes of each device
    fits: bool

    def peak(self, name: str, hardware: Hardware) -> Peak:
        """Return its peak under a name."""
        return _with_process(name, self.parts, hardware)


def _place_model(parts: Parts, hardware: Hardware) -> _Placement:
    """Place a model that is only read: a copy on each device, or split over devices.

    `parts` are its weights and its data on each device. The split is tensor parallel.
    """
    available = available_memory(hardware)
    weights, total = parts["weights"], sum(parts.values())
    if total <= available or hardware.count == 1:
        layout = (
            _single_device(hardware)
            if hardware.kind == "cpu" or hardware.count == 1
            else f"a copy on each of {hardware.count}"
        )
        return _Placement(layout, parts, total <= available)
    shards = 2
    while shards < hardware.count and total - weights + weights / shards > available:
        shards *= 2
    shards = min(shards, hardware.count)
    split = {**parts, "weights": weights / shards}
    return _Placement(f"tensor parallel over {shards}", split, sum(split.values()) <= available)


class _Decoding(NamedTuple):
    """What decoding takes."""

    seconds: float
    batch: int  # rows decoded at once


def _decoding(
    shape: Shape, rows: int, prompt: int, written: int, longest: int, hardware: Hardware
) -> _Decoding:
    """Estimate writing `written` tokens after a prompt of `prompt` tokens, for all rows.

    Room is kept for `longest` tokens of each row. All devices work on it together.
    """
    value_bytes = hardware.value_bytes
    batch = rows_written_at_once(shape, rows, longest, hardware)
    steps = math.ceil(rows / batch) * written
    step_bytes = shape.decode_bytes(batch=batch, tokens=prompt + written // 2, item=value_bytes)
    reading = step_bytes / (hardware.bandwidth * hardware.count)
    flops = batch * shape.forward_flops(prompt + written / 2)
    computing = flops / (hardware.forward * hardware.count)
    step = max(reading, computing) + shape.layers * _STEP_SECONDS
    return _Decoding(steps * step, batch)


def _traces_stage(
    workload: Workload, request: EstimateRequest, hardware: Hardware
) -> StageEstimate:
    """Estimate the texts that the teacher writes for training."""
    row = request.row_tokens
    prompt = round(row.mean * (1 - row.trained_share))
    return writing_stage(
        "teacher writes traces (once, cached)",
        request.teacher,
        hardware,
        texts=WrittenTexts(
            number=request.rows * request.samples,
            prompt=prompt,
            written=round(row.mean * row.trained_share),
            longest=prompt + workload.longest_answer,
        ),
    )


class WrittenTexts(NamedTuple):
    """Texts that a model writes."""

    number: int
    prompt: int  # tokens of each prompt
    written: int  # tokens of each text
    longest: int  # tokens of prompt and text for which room is kept


def writing_stage(
    name: str, teacher: Shape, hardware: Hardware, *, texts: WrittenTexts
) -> StageEstimate:
    """Estimate texts that a teacher writes once, for all rows of a table."""
    count, prompt, written, longest = texts
    decoding = _decoding(teacher, count, prompt, written, longest, hardware)
    prefill_flops = count * prompt * teacher.forward_flops(prompt)
    prefill = prefill_flops / (hardware.forward * hardware.count)
    parts = writing_parts(
        teacher, decoding.batch, longest, hardware.value_bytes, kind=hardware.kind
    )
    placement = _place_model(parts, hardware)
    peak = placement.peak("teacher writes", hardware)
    return StageEstimate(
        name=name,
        seconds=decoding.seconds + prefill,
        memory=peak.total,
        peaks=(peak,),
        layout=placement.layout,
        tokens=float(count * written),
        fits=placement.fits,
        shared=True,
        note=f"{count * (prompt + written) * 6 / 2**20:.1f} MiB of text",
    )


def _posthoc_stage(
    name: str, workload: Workload, shape: Shape, hardware: Hardware
) -> StageEstimate:
    """Estimate a method that changes weights without training: each weight is read and written.

    A method that calibrates also runs over its text, twice unless it states otherwise.
    """
    value_bytes = hardware.value_bytes
    seconds = 3 * shape.parameters * value_bytes / hardware.bandwidth + _START_SECONDS
    sequences, length = workload.calibrates
    if sequences:
        flops = sequences * length * shape.forward_flops(length)
        seconds += flops / (hardware.forward * hardware.count) * workload.calibration_passes
        # second-moment matrices and their factors
        seconds += 20 * shape.parameters * shape.hidden / hardware.train
    placement = _place_model(compression_parts(workload, shape, value_bytes), hardware)
    peak = placement.peak(f"compress: {name}", hardware)
    note = ""
    if workload.bits:
        packed = shape.parameters * workload.bits / 8 / GIB
        note = f"{workload.bits:g} bits a weight: {packed:.2f} GiB"
    return StageEstimate(
        name=f"compress: {name}",
        seconds=seconds,
        memory=peak.total,
        peaks=(peak,),
        layout=placement.layout,
        fits=placement.fits,
        note=note,
        tokens=float(sequences * length),
    )


def _timing_seconds(shapes: Sequence[Shape], request: EstimateRequest, hardware: Hardware) -> float:
    """Return the seconds that the timing takes: two starts, warm-ups, two visits a round."""
    if not request.grid:
        return 0.0
    total = _STOPWATCH_SECONDS
    on_gpu = hardware.kind != "cpu"
    for scenario in parse_grid(request.grid):
        for shape in shapes:
            run = _scenario_seconds(scenario, shape, hardware)
            first, visit = 3 * run, max(1.25 * run, 1.25 * VISIT_SECONDS)
            if on_gpu:  # steps are captured, and a short eager run stands beside them
                captured = _scenario_seconds(scenario, shape, hardware, launches=False)
                eager = replace(scenario, new_tokens=min(scenario.new_tokens, EAGER_TOKENS))
                first += _CAPTURE_RUNS * run + 3 * captured
                visit = captured + 1.25 * _scenario_seconds(eager, shape, hardware)
                visit = max(visit, 2 * VISIT_SECONDS)
            total += max(first, MIN_WARMUP_SECONDS) + request.rounds * 2 * visit
    return total


def _scenario_seconds(
    scenario: Scenario, shape: Shape, hardware: Hardware, *, launches: bool = True
) -> float:
    """Return the seconds of one run of a timing scenario: prefill, then decoding.

    On a GPU launches run beside the kernels, so a step takes what is longer of both; a captured
    step has none.
    """
    batch, prompt = scenario.batch, scenario.prompt_tokens
    prefill = batch * prompt * shape.forward_flops(prompt) / hardware.forward
    step_bytes = shape.decode_bytes(batch=batch, tokens=prompt, item=hardware.value_bytes)
    reading = step_bytes / hardware.bandwidth
    computing = batch * shape.forward_flops(prompt) / hardware.forward
    step = max(reading, computing)
    if hardware.kind == "cpu":
        step += shape.layers * _STEP_SECONDS
    else:
        prefill = max(prefill, shape.layers * _LAUNCH_SECONDS)
        step = max(step, shape.layers * _LAUNCH_SECONDS) if launches else step
    return prefill + scenario.new_tokens * step


class _TaskScoring(NamedTuple):
    """What scoring a model on all tasks takes."""

    seconds: float
    tokens: float
    measured_tasks: int  # tasks whose seconds come from this machine's records


def scoring_stage(
    name: str,
    shape: Shape,
    request: EstimateRequest,
    hardware: Hardware,
    records: Sequence[RunRecord],
    timing_base: Shape | None = None,
    packed: Packed | None = None,
) -> StageEstimate:
    """Estimate scoring a model, packed or not, on every task, and timing it by `timing_base`."""
    base = timing_base or shape
    scoring = _score_tasks(shape, request, hardware, records)
    timing = _START_SECONDS + _timing_seconds((shape, base), request, hardware)
    placement = _place_model(scoring_parts(shape, request, hardware, packed), hardware)
    note = ""
    if scoring.measured_tasks:
        note = f"{scoring.measured_tasks} of {len(request.items)} tasks from this machine's records"
    peaks = [placement.peak("scoring", hardware)]
    if request.grid:
        beside = timing_parts(shape, base, request, hardware, packed)
        if hardware.kind == "cuda" and sum(beside.values()) > available_memory(hardware):
            note = "not timed on one GPU: base and model do not fit side by side"
        else:
            peaks.append(_with_process("timing", beside, hardware))
    return StageEstimate(
        name=name,
        seconds=timing + scoring.seconds,
        memory=max(peak.total for peak in peaks),
        peaks=tuple(peaks),
        layout=placement.layout,
        tokens=scoring.tokens,
        fits=placement.fits,
        note=note,
    )


def _score_tasks(
    shape: Shape,
    request: EstimateRequest,
    hardware: Hardware,
    records: Sequence[RunRecord],
) -> _TaskScoring:
    """Estimate the scoring of all tasks.

    Seconds come from this machine's records if it has some of the task, else from FLOPs and bytes.
    """
    seconds, tokens, measured_tasks = 0.0, 0.0, 0
    for task, count in request.items.items():
        item = ITEM_TOKENS.get(task, OTHER_ITEM_TOKENS)
        tokens += count * (item.prompt + item.written) + item.shared_prompt
        recorded = _recorded_item_seconds(task, shape, hardware, records)
        if recorded is not None:
            measured_tasks += 1
            seconds += count * recorded
            continue
        prompt_tokens = count * item.prompt + item.shared_prompt
        flops = prompt_tokens * shape.forward_flops(item.prompt + item.shared_prompt / 57)
        seconds += flops / (hardware.forward * hardware.count)
        if item.written:
            seconds += _decoding(
                shape, count, item.prompt, item.written, item.longest, hardware
            ).seconds
    return _TaskScoring(seconds, tokens, measured_tasks)


def _recorded_item_seconds(
    task: str, shape: Shape, hardware: Hardware, records: Sequence[RunRecord]
) -> float | None:
    """Return the seconds of an item by the records of the hardware, scaled to the model size.

    It is the median of the records nearest in size; None if none is within a factor of 4.
    """
    seconds_by_distance: list[tuple[float, float]] = []
    for record in records_of(hardware, records):
        score = record.score(task)
        size = record.student.parameters if record.student else None
        # answers from the cache count with the seconds that they took in an earlier run
        if score is None or not size or record.conditions.limited or score.from_journal:
            continue
        ratio = shape.parameters / size
        if 0.25 <= ratio <= 4:
            seconds_by_distance.append((abs(math.log(ratio)), score.seconds / score.n * ratio))
    if not seconds_by_distance:
        return None
    nearest = min(distance for distance, _ in seconds_by_distance)
    return median(
        seconds for distance, seconds in seconds_by_distance if distance <= nearest + 1e-9
    )


def estimate_text(estimate: Estimate, *, price: float | None = None) -> str:
    """Return an estimate as it is printed; `price` is that of a device-hour."""
    from tabulate import tabulate

    request, hardware = estimate.request, estimate.hardware
    rows = [_table_row(stage, hardware, price) for stage in estimate.stages]
    title = (
        f"{'+'.join(request.chain)}: {request.teacher.name} ({_parameters_text(request.teacher)}) "
        f"to {request.student.name} ({_parameters_text(request.student)}), {request.budget:,} "
        f"tokens seen in training, {request.rows:,} rows; on {hardware.name}, "
        f"{hardware.memory / GIB:.0f} GiB each"
    )
    total = (
        f"Together: {duration(estimate.seconds)}, at most {estimate.memory / GIB:.1f} GiB of "
        f"{hardware.memory / GIB:.0f} GiB a device"
    )
    if price is not None:
        money = estimate.seconds * hardware.count * price / 3600
        total += f", {money:,.2f} at {price:g} a device-hour"
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    peaks = [peak_text(peak) for stage in estimate.stages for peak in stage.peaks]
    copies = [
        f"{stage.name} holds {bytes_text(stage.state_copy)} of the processor's memory while its "
        "state is written"
        for stage in estimate.stages
        if stage.state_copy
    ]
    lines = [
        f"- Rates: {hardware.source}.",
        *(f"- Peak: {line}." for line in peaks),
        *(f"- {line}." for line in copies),
        *(f"- {line}" for line in estimate.advice),
    ]
    return "\n".join([title, "", table, "", f"{total}.", "", *lines])


def _table_row(stage: StageEstimate, hardware: Hardware, price: float | None) -> dict[str, str]:
    """Return a stage as a row of the table, by header."""
    memory = columns.DEVICE_MEMORY.text(columns.DEVICE_MEMORY.scaled(stage.memory))
    fits = "" if stage.fits else " DOES NOT FIT"
    row = {
        columns.STAGE.header: stage.name,
        columns.DEVICE_MEMORY.header: f"{memory} {columns.DEVICE_MEMORY.unit}{fits}",
        columns.LAYOUT.header: stage.layout,
        columns.TIME.header: duration(stage.seconds),
        columns.PLANNED_TOKENS.header: columns.PLANNED_TOKENS.text(stage.tokens or None),
    }
    if price is not None:
        money = stage.seconds * hardware.count * price / 3600
        row[columns.PLANNED_MONEY.header] = columns.PLANNED_MONEY.text(money)
    return {**row, columns.NOTE.header: stage.note}


def _parameters_text(shape: Shape) -> str:
    count = shape.parameters
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def duration(seconds: float) -> str:
    """Return seconds as text with a unit that fits a table: 40 s, 12 min, 3.4 h, 12 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"
