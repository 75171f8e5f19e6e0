"""What is estimated: two models, the stages of a chain and what each needs, data and tasks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.contract import Method
from harness.errors import HarnessError
from harness.models.resolve import quantized_by
from harness.models.shape import (
    TRAINING_BYTES_PER_WEIGHT,
    Shape,
    parameters_on_disk,
    shape_of_size,
    weight_bytes,
)
from harness.planning.chain import can_be_stage

# log-probabilities stored of a teacher's distribution: an fp16 value each, and an id in the fewest
# bits that hold the vocabulary
TOP_K, TOP_K_VALUE_BYTES = 64, 2


class RowTokens(NamedTuple):
    """The tokens of a training row."""

    mean: int
    trained_share: float  # of the tokens, those with a loss
    in_longest_batch: int  # mean over the rows of the batch with the longest rows


# 190 is the mean of GSM8K's train split
ROW_TOKENS = {"mini": RowTokens(84, 0.5, 125), "outside": RowTokens(190, 0.6, 380)}


class ItemTokens(NamedTuple):
    """The tokens that scoring one item of a task takes."""

    prompt: int  # of the item alone
    shared_prompt: int  # read once for all items of a task or subject
    written: int
    longest: int = 0  # of the longest prompt after the shared one, and what it may write


ITEM_TOKENS: Mapping[str, ItemTokens] = {
    "gsm8k": ItemTokens(75, 700, 130, 250 + 512),
    "gsm8k-cot": ItemTokens(75, 900, 110, 250 + 512),
    "mmlu": ItemTokens(105, 57 * 450, 0),
    "mmlu-cloze": ItemTokens(130, 57 * 450, 0),
    "gsm8k-mini": ItemTokens(60, 0, 43, 90 + 128),
    "mmlu-mini": ItemTokens(60, 0, 0),
    "wikitext": ItemTokens(4_400, 0, 0),
}
# of a task that is not in the table; lm-eval's own limit of what is written is 256
OTHER_ITEM_TOKENS = ItemTokens(150, 0, 30, 500 + 256)


_SIZE = r"(\d{1,6}(?:\.\d{1,6})?)([MBT])"


def is_size(text: str) -> bool:
    """Tell whether a model is given by its size alone: 70B, 135M."""
    return re.fullmatch(_SIZE, text, re.IGNORECASE) is not None


def parse_model(text: str, folder: Callable[[str], Path]) -> Shape:
    """Return the shape of a model: of a size (70B) the nearest public one, else from its folder.

    `folder` returns the folder of a model's configuration.
    """
    size = re.fullmatch(_SIZE, text, re.IGNORECASE)
    if size:
        if float(size[1]) <= 0:
            raise HarnessError(f"a model cannot have {text} parameters; write for example 7B")
        return shape_of_size(float(size[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[size[2].upper()])
    if re.fullmatch(r"\d+(\.\d+)?\w?", text):
        raise HarnessError(
            f"{text!r} is not the size of a model; write for example 7B or 135M, or ./{text} for a "
            "folder of that name"
        )
    shape = Shape.of_folder(folder(text), name=text)
    if shape.experts > 1:
        raise HarnessError(
            f"{text} is a mixture of {shape.experts} experts, and the formulas of harness plan are "
            "for dense models"
        )
    return shape


def cut_parameters(folder: Path, shape: Shape) -> float:
    """Return how many parameters a stored model has once it is cut to a shape.

    It is the stored number, scaled by the ratio of the parameters of both shapes.
    """
    return parameter_factor(folder) * shape.parameters


def parameter_factor(folder: Path) -> float:
    """Return how many parameters a stored model has for each one of its shape's formula.

    It is near 1, and far above for a mixture of experts. Of packed weights it is 1: several of them
    lie in one stored number.
    """
    if packed_as(folder) is not None:
        return 1.0
    return parameters_on_disk(folder) / Shape.of_folder(folder).parameters


def _same_shape(shape: Shape) -> Shape:
    return shape


class Packed(NamedTuple):
    """How many bits the weights of a packed model have, with their scales."""

    bits: float  # in the blocks
    table_bits: float | None  # of embedding and head; None where they stay floats


def packed_as(folder: Path) -> Packed | None:
    """Return how many bits the weights of a model folder have, None where they are floats.

    By its headers: what is stored as floats is taken for embedding and head where it is as large as
    they are, and else for scales.
    """
    if quantized_by(folder) in ("", "float"):
        return None
    shape = Shape.of_folder(folder)
    in_float32, in_bfloat16 = (weight_bytes(folder, dtype) for dtype in ("float32", "bfloat16"))
    floats = (in_float32 - in_bfloat16) / 2
    tables = shape.parameters - shape.body
    if floats < tables:
        bits = 8 * in_float32 / shape.parameters
        return Packed(bits, bits)
    return Packed(8 * (in_float32 - 4 * tables) / shape.body, None)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one stage of a chain needs."""

    trains: bool = False
    reads_teacher: bool = False  # a forward pass of the teacher for every token seen
    # the teacher's cache is no help: hidden states, or the student's own texts, or it is off
    reads_teacher_live: bool = False
    several_teachers: bool = False  # all teachers are read
    writes_traces: bool = False
    longest_answer: int = 256  # new tokens of a trace
    changes_weights: bool = False  # without training
    bits: float | None = None  # of each weight of its student
    table_bits: float | None = None  # of embedding and head, where they are packed too
    simulated: bool = False  # its weights are floats that stand for packed ones
    by_block: bool = False  # the blocks stay in their files, but for the one at work
    calibrates: tuple[int, int] = (0, 0)  # sequences, and tokens of each, that are read first
    calibration_passes: float = 2.0  # forward passes over that text
    block_bytes: float = 0.0  # beside the model, for each weight of the block at work
    starts_from_teacher: bool = False  # if it is the first stage
    bytes_per_weight: float = TRAINING_BYTES_PER_WEIGHT  # of training states
    parameter_factor: float = 1.0  # weights of the student for each one of its shape's formula
    recipe: str = ""  # full, bf16 or lora; "" of a method that has none
    adapter_rank: int = 0
    packed_start: Packed | None = None  # the packed weights that adapters are trained beside
    recomputes: bool = False  # activations, in the backward pass
    logits_in_parts: bool = True  # those of a step are never all held
    needs_all_probabilities: bool = False  # of a teacher, not only the likeliest tokens
    # the shape of its student, from the shape that it starts with
    student_shape: Callable[[Shape], Shape] = _same_shape

    @property
    def packed(self) -> Packed | None:
        """How its student is packed, None where its weights are floats."""
        if self.bits is None or self.simulated:
            return None
        return Packed(self.bits, self.table_bits)


