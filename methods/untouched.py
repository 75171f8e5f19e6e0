"""Control: the student before any training.

It rules out that the student was as good before the training as after it.
"""

from typing import ClassVar

from harness.contract import Checkpoint, Family, Job, Method, Start
from methods.base import settings


@settings
class Untouched(Method):
    """The student before any training (control)."""

    family: ClassVar[Family] = "control"
    starts_from: ClassVar[Start] = "student"
    is_control: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Build the student, and save it without training."""
        from harness.models.language_model import stored_dtype
        from harness.models.resolve import quantized_by
        from harness.models.shaping import copy_student, parse_student_cut, save_student, student_of

        if parse_student_cut(job.student) is None and quantized_by(job.student_base.path) not in (
            "",
            "float",
        ):
            return copy_student(job.student_base, job.workdir / "student", name="untouched")
        student = student_of(
            job.student, job.student_base, seed=job.seed, device="cpu", dtype=job.dtype
        )
        return save_student(
            student,
            job.workdir / "student",
            name="untouched",
            dtype=stored_dtype(job.student_base),
            parents=(job.student_base.digest,),
        )
