"""What writing a student in some form changed. No torch."""

from pathlib import Path
from typing import NamedTuple

# what a student can be exported as
STUDENT_FORMS = ("safetensors", "compressed-tensors", "gguf")
# kinds of GGUF tensors that are written; auto: of each matrix the smallest that holds its codes
GGUF_KINDS = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")


class Written(NamedTuple):
    """A student in another form: what opens it, and how far its weights are from the student's."""

    path: Path  # a model folder, or a GGUF file
    # of a weight, relative to the largest of its tensor; 0 where every weight is equal
    largest_change: float
    notes: tuple[str, ...]  # a line each
