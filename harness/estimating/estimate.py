"""Estimates a chain before it runs: memory, time, tokens and money of each stage (`harness plan`).

Everything is a formula over shapes (`harness/models/shape.py`) and rates. Rates come from this
machine's own records if there are any, else from the data sheet of the hardware times a stated
efficiency. No torch, no weights, no network. Formulas: training takes 6 N FLOPs per token and a
forward pass 2 N (Kaplan et al., 2020); training states are 16 bytes per weight (fp32 weights,
gradients and Adam's two moments; Rajbhandari et al., 2020); each decoding step reads all weights
and the key-value cache.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from harness.estimating.advice import advice
from harness.estimating.hardware import GIB, Hardware, records_of_this_machine
from harness.estimating.workload import (
    ITEM_TOKENS,
    OTHER_ITEM_TOKENS,
    TOP_K,
    TOP_K_BYTES,
    EstimateRequest,
    Workload,
)
from harness.measuring.scenario import MIN_WARMUP_SECONDS, VISIT_SECONDS, Scenario, parse_grid
from harness.models.shape import (
    CPU_KV_BYTES,
    MAX_BATCH_ROWS,
    MAX_DENSE_VOCABULARY,
    Shape,
)
from harness.records import columns
from harness.records.record import RunRecord

_USABLE = 0.92  # share of a GPU's memory: the rest is context, libraries, fragments
_PROCESS_BYTES = {"cpu": 0.74 * GIB, "cuda": 0.6 * GIB}  # imports (CPU: resident; GPU: the context)
_START_SECONDS = 14.0  # a cell's imports, opening, saving
_STOPWATCH_SECONDS = 9.0  # starting two processes that open a model each
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
    for name in request.chain:
        stages += student_stages(name, workloads[name], shape, request, hardware)
        shape = workloads[name].student_shape(shape)
    stages.append(
        scoring_stage(
            "score and time the student",
            shape,
            request,
            hardware,
            records,
            timing_base=request.teacher,
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
    stages = [_traces_stage(request, hardware)] if workload.writes_traces else []
    cached = _is_cached(workload, request)
    if cached:
        stages.append(_teacher_reading_stage(request, hardware))
    if workload.trains:
        live = workload.reads_teacher and not cached
        stages.append(_training_stage(name, workload, shape, request, hardware, live=live))
    elif workload.changes_weights:
        stages.append(_posthoc_stage(name, workload, shape, hardware))
    return stages


def _bytes_per_value(hardware: Hardware) -> int:
    return 4 if hardware.kind == "cpu" else 2


def _available_memory(hardware: Hardware) -> float:
    """Return the bytes of a device that models and their data can use."""
    usable = hardware.memory if hardware.kind == "cpu" else _USABLE * hardware.memory
    return usable - _PROCESS_BYTES[hardware.kind]


def _single_device(hardware: Hardware) -> str:
    return "one process" if hardware.kind == "cpu" else "one GPU"


def activation_bytes(shape: Shape, tokens: float, item: int) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, with fused attention.

    For each token and layer: inputs of the norms, input and output of attention and the residuals
    (about 8 h), queries, keys and values, and gate, up, activation and product of the feed-forward
    (4 intermediate). `item` is the bytes of a value.
    """
    block = 8 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_size
    block += (4 if shape.gated else 2) * shape.intermediate
    return tokens * shape.layers * block * item


def logits_bytes(vocabulary: int, tokens: float, trained: float, *, teacher: bool) -> float:
    """Return the bytes of the logits and of what the losses compute from them, in fp32.

    For all `tokens` of the batch: logits and their gradient, with a teacher also its logits. For
    the `trained` tokens: selected logits, log-softmax, product and gradient, with a teacher twice.
    """
    return 4.0 * vocabulary * ((3 if teacher else 2) * tokens + (8 if teacher else 4) * trained)


def _is_cached(workload: Workload, request: EstimateRequest) -> bool:
    """Tell whether a method caches the teacher's distributions.

    It does if it needs nothing else of the teacher, and the budget reads every row at least once.
    """
    all_tokens = request.rows * request.row_tokens.mean
    needs_only_logits = workload.reads_teacher and not workload.reads_teacher_live
    return needs_only_logits and request.budget >= all_tokens


