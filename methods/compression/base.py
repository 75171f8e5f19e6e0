"""What methods without training share: their settings, opening the model, saving it, and its cost.

Importing this module imports no torch.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.contract import Checkpoint, Family, Job, Method, Start
from harness.renames.modules import by_old_name
from methods.base import settings

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from harness.models.student_writers import StudentWriter


@settings
class Compressed(Method):
    """Settings of a method that changes weights without training.

    In a chain it changes the student of the stage before it; first in a chain, the teacher.
    """

    family: ClassVar[Family] = "pruning"
    starts_from: ClassVar[Start] = "teacher"


class StudentBuilder:
    """Opens a model in full precision and saves what a method made of it as the student.

    Saving also writes `cost.json`: seconds, peak memory, FLOPs and the method's notes.
    """

    def __init__(
        self,
        job: Job,
        method: str,
        *,
        plain: bool = False,
        blockwise: bool = False,
        saved_dtype: str = "",
    ) -> None:
        """Open the base model.

        `plain`: the method needs the architecture's own shapes. `blockwise`: it works through
        `writer`, and the model's blocks stay in their files where the model allows that. Floats are
        saved in the base's own type, unless `saved_dtype` names another. Raises `CellFailed` for a
        base that is quantized, and with `plain` for one with low-rank factors or widths of its own.
        """
        from harness.errors import CellFailed
        from harness.models.resolve import quantized_by
        from harness.models.shape import parameters_on_disk

        self.job, self.method = job, method
        self.base = job.student_base
        self.start_time = time.perf_counter()
        quantization = quantized_by(self.base.path)
        if quantization and quantization != "float":
            raise CellFailed(
                f"{method}: {self.base.name} is quantized already ({quantization}); start from the "
                "model before quantization"
            )
        if plain and quantization:
            raise CellFailed(
                f"{method}: {self.base.name} has low-rank factors or widths of its own; start from "
                "a model with the architecture's own shapes"
            )
        self.saved_dtype = saved_dtype
        self.opened, self.writer = self._open(blockwise=blockwise)
        self.opened.model.requires_grad_(False)
        self.parameters_before = parameters_on_disk(self.base.path)

    def _open(self, *, blockwise: bool) -> "tuple[LanguageModel, StudentWriter]":
        """Open the base block by block, if that is asked for and the model allows it, or whole."""
        from harness.models.blockwise import open_blockwise
        from harness.models.language_model import open_model
        from harness.models.student_writers import BlockwiseWriter, WholeWriter

        job, saved_dtype = self.job, self._dtype(self.saved_dtype)
        dtype = "float32" if job.device == "cpu" else job.dtype
        opened = open_blockwise(self.base, device=job.device, dtype=dtype) if blockwise else None
        if opened is not None:
            return opened[0], BlockwiseWriter(*opened, saved_dtype, job.workdir)
        opened_model = open_model(self.base, device=job.device, dtype=dtype)
        return opened_model, WholeWriter(opened_model, saved_dtype)

    def replace_model(self, model: Any) -> None:
        """Put another model in the place of the opened one, to be saved; None drops that one."""
        from harness.models.student_writers import WholeWriter

        self.opened = replace(self.opened, model=model)
        self.writer = WholeWriter(self.opened, self.writer.dtype)

    def _dtype(self, name: str) -> Any:
        """Return the type that floats are saved in: this one, or the base's own for ""."""
        import torch

        from harness.models.language_model import stored_dtype

        return getattr(torch, name) if name else stored_dtype(self.base)

    @property
    def model(self) -> Any:
        """The opened model."""
        return self.opened.model

    def bits(self, bytes_on_disk: int) -> float:
        """Return the bits that a file of this many bytes takes for each weight of the base."""
        return round(8 * bytes_on_disk / self.parameters_before, 3)

    def save(self, *, notes: Mapping[str, Any], flops: float = 0.0, dtype: str = "") -> Checkpoint:
        """Save the changed model as floats, in the base's own type unless `dtype` names another.

        A method that works block by block names that type at the beginning, as `saved_dtype`.
        """
        if dtype:
            self.writer.dtype = self._dtype(dtype)
        student = self.writer.save_floats(
            self.job.workdir / "student", name=self.method, parents=(self.base.digest,)
        )
        self._write_cost(student, notes, flops)
        return student

    def save_as(
        self, write: Callable[[Path], None], *, notes: Mapping[str, Any], flops: float = 0.0
    ) -> Checkpoint:
        """Let `write(folder)` write the student's files; it appears only when complete.

        `write` may still add to `notes`.
        """
        from harness.files.writing import save_atomically
        from harness.models.checkpoint import describe, weight_files

        def write_readable(folder: Path) -> None:
            write(folder)
            for path in weight_files(folder):
                path.chmod(0o644)

        folder = self.job.workdir / "student"
        save_atomically(folder, write_readable)
        student = describe(folder, name=self.method, parents=(self.base.digest,))
        self._write_cost(student, notes, flops)
        return student

    def _write_cost(self, student: Checkpoint, notes: Mapping[str, Any], flops: float) -> None:
        """Write `cost.json`: what making the student took."""
        from harness.files.writing import write_atomically

        seconds = time.perf_counter() - self.start_time
        sizes = {"bytes_before": self.base.bytes_on_disk, "bytes_after": student.bytes_on_disk}
        cost = {
            "seconds": seconds,
            "device_seconds": seconds,
            "peak_bytes": self._peak_bytes(),
            "flops": flops,
            "notes": {self.method: {**notes, **sizes}},
        }
        write_atomically(self.job.workdir / "cost.json", json.dumps(cost, indent=1))

    def _peak_bytes(self) -> int | None:
        """Return the peak memory of the GPU, else of this process."""
        from harness.machine.memory import process_bytes

        if not self.job.device.startswith("cuda"):
            return process_bytes("VmHWM")
        import torch

        return int(torch.cuda.max_memory_allocated())


__getattr__ = by_old_name(__name__)
