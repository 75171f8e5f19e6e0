"""GPTQ by optimum and gptqmodel, on a GPU; needs the `gptq` extra.

`int4-calibrated` is the same rounding on any machine. It calibrates on training text only. Cost:
minutes on one GPU. Fails without CUDA: its kernels are for GPUs.
"""

from typing import ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.compression.calibrated import Calibrated


@settings
class Gptq(Calibrated):
    """Weights in int4 by optimum's GPTQ, on a GPU."""

    needs_plain: ClassVar[bool] = True
    family: ClassVar[Family] = "quantization"
    controls: ClassVar[tuple[str, ...]] = ("int4",)

    group_size: Literal[32, 64, 128] = 128

    @property
    def bits_per_weight(self) -> float:
        """Return 4 bits, and those of a group's scale, zero point and index."""
        return 4 + 25.6 / self.group_size

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it rounds the same groups."""
        return {"group_size": self.group_size}

    def compress(self, job: Job) -> Checkpoint:
        """Let optimum quantise the model with the calibration text."""
        from harness.errors import CellFailed, Skipped
        from methods.compression.external import (
            count_matrices,
            explaining_library_errors,
            require_package,
            save_library_student,
        )

        if not job.device.startswith("cuda"):
            raise Skipped("gptq runs on a GPU; int4-calibrated is the same rounding on any machine")
        require_package("gptqmodel", "gptq")
        from torch import nn

        from methods.compression.base import StudentBuilder

        builder = StudentBuilder(job, "gptq", plain=True)
        count = count_matrices(builder.model, "gptq")
        data = self.calibrate(job, builder.opened)
        texts = builder.opened.tokenizer.batch_decode(data.ids)
        with explaining_library_errors("gptq", "gptqmodel", builder.base):
            from optimum.gptq import GPTQQuantizer

            quantizer = GPTQQuantizer(
                bits=4,
                group_size=self.group_size,
                dataset=texts,
                model_seqlen=int(data.ids.shape[1]),
            )
            packed = quantizer.quantize_model(builder.model, builder.opened.tokenizer)
        head = packed.get_output_embeddings()
        not_packed = [
            name
            for name, module in packed.named_modules()
            if type(module) is nn.Linear and module is not head
        ]
        if not_packed:
            raise CellFailed(
                f"gptq: {len(not_packed)} of {count} matrices were not packed, for example "
                f"{not_packed[0]}; use int4-calibrated"
            )
        notes = {
            "library": "optimum+gptqmodel",
            "bits": 4,
            "group_size": self.group_size,
            "packed_layers": count,
            "table_and_head": "skip",
            "calibration": dict(data.description),
        }
        return save_library_student(
            builder, packed, notes, save=lambda folder: quantizer.save(packed, folder)
        )
