"""GPTQ through optimum and gptqmodel, on a GPU. Needs the `gptq` extra; `int4-calibrated` is the
same rounding anywhere.

Calibrated on training text only. Cost: minutes on one GPU. Fails without CUDA: its kernels are for
GPUs.
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
        """Return 4 bits, and those of a scale, a zero and an index for each group."""
        return 4 + 25.6 / self.group_size

    def control_settings(self) -> dict[str, object]:
        """Its control rounds the same groups."""
        return {"group_size": self.group_size}

    def compress(self, job: Job) -> Checkpoint:
        """Hand the model and the text to optimum."""
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

        making = StudentBuilder(job, "gptq", plain=True)
        count = count_matrices(making.model, "gptq")
        data = self.calibrate(job, making.opened)
        texts = making.opened.tokenizer.batch_decode(data.ids)
        with explaining_library_errors("gptq", "gptqmodel", making.base):
            from optimum.gptq import GPTQQuantizer

            quantizer = GPTQQuantizer(
                bits=4,
                group_size=self.group_size,
                dataset=texts,
                model_seqlen=int(data.ids.shape[1]),
            )
            packed = quantizer.quantize_model(making.model, making.opened.tokenizer)
        head = packed.get_output_embeddings()
        left = [
            name
            for name, module in packed.named_modules()
            if type(module) is nn.Linear and module is not head
        ]
        if left:
            raise CellFailed(
                f"gptq: {len(left)} of {count} matrices were left as they are, for example "
                f"{left[0]}; use int4-calibrated"
            )
        told = {
            "library": "optimum+gptqmodel",
            "bits": 4,
            "group_size": self.group_size,
            "packed_layers": count,
            "table_and_head": "skip",
            "calibration": dict(data.told),
        }
        return save_library_student(
            making, packed, told, save=lambda folder: quantizer.save(packed, folder)
        )
