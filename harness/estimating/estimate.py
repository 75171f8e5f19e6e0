"""`harness plan`: what a chain would take before anything is spent: memory, time, tokens, money,
and what speaks for its settings.

Everything is a formula over shapes (`harness/models/shape.py`) and rates. Rates come from this
machine's own records where there are any, else from the hardware's data sheet times a stated
efficiency. No torch, no weights, no network. Formulas: training 6 N per token and forward passes 2
N (Kaplan et al., 2020); training states 16 bytes a weight (fp32 weights, gradients and Adam's two
moments; Rajbhandari et al., 2020); decoding reads every weight and the cache at each step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from harness.estimating.advice import advice
from harness.estimating.hardware import GIB, Hardware, records_of_this_machine
from harness.estimating.workload import (
    ITEM_TOKENS,
    ROW_TOKENS,
    TOP_K,
    TOP_K_BYTES,
    EstimateRequest,
    Workload,
)
from harness.measuring.scenario import MIN_WARMUP_SECONDS, VISIT_SECONDS, parse_grid
from harness.models.shape import (
    CPU_KV_BYTES,
    MAX_BATCH_ROWS,
    MAX_DENSE_VOCABULARY,
    TRAINING_BYTES_PER_WEIGHT,
    Shape,
)
from harness.records import columns
from harness.records.record import RunRecord

_USABLE = 0.92  # of a GPU's memory: context, libraries, fragments
_PROCESS_BYTES = {"cpu": 0.74 * GIB, "cuda": 0.6 * GIB}  # imports (CPU: resident; GPU: the context)
_START_SECONDS = 14.0  # a cell's imports, opening, saving
_STOPWATCH_SECONDS = 9.0  # two processes start and open
_STEP_SECONDS = 2.5e-4  # of Python and kernel starts, a block and decoding step


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One line of the plan."""

    name: str
    seconds: float
    memory: float  # bytes of each device (CPU: of the process)
    layout: str  # how it lies on the devices
    tokens: float = 0.0
    fits: bool = True
    shared: bool = False  # made once for all rows
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
        """Wall seconds of everything, one stage after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> float:
        """The largest memory of a device in any stage, in bytes."""
        return max(stage.memory for stage in self.stages)


def estimate(
    asked: EstimateRequest,
    work: Mapping[str, Workload],
    hardware: Hardware,
    records: Sequence[RunRecord],
    *,
    teacher_row: bool,
) -> Estimate:
    """Estimate a chain stage by stage; `teacher_row` adds the teacher's own scoring, which a table
    needs once.
    """
    stages: list[StageEstimate] = []
    shape = asked.teacher if work[asked.chain[0]].starts_from_teacher else asked.student
    if teacher_row:
        stages.append(scoring_stage("score the teacher", asked.teacher, asked, hardware, records))
    for name in asked.chain:
        stages += student_stages(name, work[name], shape, asked, hardware)
        shape = work[name].student_shape(shape)
    stages.append(
        scoring_stage(
            "score and time the student", shape, asked, hardware, records, beside=asked.teacher
        )
    )
    told = advice(asked, work, hardware, fits=all(stage.fits for stage in stages), records=records)
    return Estimate(request=asked, hardware=hardware, stages=tuple(stages), advice=tuple(told))


def student_stages(
    name: str, work: Workload, shape: Shape, asked: EstimateRequest, hardware: Hardware
) -> list[StageEstimate]:
    """Return what one method of a chain takes, given a model of a shape: the teacher's part, which
    rows share, then its own.
    """
    stages = [_traces_stage(asked, hardware)] if work.writes_traces else []
    cached = _is_cached(work, asked)
    if cached:
        stages.append(_teacher_reading_stage(asked, hardware))
    if work.trains:
        stages.append(
            _training_stage(
                name, work, shape, asked, hardware, live=work.reads_teacher and not cached
            )
        )
    elif work.changes_weights:
        stages.append(_posthoc_stage(name, work, shape, hardware))
    return stages


def _bytes_per_value(hardware: Hardware) -> int:
    return 4 if hardware.kind == "cpu" else 2


def activation_bytes(shape: Shape, tokens: float, item: int) -> float:
    """Return what a forward pass keeps for the backward one, with fused attention.

    A token and layer: norm inputs, attention's input and output and the residuals (about 8 h),
    queries, keys, values, and gate, up, activation and product of the feed-forward (4
    intermediate).
    """
    block = 8 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_size
    block += (4 if shape.gated else 2) * shape.intermediate
    return tokens * shape.layers * block * item


def logits_bytes(vocabulary: int, tokens: float, trained: float, *, teacher: bool) -> float:
    """Return the bytes of logits and of what the losses make of them, in fp32.

    The whole batch: logits, their gradient, the teacher's. Trained positions: selected,
    log-softmax, product, gradient; twice that with the teacher's side.
    """
    return 4.0 * vocabulary * ((3 if teacher else 2) * tokens + (8 if teacher else 4) * trained)


def _is_cached(work: Workload, asked: EstimateRequest) -> bool:
    """Tell whether a method keeps the teacher's distributions: logits alone, and a budget that
    reads every row once and more.
    """
    length, _, _ = ROW_TOKENS["mini" if asked.mini else "outside"]
    return (
        work.reads_teacher and not work.reads_live_teacher and asked.budget >= asked.rows * length
    )


def _teacher_reading_stage(asked: EstimateRequest, hardware: Hardware) -> StageEstimate:
    """The teacher reads every distinct row once; its distributions are kept."""
    length, share, long = ROW_TOKENS["mini" if asked.mini else "outside"]
    tokens = asked.rows * length
    seconds = tokens * asked.teacher.forward_flops(length) / (hardware.forward * hardware.count)
    layout, memory, fits = _place_model(
        asked.teacher,
        hardware,
        2.0**28
        + activation_bytes(replace(asked.teacher, layers=1), long, _bytes_per_value(hardware)),
    )
    each = (
        asked.teacher.vocabulary * 2
        if asked.teacher.vocabulary <= MAX_DENSE_VOCABULARY
        else TOP_K * TOP_K_BYTES
    )
    return StageEstimate(
        name="teacher reads the rows (once, cached)",
        seconds=seconds,
        memory=_PROCESS_BYTES[hardware.kind] + memory,
        layout=layout,
        tokens=float(tokens),
        fits=fits,
        shared=True,
        note=f"{tokens * share * each / GIB:.2f} GiB of cache",
    )


def _training_stage(
    name: str,
    work: Workload,
    student: Shape,
    asked: EstimateRequest,
    hardware: Hardware,
    *,
    live: bool,
) -> StageEstimate:
    length, share, long = ROW_TOKENS["mini" if asked.mini else "outside"]
    # rows lie beside rows of their own length: the longest batch decides the memory
    tokens = asked.micro_batch_size * long
    vocabulary = (
        max(student.vocabulary, asked.teacher.vocabulary)
        if work.reads_teacher
        else student.vocabulary
    )
    need = _TrainingMemory(
        states=float(TRAINING_BYTES_PER_WEIGHT * student.parameters),
        activations=activation_bytes(student, tokens, _bytes_per_value(hardware)),
        logits=logits_bytes(vocabulary, tokens, tokens * share, teacher=work.reads_teacher),
        teacher=float(asked.teacher.parameters * _bytes_per_value(hardware)) if live else 0.0,
        cacheable=live and not work.reads_live_teacher,
    )
    base = _PROCESS_BYTES[hardware.kind]
    room = (hardware.memory if hardware.kind == "cpu" else _USABLE * hardware.memory) - base
    way = _choose_layout(need, student, room, hardware)
    flops = 3 * way.compute * student.forward_flops(length) * asked.budget
    seconds = flops / (hardware.train * hardware.count)
    held_out = (2 + asked.budget // (asked.rows * length)) * asked.validation_rows * length
    seconds += held_out * student.forward_flops(length) / (hardware.forward * hardware.count)
    if live:  # a cache would read each row once, and the budget reads fewer than all
        read = asked.rows * length if way.cached else asked.budget
        seconds += asked.teacher.forward_flops(length) * read / (hardware.forward * hardware.count)
    return StageEstimate(
        name=f"train: {name}",
        seconds=seconds + _START_SECONDS,
        memory=base + way.memory,
        layout=way.layout,
        tokens=float(asked.budget),
        fits=way.memory <= room,
        note=way.note.replace("METHOD", name)
        if way.memory <= room
        else "a smaller student, or a larger device",
    )


@dataclass(frozen=True, kw_only=True)
class _TrainingMemory:
    """What training holds, in bytes: states of the student, what the backward pass needs, logits,
    the teacher.
    """

    states: float
    activations: float
    logits: float
    teacher: float
    cacheable: bool  # the teacher's log-probabilities alone would do


@dataclass(frozen=True)
class _Layout:
    """One way to lay it out: bytes of a device, and what it costs."""

    layout: str
    memory: float
    note: str = ""
    compute: float = 1.0  # forward and backward passes, as a factor
    cached: bool = False


def _choose_layout(
    need: _TrainingMemory, student: Shape, room: float, hardware: Hardware
) -> _Layout:
    """Choose the simplest way in which training fits, else the smallest."""
    devices = hardware.count
    working = need.activations + need.logits
    # checkpointing keeps each block's input; logits stay as they are
    recomputed = 0.25 * need.activations + need.logits
    again = 4 / 3  # one more forward pass
    one = (
        "one process"
        if hardware.kind == "cpu"
        else "one GPU"
        if devices == 1
        else f"DDP over {devices}"
    )
    # DDP copies gradients into its own buckets
    buckets = 4.0 * student.parameters if devices > 1 else 0.0
    beside = ", teacher beside it" if need.teacher else ""
    ways = [_Layout(f"{one}{beside}", need.states + buckets + working + need.teacher)]
    if devices > 1:
        # What one moment gathers: the widest block and the embedding, head too where it has weights
        # of its own; weights and gradients.
        widest = (
            4.0
            * 2
            * (student.body / student.layers + student.embedding * (1 if student.tied else 2))
        )
        split, share = need.states / devices + widest, need.teacher / devices
        sharded = ", teacher sharded" if need.teacher else ""
        if need.teacher:
            ways.append(
                _Layout(f"DDP over {devices}{sharded}", need.states + buckets + working + share)
            )
        ways.append(_Layout(f"FSDP2 over {devices}{sharded}", split + working + share))
        ways.append(
            _Layout(
                f"FSDP2 over {devices}{sharded}, activations recomputed",
                split + recomputed + share,
                compute=again,
            )
        )
    else:
        split = need.states
        ways.append(
            _Layout(
                f"{one}{beside}, micro_batch_size=1",
                split + working / 16 + need.teacher,
                "--set METHOD.micro_batch_size=1",
            )
        )
    if need.cacheable:
        name = f"FSDP2 over {devices}" if devices > 1 else one
        ways.append(
            _Layout(
                f"{name}, teacher's log-probabilities from the cache",
                split + working,
                "--set METHOD.cache=on",
                cached=True,
            )
        )
    return next((way for way in ways if way.memory <= room), min(ways, key=lambda way: way.memory))


def _place_model(shape: Shape, hardware: Hardware, extra: float) -> tuple[str, float, bool]:
    """Place a model that is only read: on each device, or split over all (tensor parallel)."""
    room = (
        hardware.memory if hardware.kind == "cpu" else _USABLE * hardware.memory
    ) - _PROCESS_BYTES[hardware.kind]
    whole = float(shape.parameters * _bytes_per_value(hardware))
    if whole + extra <= room or hardware.count == 1:
        layout = (
            "one process"
            if hardware.kind == "cpu"
            else "one GPU"
            if hardware.count == 1
            else f"a copy on each of {hardware.count}"
        )
        return layout, whole + extra, whole + extra <= room
    ways = 2
    while ways < hardware.count and whole / ways + extra > room:
        ways *= 2
    ways = min(ways, hardware.count)
    return f"tensor parallel over {ways}", whole / ways + extra, whole / ways + extra <= room


def _decoding(
    shape: Shape, rows: int, prompt: int, written: int, hardware: Hardware
) -> tuple[float, int]:
    """Return (seconds, rows at once) of writing `written` tokens behind `prompt` for every row, on
    all devices together.
    """
    item = _bytes_per_value(hardware)
    share = min(0.3 * hardware.memory, float(CPU_KV_BYTES) if hardware.kind == "cpu" else math.inf)
    batch = int(
        max(
            1,
            min(
                rows,
                MAX_BATCH_ROWS[hardware.kind],
                share // max(1, shape.kv_bytes(batch=1, tokens=prompt + written, item=item)),
            ),
        )
    )
    steps = math.ceil(rows / batch) * written
    reading = shape.decode_bytes(batch=batch, tokens=prompt + written // 2, item=item) / (
        hardware.bandwidth * hardware.count
    )
    computing = (
        batch * shape.forward_flops(prompt + written / 2) / (hardware.forward * hardware.count)
    )
    return steps * (max(reading, computing) + shape.layers * _STEP_SECONDS), batch


def _traces_stage(asked: EstimateRequest, hardware: Hardware) -> StageEstimate:
    length, share, _ = ROW_TOKENS["mini" if asked.mini else "outside"]
    prompt, written = round(length * (1 - share)), round(length * share)
    seconds, batch = _decoding(asked.teacher, asked.rows * asked.samples, prompt, written, hardware)
    seconds += (
        asked.rows
        * asked.samples
        * prompt
        * asked.teacher.forward_flops(prompt)
        / (hardware.forward * hardware.count)
    )
    cache = asked.teacher.kv_bytes(batch=batch, tokens=length, item=_bytes_per_value(hardware))
    layout, memory, fits = _place_model(asked.teacher, hardware, float(cache))
    mebibytes = asked.rows * asked.samples * length * 6 / 2**20
    return StageEstimate(
        name="teacher writes traces (once, cached)",
        seconds=seconds,
        memory=_PROCESS_BYTES[hardware.kind] + memory,
        layout=layout,
        tokens=float(asked.rows * asked.samples * written),
        fits=fits,
        shared=True,
        note=f"{mebibytes:.1f} MiB of text",
    )


def _posthoc_stage(name: str, work: Workload, shape: Shape, hardware: Hardware) -> StageEstimate:
    """Quantise, prune or factorise: read and write every weight; with calibration, two forward
    passes over its text.
    """
    item = _bytes_per_value(hardware)
    seconds = 3 * shape.parameters * item / hardware.bandwidth + _START_SECONDS
    sequences, length = work.calibrates
    if sequences:
        seconds += (
            sequences
            * length
            * shape.forward_flops(length)
            / (hardware.forward * hardware.count)
            * 2
        )
        # second-moment matrices and their factors
        seconds += 20 * shape.parameters * shape.hidden / hardware.train
    extra = activation_bytes(replace(shape, layers=1), 2_048, item) + 4.0 * shape.hidden**2
    layout, memory, fits = _place_model(shape, hardware, extra)
    note = (
        f"{work.bits:g} bits a weight: {shape.parameters * work.bits / 8 / GIB:.2f} GiB"
        if work.bits
        else ""
    )
    return StageEstimate(
        name=f"compress: {name}",
        seconds=seconds,
        memory=_PROCESS_BYTES[hardware.kind] + memory,
        layout=layout,
        fits=fits,
        note=note,
        tokens=float(sequences * length),
    )


def _timing_seconds(shapes: Sequence[Shape], asked: EstimateRequest, hardware: Hardware) -> float:
    """Return what the stopwatches take for the grid: two starts, warm-ups, and two visits of each
    model a round.
    """
    if not asked.grid:
        return 0.0
    total = _STOPWATCH_SECONDS
    for scenario in parse_grid(asked.grid):
        for shape in shapes:
            tokens = scenario.batch * scenario.prompt_tokens
            run = tokens * shape.forward_flops(scenario.prompt_tokens) / hardware.forward
            reading = (
                shape.decode_bytes(
                    batch=scenario.batch,
                    tokens=scenario.prompt_tokens,
                    item=_bytes_per_value(hardware),
                )
                / hardware.bandwidth
            )
            computing = (
                scenario.batch * shape.forward_flops(scenario.prompt_tokens) / hardware.forward
            )
            run += scenario.new_tokens * (max(reading, computing) + shape.layers * _STEP_SECONDS)
            total += max(3 * run, MIN_WARMUP_SECONDS) + asked.rounds * 2 * max(
                1.25 * run, 1.25 * VISIT_SECONDS
            )
    return total


def scoring_stage(
    name: str,
    shape: Shape,
    asked: EstimateRequest,
    hardware: Hardware,
    records: Sequence[RunRecord],
    beside: Shape | None = None,
) -> StageEstimate:
    """Score every task and time the model; seconds an item by this machine's records where it has
    some, scaled by the FLOPs of a token.
    """
    seconds, tokens = (
        _START_SECONDS + _timing_seconds((shape, beside or shape), asked, hardware),
        0.0,
    )
    known = 0
    for task, count in asked.items.items():
        own, common, written = ITEM_TOKENS.get(task, (150, 0, 30))
        tokens += count * (own + written) + common
        measured = _recorded_item_seconds(task, shape, records) if hardware.kind == "cpu" else None
        if measured is not None:
            known += 1
            seconds += count * measured
            continue
        seconds += (
            (count * own + common)
            * shape.forward_flops(own + common / 57)
            / (hardware.forward * hardware.count)
        )
        if written:
            seconds += _decoding(shape, count, own, written, hardware)[0]
    item = _bytes_per_value(hardware)
    working = float(CPU_KV_BYTES) if hardware.kind == "cpu" else 0.3 * hardware.memory
    layout, memory, fits = _place_model(
        shape, hardware, min(working, decoding_cache_bytes(shape, asked, item))
    )
    note = f"{known} of {len(asked.items)} tasks from this machine's records" if known else ""
    if (
        hardware.kind == "cuda"
        and float(item * (shape.parameters + (beside or shape).parameters))
        > _USABLE * hardware.memory
    ):
        note = "not timed on one GPU: base and model do not fit side by side"
    return StageEstimate(
        name=name,
        seconds=seconds,
        memory=_PROCESS_BYTES[hardware.kind] + memory,
        layout=layout,
        tokens=tokens,
        fits=fits,
        note=note,
    )


def decoding_cache_bytes(shape: Shape, asked: EstimateRequest, item: int) -> float:
    """Return the bytes of keys and values if every row were decoded at once."""
    most = 0.0
    for task, count in asked.items.items():
        own, common, written = ITEM_TOKENS.get(task, (150, 0, 30))
        most = max(
            most,
            float(
                shape.kv_bytes(
                    batch=min(count, MAX_BATCH_ROWS["cpu"]), tokens=own + written, item=item
                )
                + shape.kv_bytes(batch=1, tokens=common, item=item)
            ),
        )
    return most


def _recorded_item_seconds(task: str, shape: Shape, records: Sequence[RunRecord]) -> float | None:
    """Return seconds an item from this machine's records of the task, scaled by size; None without
    a record within 4x of the size.
    """
    found: list[tuple[float, float]] = []
    for record in records_of_this_machine(records):
        score = record.score(task)
        size = record.student.parameters if record.student else None
        if score is None or not size or record.conditions.limited or score.from_journal:
            continue
        ratio = shape.parameters / size
        if 0.25 <= ratio <= 4:
            found.append((abs(math.log(ratio)), score.seconds / score.n * ratio))
    if not found:
        return None
    nearest = min(distance for distance, _ in found)
    return median(seconds for distance, seconds in found if distance <= nearest + 1e-9)


def estimate_text(found: Estimate, *, price: float | None = None) -> str:
    """Return a plan as it is printed."""
    from tabulate import tabulate

    asked, hardware = found.request, found.hardware
    rows = []
    for stage in found.stages:
        needed = columns.DEVICE_MEMORY.text(columns.DEVICE_MEMORY.scaled(stage.memory))
        fits = "" if stage.fits else " DOES NOT FIT"
        row = {
            columns.STAGE.header: stage.name,
            columns.DEVICE_MEMORY.header: f"{needed} {columns.DEVICE_MEMORY.unit}{fits}",
            columns.LAYOUT.header: stage.layout,
            columns.TIME.header: duration(stage.seconds),
            columns.PLANNED_TOKENS.header: columns.PLANNED_TOKENS.text(stage.tokens or None),
        }
        if price is not None:
            row[columns.PLANNED_MONEY.header] = columns.PLANNED_MONEY.text(
                stage.seconds * hardware.count * price / 3600
            )
        rows.append({**row, columns.NOTE.header: stage.note})
    total = (
        f"Together: {duration(found.seconds)}, at most {found.memory / GIB:.1f} GiB of "
        f"{hardware.memory / GIB:.0f} GiB a device"
    )
    if price is not None:
        total += (
            f", {found.seconds * hardware.count * price / 3600:,.2f} at {price:g} a device-hour"
        )
    head = (
        f"{'+'.join(asked.chain)}: {asked.teacher.name} ({_parameters_text(asked.teacher)}) to "
        f"{asked.student.name} ({_parameters_text(asked.student)}), "
        f"{asked.budget:,} seen tokens, {asked.rows:,} rows; on {hardware.name}, "
        f"{hardware.memory / GIB:.0f} GiB each"
    )
    lines = [f"- Rates: {hardware.source}.", *(f"- {line}" for line in found.advice)]
    return "\n".join(
        [
            head,
            "",
            tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True),
            "",
            f"{total}.",
            "",
            *lines,
        ]
    )


def _parameters_text(shape: Shape) -> str:
    count = shape.parameters
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def duration(seconds: float) -> str:
    """Return seconds in words that fit a table: 40 s, 12 min, 3.4 h, 12 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"
