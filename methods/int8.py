"""Int8: weights in eight bits, one scale per output channel; activations as floats or in int8.

`int8`: symmetric round to nearest, `w_hat = scale * code`, scale = max|w| / 127 (LLM.int8(),
Dettmers et al., 2022, without the outlier part: weights alone need none). `int8-dynamic`: the same
weights, and int8 activations with one scale per token (SmoothQuant's O2, Xiao et al., 2023).
PyTorch's own dynamic kernel uses one scale for the whole batch, so that an answer would depend on
the other rows of its batch; ours divides each row by its largest magnitude first.

Cost: seconds, no data. Fails where activations have outliers (`int8-dynamic`). Prompts are bound by
arithmetic, not by reading weights: `int8` gains there only on processors with bf16 instructions.
"""

from typing import ClassVar

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.quantized import Quantized, pack_student


@settings
class Int8(Quantized):
    """Weights in int8, one scale per output channel."""

    works_by_block: ClassVar[bool] = True
    _kind: ClassVar[str] = "int8"

    @property
    def bits_per_weight(self) -> float:
        """Return 8 bits, and those of a 16-bit scale for a row of 160 inputs or more."""
        return 8.1

    def compress(self, job: Job) -> Checkpoint:
        """Round every matrix to the nearest code."""
        from methods.compression.base import StudentBuilder
        from methods.compression.layers import layers_of
        from methods.compression.rounding import round_to_nearest

        builder = StudentBuilder(job, self._kind, blockwise=True)
        layers = layers_of(builder.model, ignore=self.ignore, method=self._kind)
        return pack_student(
            job,
            builder,
            self,
            layers,
            lambda name, layer: round_to_nearest(layer.weight, bits=8),
            kind=self._kind,
            notes={},
        )


@settings
class Int8Dynamic(Int8):
    """Weights and activations in int8, one activation scale per token."""

    _kind: ClassVar[str] = "int8-dynamic"
