"""What a device holds at the peak of each piece of work, by formula from shapes. No torch.

Every part is bytes of one device. The formulas follow what autograd and the harness's own loops
keep; counts of fake tensors over whole steps check them (`tests/estimating/test_memory.py`).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from harness.estimating.hardware import GIB, Hardware
from harness.estimating.workload import (
    ITEM_TOKENS,
    OTHER_ITEM_TOKENS,
    EstimateRequest,
    Packed,
    Workload,
)
from harness.measuring.scenario import Scenario, parse_grid
from harness.models.shape import CPU_KV_BYTES, MAX_BATCH_ROWS, Shape

# float32 and bfloat16: weights and products alike; mixed: bf16 products of fp32 weights
Precision = Literal["float32", "bfloat16", "mixed"]
Parts = dict[str, float]  # what holds memory -> bytes

USABLE = 0.92  # share of a GPU's memory: the rest is context, libraries, fragments
# of a process before any model. CPU: its imports, resident; GPU: its context
PROCESS_BYTES = {"cpu": 0.74 * GIB, "cuda": 0.6 * GIB}
_LOSS_BYTES, _FEWEST_POSITIONS = 2**25, 16  # of the fp32 logits whose loss is computed at once
_PACK_TOKENS = {"cpu": 768, "cuda": 4_096}  # of one forward pass of scoring
_SCORED_BYTES = 2**28  # of the fp32 logits of one forward pass of scoring or of reading
_READ_TOKENS = 2_048  # of a batch of short rows
_CACHE_SHARE = 0.4  # of the memory that is left beside the weights, for keys and values


class Held(NamedTuple):
    """Bytes that a backward pass needs of a token in a block, for each unit of a width."""

    hidden: int
    queries: int  # the width of all query heads
    keys: int  # the width of all heads of keys; their values are counted in it
    inner: int  # the width of a gated feed-forward


# Norms keep their input and the normed input, products their inputs, the rotation its input and
# its turned halves, attention what it read and wrote, a gated feed-forward four tensors.
_HELD: Mapping[Precision, Held] = {
    "float32": Held(24, 16, 16, 16),
    "mixed": Held(26, 8, 8, 8),
    "bfloat16": Held(16, 8, 8, 8),
}


class Peak(NamedTuple):
    """The most that a piece of work holds at once."""

    name: str
    parts: Parts

    @property
    def total(self) -> float:
        """All parts together, in bytes."""
        return sum(self.parts.values())


def available_memory(hardware: Hardware) -> float:
    """Return the bytes of a device that models and their data can use."""
    usable = hardware.memory if hardware.kind == "cpu" else USABLE * hardware.memory
    return usable - PROCESS_BYTES[hardware.kind]


def training_precision(recipe: str, value_bytes: int) -> Precision:
    """Return what a recipe computes in, on a device whose values have so many bytes."""
    if recipe == "bf16":
        return "bfloat16"
    return "float32" if value_bytes == 4 else "mixed"


def adapter_weights(shape: Shape, rank: int) -> float:
    """Return the weights of adapters of a rank beside all matrices of the blocks.

    An adapter of a matrix of `a` inputs and `b` outputs has `rank` times `a + b` (Hu et al., 2021).
    """
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys)
    feed_forward = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
    return float(rank * shape.layers * (attention + feed_forward))


def state_parts(workload: Workload, shape: Shape, value_bytes: int) -> Parts:
    """Return what training holds of a student's weights, whatever its batch.

    Under mixed precision every matrix also has a copy in bf16 from the forward pass to the
    backward pass.
    """
    weights = shape.parameters * workload.parameter_factor
    precision = training_precision(workload.recipe, value_bytes)
    body = shape.body * workload.parameter_factor
    copies = 2.0 * body if precision == "mixed" else 0.0
    if workload.recipe == "lora":
        adapters = adapter_weights(shape, workload.adapter_rank)
        frozen = 4 * weights
        if workload.packed_start is not None:  # unpacked for one layer at a time
            frozen, copies = model_bytes(shape, 4, workload.packed_start), 0.0
        parts = {
            "weights": frozen + 4 * adapters,
            "gradients": 4 * adapters,
            "optimizer": 8 * adapters,
        }
        copies += 2.0 * adapters if precision == "mixed" else 0.0
    else:
        own = 2.0 if workload.recipe == "bf16" else 4.0
        rest = max(0.0, workload.bytes_per_weight - 2 * own)
        parts = {"weights": own * weights, "gradients": own * weights, "optimizer": rest * weights}
    return {**parts, "bf16 copies": copies} if copies else parts


def unpacked_bytes(workload: Workload, shape: Shape, value_bytes: int) -> float:
    """Return the bytes of the largest packed layer while its float values are computed with.

    They are its values in float32 and, where that is another type, in the type of the product.
    """
    if workload.packed_start is None:
        return 0.0
    widest = shape.hidden * max(shape.intermediate, shape.hidden)
    if workload.packed_start.table_bits is not None:
        widest = max(widest, shape.embedding)
    return widest * (4.0 if value_bytes == 4 else 4.0 + value_bytes)


def state_copy_bytes(states: Parts) -> float:
    """Return the bytes of a training's state in the processor's memory, while it is written.

    It holds all weights, frozen ones too, and the moments.
    """
    return states["weights"] + states["optimizer"]


def activation_bytes(shape: Shape, tokens: float, precision: Precision) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, with fused attention."""
    held = _HELD[precision]
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    inner = held.inner if shape.gated else held.inner / 2
    block = held.hidden * shape.hidden + held.queries * queries + held.keys * keys
    return tokens * shape.layers * (block + inner * shape.intermediate)