def workload_of(method: Method) -> Workload:
    """Return what a method with its settings needs, by its declared traits."""
    return Workload(
        trains=method.trains,
        reads_teacher=method.trains and (method.needs_same_vocabulary or method.reads_teacher_live),
        reads_teacher_live=method.reads_teacher_live,
        several_teachers=method.needs_several_teachers,
        writes_traces=method.writes_traces,
        longest_answer=getattr(method, "longest", 256),
        changes_weights=can_be_stage(method) and not method.trains,
        bits=method.bits_per_weight,
        table_bits=method.bits_per_table_weight,
        simulated=method.simulated,
        by_block=method.works_by_block,
        calibrates=method.calibration_tokens() if method.calibrates else (0, 0),
        calibration_passes=method.calibration_passes,
        block_bytes=method.block_bytes_per_weight,
        starts_from_teacher=method.starts_from == "teacher",
        student_shape=method.resulting_shape,
        bytes_per_weight=method.training_bytes_per_weight,
        recipe=getattr(method, "recipe", ""),
        adapter_rank=getattr(method, "lora_rank", 0),
        recomputes=getattr(method, "gradient_checkpointing", False),
        logits_in_parts=method.logits_in_parts,
        needs_all_probabilities=method.needs_all_probabilities,
    )


def training_bytes(
    workload: Workload,
    parameters: float,
    teachers: Sequence[Path],
    dtype: str,
    *,
    packed: float | None = None,
) -> float:
    """Return the bytes that training needs whatever its batch size.

    They are the training states of the student, and the weights of teachers that must be open.
    `packed` is the bytes of packed weights that adapters are trained beside.
    """
    student_bytes = workload.bytes_per_weight * parameters
    if packed is not None:  # in place of frozen weights in float32
        student_bytes += packed - 4 * parameters
    if not workload.reads_teacher_live:
        return student_bytes
    teacher_bytes = [weight_bytes(folder, dtype) for folder in teachers]
    return student_bytes + (sum(teacher_bytes) if workload.several_teachers else min(teacher_bytes))


@dataclass(frozen=True, kw_only=True)
class EstimateRequest:
    """The models, chain, data and tasks that an estimate is for."""

    teacher: Shape
    student: Shape
    chain: tuple[str, ...]
    budget: int  # tokens seen in training
    rows: int
    micro_batch_size: int = 16
    samples: int = 1  # traces of each row
    items: Mapping[str, int]  # task -> items that are scored
    mini: bool = False  # all tasks are the generated ones, whose rows are short
    validation_rows: int = 200
    grid: str = ""  # scenarios of the timing; "": nothing is timed
    rounds: int = 6

    @property
    def row_tokens(self) -> RowTokens:
        """The tokens of a training row."""
        return ROW_TOKENS["mini" if self.mini else "outside"]
