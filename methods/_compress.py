"""What methods without training share: their settings, opening what they change, saving it, saying what it cost. No torch at import."""

import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods._base import settings

if TYPE_CHECKING:
    from harness.model import LanguageModel
    from methods._calibration import Calibration


@settings
class Compressed:
    """A method that changes weights without training. In a chain it changes the stage before it, else the teacher."""

    family: ClassVar[str] = "pruning"
    controls: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False
    is_control: ClassVar[bool] = False
    same_vocabulary: ClassVar[bool] = False
    needs_plain: ClassVar[bool] = False  # works on the architecture's own shapes alone

    def hands_on(self) -> Mapping[str, object]:
        """Return settings that this row's controls take over, where they have them."""
        return {}


@settings
class Calibrated(Compressed):
    """A method that reads training text first."""

    calibration: Literal["auto", "train", "c4"] = "auto"  # auto: the tasks' train split, C4 of the data folder where there is none
    sequences: Annotated[int, Field(ge=1, le=4096)] = 128
    tokens: Annotated[int, Field(ge=8, le=8192)] = 256  # of each

    def calibrate(self, job: Job, opened: "LanguageModel") -> "Calibration":
        """Return the text, in tokens."""
        from methods._calibration import calibration

        return calibration(job, opened, source=self.calibration, sequences=self.sequences, tokens=self.tokens)


class Making:
    """One student in the making: opened in full precision, changed, saved; `cost.json` says what it took."""

    def __init__(self, job: Job, method: str, *, plain: bool = False) -> None:
        from harness.arithmetic import parameters_on_disk
        from harness.errors import CellFailed
        from harness.model import open_model, quantized_by

        self.job, self.method = job, method
        self.base = job.student_base
        self.began = time.perf_counter()
        packed = quantized_by(self.base.path)
        if packed and packed != "float":
            raise CellFailed(f"{method}: {self.base.name} is quantized already ({packed}); start from the floats that it was made of")
        if plain and packed:
            raise CellFailed(f"{method}: {self.base.name} has factors or widths of its own; it needs the architecture's own shapes")
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

        from harness.model import save_student, stored_dtype

        kind = getattr(torch, dtype) if dtype else stored_dtype(self.base)
        made = save_student(self.opened, self.job.workdir / "student", name=self.method, dtype=kind, parents=(self.base.digest,))
        return self._told(made, notes, flops)

    def save_as(self, write: "Callable[[Any], None]", *, notes: Mapping[str, Any], flops: float = 0.0) -> Checkpoint:
        """Let `write` fill the student's folder, whole or not at all."""
        from harness.checkpoint import describe, save_atomically, weight_files

        def whole(fresh: Any) -> None:
            write(fresh)
            for path in weight_files(fresh):
                path.chmod(0o644)

        folder = self.job.workdir / "student"
        save_atomically(folder, whole)
        return self._told(describe(folder, name=self.method, parents=(self.base.digest,)), notes, flops)

    def _told(self, made: Checkpoint, notes: Mapping[str, Any], flops: float) -> Checkpoint:
        from harness.checkpoint import write_whole
        from harness.memory import process_bytes

        on_gpu = self.job.device.startswith("cuda")
        if on_gpu:
            import torch

            peak: int | None = int(torch.cuda.max_memory_allocated())
        else:
            peak = process_bytes("VmHWM")
        seconds = time.perf_counter() - self.began
        told = {**notes, "bytes_before": self.base.bytes_on_disk, "bytes_after": made.bytes_on_disk}
        cost = {"seconds": seconds, "device_seconds": seconds, "peak_bytes": peak, "flops": flops, "notes": {self.method: told}}
        write_whole(self.job.workdir / "cost.json", json.dumps(cost, indent=1))
        return made


def calibration_flops(making: Making, data: "Calibration", passes: int) -> float:
    """Return the FLOPs of reading the calibration text so many times."""
    from harness.arithmetic import forward_flops_per_token

    count, length = data.ids.shape
    return passes * count * length * forward_flops_per_token(making.model, length)
