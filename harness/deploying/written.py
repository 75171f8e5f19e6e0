"""What writing a student in some form changed. No torch."""

from pathlib import Path
from typing import NamedTuple

# what a student can be exported as
STUDENT_FORMS = ("safetensors", "compressed-tensors")


class Written(NamedTuple):
    """A student in another form: what opens it, and how far its weights are from the student's."""

    path: Path  # a model folder, or a GGUF file
    largest_change: float  # of a weight, relative to it: 0 where every weight is equal
    notes: tuple[str, ...]  # a line each