def forward_bytes(shape: Shape, tokens: float, value_bytes: int) -> float:
    """Return the bytes that a forward pass holds at once without a backward pass.

    Those are three tensors of the feed-forward's width and three of the model's.
    """
    return tokens * value_bytes * 3.0 * (shape.intermediate + shape.hidden)


def loss_bytes(vocabulary: int, trained: float, *, teacher: bool, in_parts: bool) -> float:
    """Return the bytes of the logits and of what the losses compute from them, in fp32.

    For each position: logits, log-softmax, product and gradient, with a teacher twice. In parts
    they are those of one part.
    """
    at_once = max(_FEWEST_POSITIONS, _LOSS_BYTES // (4 * vocabulary))
    positions = min(trained, at_once) if in_parts else trained
    return 4.0 * vocabulary * (8 if teacher else 4) * positions


def _logits_at_once(shape: Shape, tokens: float, value_bytes: int) -> float:
    """Return the bytes of a forward pass's logits, of their fp32 form and its log-softmax."""
    return min(_SCORED_BYTES, 4.0 * shape.vocabulary * tokens) * (2 + value_bytes / 4)


def reading_parts(shape: Shape, tokens: float, value_bytes: int) -> Parts:
    """Return what a teacher holds that reads the rows for its cache."""
    return {
        "weights": float(shape.parameters * value_bytes),
        "activations": forward_bytes(shape, tokens, value_bytes),
        "logits": _logits_at_once(shape, max(tokens, _READ_TOKENS), value_bytes),
    }


def writing_parts(
    shape: Shape, rows: int, tokens: int, value_bytes: int, kind: str = "cuda"
) -> Parts:
    """Return what a model holds that continues `rows` texts to `tokens` tokens."""
    attention = rows * shape.heads * tokens * 3.0 * (value_bytes + 2)
    prefill = forward_bytes(shape, _PACK_TOKENS[kind], value_bytes)
    return {
        "weights": float(shape.parameters * value_bytes),
        "keys and values": float(
            shape.in_floats().kv_bytes(batch=rows, tokens=tokens, item=value_bytes)
        ),
        "activations": max(attention, prefill),
        "logits": 2.0 * rows * shape.vocabulary * value_bytes,
    }


def rows_written_at_once(shape: Shape, rows: int, tokens: int, hardware: Hardware) -> int:
    """Return how many rows of `tokens` tokens are decoded at once beside the weights."""
    item = hardware.value_bytes
    free = available_memory(hardware) - shape.parameters * item
    cache = _CACHE_SHARE * max(0.0, free)
    if hardware.kind == "cpu":
        cache = min(cache, float(CPU_KV_BYTES))
    row_bytes = max(1, shape.in_floats().kv_bytes(batch=1, tokens=tokens, item=item))
    return int(max(1, min(rows, MAX_BATCH_ROWS[hardware.kind], cache // row_bytes)))


def scoring_parts(
    shape: Shape, request: EstimateRequest, hardware: Hardware, packed: Packed | None = None
) -> Parts:
    """Return what a model, packed or not, holds at the task that needs most."""
    item = hardware.value_bytes
    weights = model_bytes(shape, item, packed)
    largest: Parts = {}
    for task, count in request.items.items():
        parts = _task_parts(shape, task, count, hardware)
        if sum(parts.values()) > sum(largest.values()):
            largest = parts
    return {"weights": weights, **largest}


def _task_parts(shape: Shape, task: str, count: int, hardware: Hardware) -> Parts:
    """Return what scoring a task holds beside the weights."""
    item = ITEM_TOKENS.get(task, OTHER_ITEM_TOKENS)
    size, pack = hardware.value_bytes, _PACK_TOKENS[hardware.kind]
    # the shared prompts of a task of many subjects are read one subject after the other
    shared = min(item.shared_prompt, _LONGEST_SHARED)
    floats = shape.in_floats()  # a quantized cache is scored in the floats that codes stand for
    prefix = float(floats.kv_bytes(batch=1, tokens=shared + pack, item=size))
    if not item.written:
        return {
            "keys and values": prefix,
            "activations": forward_bytes(shape, pack, size) + pack * (pack + shared) * size,
            "logits": _logits_at_once(shape, pack, size),
        }
    rows = rows_written_at_once(shape, count, item.longest, hardware)
    written = writing_parts(shape, rows, item.longest + shared, size, hardware.kind)
    slots = float(floats.kv_bytes(batch=rows, tokens=item.longest, item=size))
    return {
        "keys and values": slots + prefix,
        "activations": written["activations"],
        "logits": written["logits"],
    }


_LONGEST_SHARED = 1_000  # tokens of the examples that stand before a task's or a subject's items


def model_bytes(shape: Shape, value_bytes: int, packed: Packed | None = None) -> float:
    """Return the bytes of an open model, packed or not."""
    if packed is None:
        return float(shape.parameters * value_bytes)
    table_bits = packed.table_bits or 8.0 * value_bytes
    return (shape.body * packed.bits + (shape.parameters - shape.body) * table_bits) / 8


def timing_parts(
    shape: Shape,
    base: Shape,
    request: EstimateRequest,
    hardware: Hardware,
    packed: Packed | None = None,
) -> Parts:
    """Return what the two processes of a timing hold that take turns with a model and its base.

    A GPU's allocator keeps what it once reserved, so both hold their largest scenario at once.
    """
    item = hardware.value_bytes
    scenarios = parse_grid(request.grid)
    running = [
        max((_scenario_parts(model, scenario, item) for scenario in scenarios), key=sum)
        for model in (shape, base)
    ]
    return {
        "weights": model_bytes(shape, item, packed) + model_bytes(base, item),
        "keys and values": sum(cache for cache, _ in running),
        "activations": sum(working for _, working in running),
        "processes": 2 * PROCESS_BYTES[hardware.kind],
    }


def _scenario_parts(shape: Shape, scenario: Scenario, item: int) -> tuple[float, float]:
    """Return the bytes of keys and values, and of the prefill, of a timing's scenario."""
    tokens = scenario.prompt_tokens + scenario.new_tokens
    cache = float(shape.kv_bytes(batch=scenario.batch, tokens=tokens, item=item))
    working = forward_bytes(shape, scenario.batch * scenario.prompt_tokens, item)
    working += shape.decoded_bytes(batch=scenario.batch, tokens=tokens, item=item)
    return cache, working + scenario.batch * shape.vocabulary * 4.0


def compression_parts(workload: Workload, shape: Shape, value_bytes: int) -> Parts:
    """Return what a method holds that changes weights without training.

    Either the open model, its packed codes and the fp32 form of the widest matrix, or in place of
    all blocks three times one block. Where it calibrates also the inputs of a block for the whole
    text, before and after it, and the second moments of a block's inputs.
    """
    parts: Parts = {"weights": float(shape.parameters * value_bytes)}
    if workload.by_block:
        parts["weights"] = float((shape.parameters - shape.body) * value_bytes)
        parts["blocks"] = 3.0 * shape.body / shape.layers * value_bytes
    else:
        parts["matrix"] = 3 * 4.0 * shape.hidden * max(shape.intermediate, shape.hidden)
        parts["codes"] = shape.body * (workload.bits or 0.0) / 8
        parts["tuning"] = workload.block_bytes * shape.body / shape.layers
    sequences, length = workload.calibrates
    if sequences:
        parts["states"] = 2.0 * sequences * length * shape.hidden * value_bytes
        parts["activations"] = forward_bytes(shape, length, value_bytes)
        parts["second moments"] = 4.0 * (3 * shape.hidden**2 + shape.intermediate**2)
    return {name: size for name, size in parts.items() if size}


def bytes_text(size: float) -> str:
    """Return bytes as text: GiB with one decimal, below 1 GiB as MiB."""
    return f"{size / GIB:,.1f} GiB" if size >= 0.95 * GIB else f"{size / 2**20:.0f} MiB"


def peak_text(peak: Peak) -> str:
    """Return a peak with its parts as text; parts below a hundredth of it are left out."""
    parts = [
        f"{name} {bytes_text(size)}"
        for name, size in peak.parts.items()
        if size >= peak.total / 100
    ]
    return f"{peak.name} {bytes_text(peak.total)} ({', '.join(parts)})"