def _teacher_reading_stage(request: EstimateRequest, hardware: Hardware) -> StageEstimate:
    """Estimate the teacher's forward pass over every distinct row, and the cache that it fills.

    The cache holds log-probabilities of the trained positions: all, or the likeliest of many.
    """
    row, teacher = request.row_tokens, request.teacher
    tokens = request.rows * row.mean
    seconds = tokens * teacher.forward_flops(row.mean) / (hardware.forward * hardware.count)
    activations = activation_bytes(
        replace(teacher, layers=1), row.in_longest_batch, _bytes_per_value(hardware)
    )
    placement = _place_model(teacher, hardware, 2.0**28 + activations)
    position_bytes = (
        teacher.vocabulary * 2
        if teacher.vocabulary <= MAX_DENSE_VOCABULARY
        else TOP_K * TOP_K_BYTES
    )
    return StageEstimate(
        name="teacher reads the rows (once, cached)",
        seconds=seconds,
        memory=_PROCESS_BYTES[hardware.kind] + placement.memory,
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
    available = _available_memory(hardware)
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
    return StageEstimate(
        name=f"train: {name}",
        seconds=seconds + _START_SECONDS,
        memory=_PROCESS_BYTES[hardware.kind] + layout.memory,
        layout=layout.name,
        tokens=float(request.budget),
        fits=fits,
        note=layout.settings.replace("METHOD", name)
        if fits
        else "give a smaller student, or a device with more memory",
    )


@dataclass(frozen=True, kw_only=True)
class _TrainingMemory:
    """The bytes that training needs, by what needs them."""

    states: float  # weights, gradients and moments of the student
    activations: float
    logits: float
    teacher: float
    cacheable: bool  # the teacher's log-probabilities could come from a cache


def _training_memory(
    workload: Workload,
    student: Shape,
    request: EstimateRequest,
    hardware: Hardware,
    *,
    live: bool,
) -> _TrainingMemory:
    row, value_bytes = request.row_tokens, _bytes_per_value(hardware)
    # a batch has rows of similar length: the longest batch decides the memory
    tokens = request.micro_batch_size * row.in_longest_batch
    vocabulary = student.vocabulary
    if workload.reads_teacher:
        vocabulary = max(vocabulary, request.teacher.vocabulary)
    trained = tokens * row.trained_share
    return _TrainingMemory(
        states=float(workload.bytes_per_weight * student.parameters),
        activations=activation_bytes(student, tokens, value_bytes),
        logits=logits_bytes(vocabulary, tokens, trained, teacher=workload.reads_teacher),
        teacher=float(request.teacher.parameters * value_bytes) if live else 0.0,
        cacheable=live and not workload.reads_teacher_live,
    )


@dataclass(frozen=True)
class _Layout:
    """One way to place training on the devices."""

    name: str
    memory: float  # bytes of each device
    settings: str = ""  # flags that it needs
    compute: float = 1.0  # cost of forward and backward passes, as a factor
    cached: bool = False  # the teacher's log-probabilities come from the cache


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
    batch = needed.activations + needed.logits
    if devices == 1:
        name, sharded_states = _single_device(hardware), needed.states
        with_teacher = ", teacher beside it" if needed.teacher else ""
        yield _Layout(f"{name}{with_teacher}", needed.states + batch + needed.teacher)
        yield _Layout(
            f"{name}{with_teacher}, micro_batch_size=1",
            needed.states + batch / 16 + needed.teacher,
            "--set METHOD.micro_batch_size=1",
        )
    else:
        name, sharded_states = f"FSDP2 over {devices}", _sharded_states(needed, student, devices)
        yield from _layouts_over(devices, needed, student, sharded_states)
    if needed.cacheable:
        yield _Layout(
            f"{name}, teacher's log-probabilities from the cache",
            sharded_states + batch,
            "--set METHOD.cache=on",
            cached=True,
        )


def _layouts_over(
    devices: int, needed: _TrainingMemory, student: Shape, sharded_states: float
) -> Iterator[_Layout]:
    """Yield the layouts over several devices that need no cache."""
    batch = needed.activations + needed.logits
    # checkpointing keeps each block's input; logits stay as they are
    checkpointed_batch = 0.25 * needed.activations + needed.logits
    # DDP copies gradients into buckets of its own
    ddp_states = needed.states + 4.0 * student.parameters
    with_teacher = ", teacher beside it" if needed.teacher else ""
    yield _Layout(f"DDP over {devices}{with_teacher}", ddp_states + batch + needed.teacher)
    teacher_share = needed.teacher / devices
    sharded = ", teacher sharded" if needed.teacher else ""
    if needed.teacher:
        yield _Layout(f"DDP over {devices}{sharded}", ddp_states + batch + teacher_share)
    yield _Layout(f"FSDP2 over {devices}{sharded}", sharded_states + batch + teacher_share)
    yield _Layout(
        f"FSDP2 over {devices}{sharded}, activations recomputed",
        sharded_states + checkpointed_batch + teacher_share,
        compute=4 / 3,  # one more forward pass
    )


def _sharded_states(needed: _TrainingMemory, student: Shape, devices: int) -> float:
    """Return the bytes of states on each device under FSDP.

    At each moment a device also has the full weights and gradients of one unit: of the widest block
    and the embedding, and of the head if its weights are its own.
    """
    embeddings = student.embedding * (1 if student.tied else 2)
    unit_bytes = 4.0 * 2 * (student.body / student.layers + embeddings)
    return needed.states / devices + unit_bytes


class _Placement(NamedTuple):
    """Where a model is that is only read."""

    layout: str
    memory: float  # bytes of each device
    fits: bool


def _place_model(shape: Shape, hardware: Hardware, extra: float) -> _Placement:
    """Place a model that is only read: a copy on each device, or split over devices.

    `extra` is the bytes of its data on each device. The split is tensor parallel.
    """
    available = _available_memory(hardware)
    weights = float(shape.parameters * _bytes_per_value(hardware))
    if weights + extra <= available or hardware.count == 1:
        layout = (
            _single_device(hardware)
            if hardware.kind == "cpu" or hardware.count == 1
            else f"a copy on each of {hardware.count}"
        )
        return _Placement(layout, weights + extra, weights + extra <= available)
    shards = 2
    while shards < hardware.count and weights / shards + extra > available:
        shards *= 2
    shards = min(shards, hardware.count)
    memory = weights / shards + extra
    return _Placement(f"tensor parallel over {shards}", memory, memory <= available)


class _Decoding(NamedTuple):
    """What decoding takes."""

    seconds: float
    batch: int  # rows decoded at once


def _decoding(shape: Shape, rows: int, prompt: int, written: int, hardware: Hardware) -> _Decoding:
    """Estimate writing `written` tokens after a prompt of `prompt` tokens, for all rows.

    All devices work on it together.
    """
    value_bytes = _bytes_per_value(hardware)
    cache = min(0.3 * hardware.memory, float(CPU_KV_BYTES) if hardware.kind == "cpu" else math.inf)
    row_bytes = shape.kv_bytes(batch=1, tokens=prompt + written, item=value_bytes)
    batch = int(max(1, min(rows, MAX_BATCH_ROWS[hardware.kind], cache // max(1, row_bytes))))
    steps = math.ceil(rows / batch) * written
    step_bytes = shape.decode_bytes(batch=batch, tokens=prompt + written // 2, item=value_bytes)
    reading = step_bytes / (hardware.bandwidth * hardware.count)
    flops = batch * shape.forward_flops(prompt + written / 2)
    computing = flops / (hardware.forward * hardware.count)
    step = max(reading, computing) + shape.layers * _STEP_SECONDS
    return _Decoding(steps * step, batch)


def _traces_stage(request: EstimateRequest, hardware: Hardware) -> StageEstimate:
    """Estimate the texts that the teacher writes for training."""
    row, teacher = request.row_tokens, request.teacher
    prompt = round(row.mean * (1 - row.trained_share))
    written = round(row.mean * row.trained_share)
    count = request.rows * request.samples
    decoding = _decoding(teacher, count, prompt, written, hardware)
    prefill_flops = count * prompt * teacher.forward_flops(prompt)
    prefill = prefill_flops / (hardware.forward * hardware.count)
    cache = teacher.kv_bytes(batch=decoding.batch, tokens=row.mean, item=_bytes_per_value(hardware))
    placement = _place_model(teacher, hardware, float(cache))
    return StageEstimate(
        name="teacher writes traces (once, cached)",
        seconds=decoding.seconds + prefill,
        memory=_PROCESS_BYTES[hardware.kind] + placement.memory,
        layout=placement.layout,
        tokens=float(count * written),
        fits=placement.fits,
        shared=True,
        note=f"{count * row.mean * 6 / 2**20:.1f} MiB of text",
    )


def _posthoc_stage(
    name: str, workload: Workload, shape: Shape, hardware: Hardware
) -> StageEstimate:
    """Estimate a method that changes weights without training: each weight is read and written.

    A method that calibrates also runs two forward passes over its text.
    """
    value_bytes = _bytes_per_value(hardware)
    seconds = 3 * shape.parameters * value_bytes / hardware.bandwidth + _START_SECONDS
    sequences, length = workload.calibrates
    if sequences:
        flops = sequences * length * shape.forward_flops(length)
        seconds += flops / (hardware.forward * hardware.count) * 2
        # second-moment matrices and their factors
        seconds += 20 * shape.parameters * shape.hidden / hardware.train
    activations = activation_bytes(replace(shape, layers=1), 2_048, value_bytes)
    placement = _place_model(shape, hardware, activations + 4.0 * shape.hidden**2)
    note = ""
    if workload.bits:
        packed = shape.parameters * workload.bits / 8 / GIB
        note = f"{workload.bits:g} bits a weight: {packed:.2f} GiB"
    return StageEstimate(
        name=f"compress: {name}",
        seconds=seconds,
        memory=_PROCESS_BYTES[hardware.kind] + placement.memory,
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
    for scenario in parse_grid(request.grid):
        for shape in shapes:
            run = _scenario_seconds(scenario, shape, hardware)
            visit = max(1.25 * run, 1.25 * VISIT_SECONDS)
            total += max(3 * run, MIN_WARMUP_SECONDS) + request.rounds * 2 * visit
    return total


def _scenario_seconds(scenario: Scenario, shape: Shape, hardware: Hardware) -> float:
    """Return the seconds of one run of a timing scenario: prefill, then decoding."""
    batch, prompt = scenario.batch, scenario.prompt_tokens
    prefill = batch * prompt * shape.forward_flops(prompt) / hardware.forward
    step_bytes = shape.decode_bytes(batch=batch, tokens=prompt, item=_bytes_per_value(hardware))
    reading = step_bytes / hardware.bandwidth
    computing = batch * shape.forward_flops(prompt) / hardware.forward
    step = max(reading, computing) + shape.layers * _STEP_SECONDS
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
) -> StageEstimate:
    """Estimate scoring a model on every task, and timing it beside `timing_base`."""
    base = timing_base or shape
    scoring = _score_tasks(shape, request, hardware, records)
    timing = _START_SECONDS + _timing_seconds((shape, base), request, hardware)
    value_bytes = _bytes_per_value(hardware)
    cache_limit = float(CPU_KV_BYTES) if hardware.kind == "cpu" else 0.3 * hardware.memory
    cache = min(cache_limit, decoding_cache_bytes(shape, request, value_bytes))
    placement = _place_model(shape, hardware, cache)
    note = ""
    if scoring.measured_tasks:
        note = f"{scoring.measured_tasks} of {len(request.items)} tasks from this machine's records"
    both_models = float(value_bytes * (shape.parameters + base.parameters))
    if hardware.kind == "cuda" and both_models > _USABLE * hardware.memory:
        note = "not timed on one GPU: base and model do not fit side by side"
    return StageEstimate(
        name=name,
        seconds=timing + scoring.seconds,
        memory=_PROCESS_BYTES[hardware.kind] + placement.memory,
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
        recorded = None
        if hardware.kind == "cpu":
            recorded = _recorded_item_seconds(task, shape, records)
        if recorded is not None:
            measured_tasks += 1
            seconds += count * recorded
            continue
        prompt_tokens = count * item.prompt + item.shared_prompt
        flops = prompt_tokens * shape.forward_flops(item.prompt + item.shared_prompt / 57)
        seconds += flops / (hardware.forward * hardware.count)
        if item.written:
            seconds += _decoding(shape, count, item.prompt, item.written, hardware).seconds
    return _TaskScoring(seconds, tokens, measured_tasks)


def decoding_cache_bytes(shape: Shape, request: EstimateRequest, value_bytes: int) -> float:
    """Return the bytes of keys and values of the task that needs most, all rows decoded at once."""
    largest = 0.0
    for task, count in request.items.items():
        item = ITEM_TOKENS.get(task, OTHER_ITEM_TOKENS)
        rows = min(count, MAX_BATCH_ROWS["cpu"])
        items = shape.kv_bytes(batch=rows, tokens=item.prompt + item.written, item=value_bytes)
        shared = shape.kv_bytes(batch=1, tokens=item.shared_prompt, item=value_bytes)
        largest = max(largest, float(items + shared))
    return largest


def _recorded_item_seconds(task: str, shape: Shape, records: Sequence[RunRecord]) -> float | None:
    """Return the seconds of an item by the records of this machine, scaled to the model size.

    It is the median of the records nearest in size; None if none is within a factor of 4.
    """
    seconds_by_distance: list[tuple[float, float]] = []
    for record in records_of_this_machine(records):
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
    lines = [f"- Rates: {hardware.source}.", *(f"- {line}" for line in estimate.advice)]
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
