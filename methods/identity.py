"""Control: the teacher itself, saved again and scored as a student.

It rules out a scorer that treats teacher and student differently: retention must be 100 %, flips 0.
"""

from typing import ClassVar

from harness.contract import Checkpoint, Family, Job, Method, Start
from methods.base import settings


@settings
class Identity(Method):
    """The teacher's weights, saved again and scored as a student (control: must keep 100 %)."""

    family: ClassVar[Family] = "control"
    starts_from: ClassVar[Start] = "teacher"
    is_control: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Open the teacher, and save it as a student is saved."""
        from harness.models.language_model import open_model, stored_dtype
        from harness.models.resolve import quantized_by
        from harness.models.shaping import copy_student, save_student

        if quantized_by(job.teacher.path) not in ("", "float"):
            return copy_student(job.teacher, job.workdir / "student", name="identity")
        opened = open_model(job.teacher, device="cpu", dtype=job.dtype)
        return save_student(
            opened,
            job.workdir / "student",
            name="identity",
            dtype=stored_dtype(job.teacher),
            parents=(job.teacher.digest,),
        )
