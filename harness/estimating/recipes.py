"""Tells by formula which recipes of training fit a device, and what would where none does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from harness.errors import HarnessError
from harness.estimating.estimate import StageEstimate, student_stages
from harness.estimating.hardware import GIB, GPUS, Hardware, smallest_gpu, this_machine
from harness.estimating.memory import USABLE
from harness.estimating.requests import request_of_run
from harness.estimating.workload import (
    EstimateRequest,
    Packed,
    packed_as,
    parameter_factor,
    workload_of,
)
from harness.models.shape import Shape
from harness.planning.recipes import NamedMethod, TrainingFit
from harness.planning.setup import Setup


@dataclass(frozen=True)
class RecipesThatFit:
    """What training needs on some hardware; answers `harness.planning.recipes.TrainingFits`."""

    request: EstimateRequest
    hardware: Hardware
    # stored weights of teacher and student for each one of their shapes' formula
    teacher_factor: float = 1.0
    student_factor: float = 1.0
    student_packed: Packed | None = None  # how the weights of the student are packed

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        """Return what tells it of a run on this machine; None where a model's shape is unknown."""
        models, resolved = setup.models, setup.resolved
        try:
            request = request_of_run(
                setup.config,
                teacher=Shape.of_folder(models.teachers[0].path, name=models.teachers[0].name),
                base=Shape.of_folder(models.base.path, name=models.base.name),
                tasks=tuple(setup.versions),
                budget=setup.budget,
                grid="",
            )
            return cls(
                request,
                this_machine(resolved.device, [], dtype=resolved.dtype),
                parameter_factor(models.teachers[0].path),
                parameter_factor(models.base.path),
                packed_as(models.base.path),
            )
        except HarnessError:
            return None

    @property
    def lacks_bf16(self) -> str:
        """The name of the hardware where it has no bf16, "" where it has."""
        is_old = self.hardware.kind == "cuda" and self.hardware.value_bytes == 4
        return self.hardware.name if is_old else ""

    def fit(self, stages: Sequence[NamedMethod]) -> TrainingFit:
        """Return whether the training of the last stage fits."""
        training = self._training(stages, self.request.student)
        as_set = training.memory_as_set <= training.memory_limit
        return TrainingFit(
            needed=training.memory_as_set,
            least=training.memory,
            memory=self.hardware.memory,
            fits=as_set,
            smaller=training.note if training.fits and not as_set else "",
            device=self.hardware.name,
        )

    def _training(self, stages: Sequence[NamedMethod], student: Shape) -> StageEstimate:
        """Estimate the training of the last stage, of a student that the recipe cuts so."""
        from_teacher = workload_of(stages[0][1]).starts_from_teacher
        shape = self.request.teacher if from_teacher else student
        factor = self.teacher_factor if from_teacher else self.student_factor
        packed = None if from_teacher else self.student_packed
        for _, method in stages[:-1]:
            stage = workload_of(method)
            shape, packed = stage.student_shape(shape), stage.packed or packed
        name, method = stages[-1]
        workload = replace(workload_of(method), parameter_factor=factor, packed_start=packed)
        request = replace(
            self.request, micro_batch_size=method.rows_at_once, samples=method.answers_per_row
        )
        return student_stages(name, workload, shape, request, self.hardware)[-1]

    def refusal(self, stages: Sequence[NamedMethod], needed: float) -> str:
        """Say what the smallest recipe of a stage needs, on which card it fits, which student here.

        `needed` is the bytes of a device at its peak.
        """
        name, method = stages[-1]
        chain = "+".join(stage for stage, _ in stages)
        share = 1.0 if self.hardware.kind == "cpu" else USABLE
        card = smallest_gpu(needed / share, bf16=method.recipe == "bf16")
        advice = [f"a card such as {card} ({GPUS[card].memory:g} GiB)"] if card else []
        return (
            f"{chain} fits no recipe here: {name}[recipe={method.recipe}], the smallest, needs "
            f"{needed / GIB:,.1f} GiB, and {self.hardware.name} has "
            f"{self.hardware.memory / GIB:,.1f} GiB; give "
            f"{' or '.join([*advice, self._largest_student(stages)])}"
        )

    def _largest_student(self, stages: Sequence[NamedMethod]) -> str:
        """Name the largest student that fits: this one's shape with fewer blocks."""
        if workload_of(stages[0][1]).starts_from_teacher:
            return "a stage before it that cuts the teacher further"
        student = self.request.student
        for blocks in range(student.layers - 1, 0, -1):
            smaller = student.shallower(blocks / student.layers)
            if self._training(stages, smaller).fits:
                return (
                    f"a --student of at most {smaller.parameters / 1e9:.2g} billion parameters "
                    f"(such as this one with {blocks} of its {student.layers} blocks)"
                )
        return "a --student that is narrower: one block of this one does not fit"
