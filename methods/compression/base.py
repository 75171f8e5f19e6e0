"""What methods without training share: their settings, opening what they change, saving it, saying
what it cost. No torch at import.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from harness.contract import Checkpoint, Family, Job, Method, Start
from harness.renames.modules import by_old_name
from methods.base import settings


@settings
class Compressed(Method):
    """A method that changes weights without training. In a chain it changes the stage before it,
    else the teacher.
    """

    family: ClassVar[Family] = "pruning"
    starts_from: ClassVar[Start] = "teacher"


class StudentBuilder:
    """One student in the making: opened in full precision, changed, saved; `cost.json` says what it
    took.
    """

    def __init__(self, job: Job, method: str, *, plain: bool = False) -> None:
        from harness.errors import CellFailed
        from harness.models.language_model import open_model
        from harness.models.resolve import quantized_by
        from harness.models.shape import parameters_on_disk

        self.job, self.method = job, method
        self.base = job.student_base
        self.began = time.perf_counter()
        packed = quantized_by(self.base.path)
        if packed and packed != "float":
            raise CellFailed(
                f"{method}: {self.base.name} is quantized already ({packed}); start from the "
                "floats that it was made of"
            )
        if plain and packed:
            raise CellFailed(
                f"{method}: {self.base.name} has factors or widths of its own; it needs the "
                "architecture's own shapes"
            )
        dtype = "float32" if job.device == "cpu" else job.dtype
        self.opened = open_model(self.base, device=job.device, dtype=dtype)
        self.opened.model.requires_grad_(False)
        self.parameters_before = parameters_on_disk(self.base.path)

    @property
    def model(self) -> Any:
        """The opened model."""
        return self.opened.model

    def bits(self, written: int) -> float:
        """Return how many bits so many bytes are for each weight of the model as it was."""
        return round(8 * written / self.parameters_before, 3)

    def save(self, *, notes: Mapping[str, Any], flops: float = 0.0, dtype: str = "") -> Checkpoint:
        """Save the changed model as floats, of the base's own type unless another is named."""
        import torch

        from harness.models.language_model import stored_dtype
        from harness.models.shaping import save_student

        kind = getattr(torch, dtype) if dtype else stored_dtype(self.base)
        made = save_student(
            self.opened,
            self.job.workdir / "student",
            name=self.method,
            dtype=kind,
            parents=(self.base.digest,),
        )
        return self._told(made, notes, flops)

    def save_as(
        self, write: "Callable[[Any], None]", *, notes: Mapping[str, Any], flops: float = 0.0
    ) -> Checkpoint:
        """Let `write` fill the student's folder, whole or not at all."""
        from harness.files.writing import save_atomically
        from harness.models.checkpoint import describe, weight_files

        def whole(fresh: Any) -> None:
            write(fresh)
            for path in weight_files(fresh):
                path.chmod(0o644)

        folder = self.job.workdir / "student"
        save_atomically(folder, whole)
        return self._told(
            describe(folder, name=self.method, parents=(self.base.digest,)), notes, flops
        )

    def _told(self, made: Checkpoint, notes: Mapping[str, Any], flops: float) -> Checkpoint:
        from harness.files.writing import write_atomically
        from harness.machine.memory import process_bytes

        on_gpu = self.job.device.startswith("cuda")
        if on_gpu:
            import torch

            peak: int | None = int(torch.cuda.max_memory_allocated())
        else:
            peak = process_bytes("VmHWM")
        seconds = time.perf_counter() - self.began
        told = {**notes, "bytes_before": self.base.bytes_on_disk, "bytes_after": made.bytes_on_disk}
        cost = {
            "seconds": seconds,
            "device_seconds": seconds,
            "peak_bytes": peak,
            "flops": flops,
            "notes": {self.method: told},
        }
        write_atomically(self.job.workdir / "cost.json", json.dumps(cost, indent=1))
        return made


__getattr__ = by_old_name(__name__)
