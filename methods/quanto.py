"""optimum's quanto: weights in 2, 4 or 8 bits, kept as the floats that they stand for. Needs the
`quant` extra.

quanto is in maintenance: `quantize(); save_pretrained()` reloads random weights with only a
warning, and what its own class writes plain transformers cannot open. So this row is about accuracy
alone; it prints no size and no speed. Cost: seconds, no data.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.compression.base import Compressed


@settings
class Quanto(Compressed):
    """Weights in 2, 4 or 8 bits by optimum's quanto, kept as the floats they stand for."""

    needs_plain: ClassVar[bool] = True
    family: ClassVar[Family] = "quantization"
    simulated: ClassVar[bool] = True  # transformers cannot save quanto's packed form: accuracy only

    bits: Literal[2, 4, 8] = 4

    def compress(self, job: Job) -> Checkpoint:
        """Quantise with quanto, write the values that it stands for."""
        from methods.compression.external import (
            count_matrices,
            explaining_library_errors,
            require_package,
        )

        require_package("optimum.quanto", "quant")
        from harness.errors import CellFailed
        from methods.compression.base import StudentBuilder

        making = StudentBuilder(job, "quanto", plain=True)
        wanted = count_matrices(making.model, "quanto")
        head = making.model.get_output_embeddings()
        left = [name for name, module in making.model.named_modules() if module is head]

        with explaining_library_errors(f"quanto[bits={self.bits}]", "optimum-quanto", making.base):
            count = _quantize(making.model, self.bits, left)
        if count != wanted:
            raise CellFailed(
                f"quanto: {count} of {wanted} matrices were quantised; use int8 or int4"
            )
        notes = {
            "library": "optimum-quanto",
            "bits": self.bits,
            "packed_layers": count,
            "table_and_head": "skip",
            "simulated": True,
        }
        return making.save(notes=notes, dtype="float32")  # a scale times a code is no bf16 number


def _quantize(model: Any, bits: int, left: Sequence[str]) -> int:
    """Quantise a model's matrices but those `left` out, and put the floats that they stand for in
    their places; return how many.
    """
    import torch
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"), exclude=left or None)
    quanto.freeze(model)
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, quanto.QLinear):
            plain = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None
            )
            plain.weight.data = module.weight.dequantize()
            if module.bias is not None:
                plain.bias.data = module.bias.data
            model.set_submodule(name, plain)
            count += 1
    return count
