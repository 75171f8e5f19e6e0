"""torchao's formats through transformers: int8 weights, the same with int8 activations a token, and
int4 in groups on a GPU.

Needs the `quant` extra. The same roundings as `int8`, `int8-dynamic` and `int4` in the library's
own checkpoint and kernels, for who serves that format. Table and head stay floats, as transformers
leaves them. Cost: seconds, no data. Fails at speed on a CPU: without torch.compile its int8 weights
are turned into floats before every product. Source: https://github.com/pytorch/ao
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
        """Return 8 bits and a scale for each row; of int4 4 bits, and a scale and a zero of 16 for
        each group.
        """
        return 4 + 32 / self.group_size if self.scheme == "int4" else 8.1

    def compress(self, job: Job) -> Checkpoint:
        """Let transformers pack the model while it opens it."""
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

        making = StudentBuilder(job, "torchao", plain=True)
        wanted = count_matrices(making.model, "torchao")
        # int4's kernel multiplies bf16 alone
        dtype = torch.bfloat16 if self.scheme == "int4" else stored_dtype(making.base)
        with explaining_library_errors(f"torchao[scheme={self.scheme}]", "torchao", making.base):
            packed = AutoModelForCausalLM.from_pretrained(
                making.base.path,
                quantization_config=TorchAoConfig(self._asked()),
                dtype=dtype,
                device_map=job.device,
            )
            count = sum(
                type(module.weight.data).__module__.startswith("torchao.")
                for module in packed.modules()
                if _is_matrix(module)
            )
        if count != wanted:
            raise CellFailed(
                f"torchao[scheme={self.scheme}]: {count} of {wanted} matrices were packed (int4's "
                f"group of {self.group_size} must divide "
                "every row); use int8 or int4"
            )
        told: dict[str, Any] = {
            "library": "torchao",
            "scheme": self.scheme,
            "packed_layers": count,
            "table_and_head": "skip",
        }
        return save_library_student(
            making,
            packed.eval(),
            told | ({"group_size": self.group_size} if self.scheme == "int4" else {}),
        )

    def _asked(self) -> Any:
        """Return the library's own settings; its changes of torch's global ones (float32 precision)
        are refused.
        """
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
        kind = (
            Int8WeightOnlyConfig if self.scheme == "int8" else Int8DynamicActivationInt8WeightConfig
        )
        # an activation's row is a token
        return kind(granularity=PerRow(), set_inductor_config=False)


def _is_matrix(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)
