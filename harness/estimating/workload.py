"""What a plan is asked about: the pair of models, the chain's stages and what each of them asks
for, the data, the tasks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.contract import Method
from harness.errors import HarnessError
from harness.models.shape import (
    TRAINING_BYTES_PER_WEIGHT,
    Shape,
    parameters_on_disk,
    shape_of_size,
    weight_bytes,
)
from harness.planning.chain import can_be_stage

# log-probabilities kept of a teacher's distribution: an fp16 value and an int32 id each
TOP_K, TOP_K_BYTES = 64, 6
# A training row: tokens on average, share of them trained, tokens on average in the longest batch
# (GSM8K's train split has 190).
ROW_TOKENS = {"mini": (84, 0.5, 125), "outside": (190, 0.6, 380)}

# How much a task's item costs the scorer: tokens of its own prompt, shared prompt read once a task
# (or subject), tokens written.
ITEM_TOKENS: Mapping[str, tuple[int, int, int]] = {
    "gsm8k": (75, 700, 130),
    "gsm8k-cot": (75, 900, 110),
    "mmlu": (105, 57 * 450, 0),
    "mmlu-cloze": (130, 57 * 450, 0),
    "gsm8k-mini": (60, 0, 43),
    "mmlu-mini": (60, 0, 0),
    "wikitext": (4_400, 0, 0),
}


_SIZE = r"(\d+(?:\.\d+)?)([MBT])"


def is_size(text: str) -> bool:
    """Tell whether a model is named by its size alone: 70B, 135M."""
    return re.fullmatch(_SIZE, text, re.IGNORECASE) is not None


def parse_model(text: str, folder: Callable[[str], Path]) -> Shape:
    """Read a size (70B, 135M) as the nearest public shape, or a model's own configuration from its
    folder.
    """
    size = re.fullmatch(_SIZE, text, re.IGNORECASE)
    if size:
        if float(size[1]) <= 0:
            raise HarnessError(f"a model of {text} parameters is none; write for example 7B")
        return shape_of_size(float(size[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[size[2].upper()])
    if re.fullmatch(r"\d+(\.\d+)?\w?", text):
        raise HarnessError(
            f"{text!r} is no size of a model; write for example 7B or 135M, or name a model"
        )
    found = Shape.of_folder(folder(text), name=text)
    if found.experts > 1:
        raise HarnessError(
            f"{text} is a mixture of {found.experts} experts, and the plan's formulas are for "
            "dense models"
        )
    return found


def cut_parameters(folder: Path, shape: Shape) -> float:
    """Return the parameters of a stored model once it is cut to a shape: the stored ones, by the
    ratio of the two shapes.
    """
    return parameters_on_disk(folder) * shape.parameters / Shape.of_folder(folder).parameters


def _same_shape(shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one stage of a chain asks of the machine."""

    trains: bool = False
    reads_teacher: bool = False  # a forward pass of the teacher's at every seen token
    # what no cache holds: its hidden states, its view of the student's own texts; or none is wanted
    reads_live_teacher: bool = False
    several_teachers: bool = False  # all of them are read
    writes_traces: bool = False
    changes_weights: bool = False  # weights without training
    bits: float | None = None  # of a weight afterwards
    calibrates: tuple[int, int] = (0, 0)  # sequences and the tokens of each that are read first
    starts_from_teacher: bool = False  # it starts from the teacher where it stands first
    # from the shape that it is given to that of its student
    student_shape: Callable[[Shape], Shape] = _same_shape


def workload_of(method: Method) -> Workload:
    """Return what a method with its settings asks for, by its own declaration."""
    return Workload(
        trains=method.trains,
        reads_teacher=method.trains and (method.needs_same_vocabulary or method.reads_teacher_live),
        reads_live_teacher=method.reads_teacher_live,
        several_teachers=method.needs_several_teachers,
        writes_traces=method.writes_traces,
        changes_weights=can_be_stage(method) and not method.trains,
        bits=method.bits_per_weight,
        calibrates=method.calibration_tokens() if method.calibrates else (0, 0),
        starts_from_teacher=method.starts_from == "teacher",
        student_shape=method.resulting_shape,
    )


def training_bytes(
    work: Workload, parameters: float, teachers: Sequence[Path], dtype: str
) -> float:
    """Return the bytes that training holds whatever its batches: the states of a student, and
    teachers that no cache stands for.
    """
    beside = (
        [weight_bytes(folder, dtype) for folder in teachers] if work.reads_live_teacher else [0]
    )
    return TRAINING_BYTES_PER_WEIGHT * parameters + (
        sum(beside) if work.several_teachers else min(beside)
    )


@dataclass(frozen=True, kw_only=True)
class EstimateRequest:
    """What is to be estimated."""

    teacher: Shape
    student: Shape
    chain: tuple[str, ...]
    budget: int  # seen tokens
    rows: int
    micro_batch_size: int = 16
    samples: int = 1  # traces a row
    items: Mapping[str, int]  # task -> items to score
    mini: bool = False  # all tasks are the generated ones: short rows
    validation_rows: int = 200
    grid: str = ""  # of the stopwatches; "": nothing is timed
    rounds: int = 6
