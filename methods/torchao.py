"""Formats of torchao through transformers: int8, int8 with dynamic activations, int4 on a GPU.

Needs the `quant` extra. These are the roundings of `int8`, `int8-dynamic` and `int4` in torchao's
own checkpoint and kernels, for users who serve that format. Table and head stay floats, as
transformers leaves them. Cost: seconds, no data. Slow on a CPU: without torch.compile its int8
weights are converted to floats before every product. Source: https://github.com/pytorch/ao
"""

from typing import Any, ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.compression.base import Compressed


@settings
class TorchAo(Compressed):
    """Weights in torchao's int8 or int4."""

    needs_plain: ClassVar[bool] = True
    family: ClassVar[Family] = "quantization"

    scheme: Literal["int8", "int8-dynamic", "int4"] = "int8"  # int4 needs a GPU
    group_size: Literal[32, 64, 128, 256] = 64  # of int4: weights that share a scale

    @property
    def bits_per_weight(self) -> float:
        """Return 8 bits and a row's scale; for int4 4 bits and a group's scale and zero point."""
        return 4 + 32 / self.group_size if self.scheme == "int4" else 8.1

    def compress(self, job: Job) -> Checkpoint:
        """Let transformers quantise the model while it opens it."""
        from harness.errors import CellFailed, Skipped
        from methods.compression.external import (
            count_matrices,
            explaining_library_errors,
            require_package,
            save_library_student,
        )

        require_package("torchao", "quant")
        if self.scheme == "int4" and not job.device.startswith("cuda"):
            raise Skipped(
                "torchao's int4 kernels run on a GPU; int4 is the same rounding on any machine"
            )
        import torch
        from transformers import AutoModelForCausalLM, TorchAoConfig

        from harness.models.language_model import stored_dtype
        from methods.compression.base import StudentBuilder

        builder = StudentBuilder(job, "torchao", plain=True)
        expected = count_matrices(builder.model, "torchao")
        # int4's kernel multiplies bf16 only
        dtype = torch.bfloat16 if self.scheme == "int4" else stored_dtype(builder.base)
        with explaining_library_errors(f"torchao[scheme={self.scheme}]", "torchao", builder.base):
            packed = AutoModelForCausalLM.from_pretrained(
                builder.base.path,
                quantization_config=TorchAoConfig(self._library_settings()),
                dtype=dtype,
                device_map=job.device,
            )
            count = sum(
                type(module.weight.data).__module__.startswith("torchao.")
                for module in packed.modules()
                if _is_matrix(module)
            )
        if count != expected:
            raise CellFailed(
                f"torchao[scheme={self.scheme}]: {count} of {expected} matrices were packed (int4 "
                f"needs rows that group_size={self.group_size} divides); use int8 or int4"
            )
        notes: dict[str, Any] = {
            "library": "torchao",
            "scheme": self.scheme,
            "packed_layers": count,
            "table_and_head": "skip",
        }
        if self.scheme == "int4":
            notes["group_size"] = self.group_size
        return save_library_student(builder, packed.eval(), notes)

    def _library_settings(self) -> Any:
        """Return torchao's configuration, which must not change torch's global settings."""
        from torchao.quantization import (
            Int4WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
        )

        if self.scheme == "int4":
            # the layout of PyTorch's own kernel; torchao's default layout needs another package
            return Int4WeightOnlyConfig(
                group_size=self.group_size,
                int4_packing_format="tile_packed_to_4d",
                set_inductor_config=False,
            )
        config = (
            Int8WeightOnlyConfig if self.scheme == "int8" else Int8DynamicActivationInt8WeightConfig
        )
        # a row of activations is a token
        return config(granularity=PerRow(), set_inductor_config=False)


def _is_matrix(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)
