"""quanto of optimum: weights in 2, 4 or 8 bits, saved as floats; needs the `quant` extra.

quanto is in maintenance. After `quantize(); save_pretrained()` random weights are loaded with only
a warning, and plain transformers cannot open the files of quanto's own class. So this row measures
accuracy alone, without size and speed. Cost: seconds, no data.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.compression.base import Compressed


@settings
class Quanto(Compressed):
    """Weights in 2, 4 or 8 bits by optimum's quanto, saved as floats."""

    needs_plain: ClassVar[bool] = True
    family: ClassVar[Family] = "quantization"
    simulated: ClassVar[bool] = True  # transformers cannot save quanto's packed form: accuracy only

    bits: Literal[2, 4, 8] = 4

    def compress(self, job: Job) -> Checkpoint:
        """Quantise with quanto, and save the dequantised weights."""
        from methods.compression.external import (
            count_matrices,
            explaining_library_errors,
            require_package,
        )

        require_package("optimum.quanto", "quant")
        from harness.errors import CellFailed
        from methods.compression.base import StudentBuilder

        builder = StudentBuilder(job, "quanto", plain=True)
        expected = count_matrices(builder.model, "quanto")
        head = builder.model.get_output_embeddings()
        excluded = [name for name, module in builder.model.named_modules() if module is head]

        with explaining_library_errors(f"quanto[bits={self.bits}]", "optimum-quanto", builder.base):
            count = _quantize(builder.model, self.bits, excluded)
        if count != expected:
            raise CellFailed(
                f"quanto: {count} of {expected} matrices were quantised; use int8 or int4"
            )
        notes = {
            "library": "optimum-quanto",
            "bits": self.bits,
            "packed_layers": count,
            "table_and_head": "skip",
            "simulated": True,
        }
        return builder.save(notes=notes, dtype="float32")  # bf16 cannot hold a scale times a code


def _quantize(model: Any, bits: int, exclude: Sequence[str]) -> int:
    """Quantise a model's matrices and put their dequantised values back; return how many.

    Modules named in `exclude` stay as they are.
    """
    import torch
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"), exclude=exclude or None)
    quanto.freeze(model)
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, quanto.QLinear):
            dequantized = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None
            )
            dequantized.weight.data = module.weight.dequantize()
            if module.bias is not None:
                dequantized.bias.data = module.bias.data
            model.set_submodule(name, dequantized)
            count += 1
    return count
