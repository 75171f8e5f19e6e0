"""Int8: weights in eight bits with one scale an output channel; activations as they are, or in
eight bits too.

`int8`: symmetric round to nearest, `w_hat = scale * code`, scale = max|w| / 127 (LLM.int8(),
Dettmers et al., 2022, without the outlier part: weights alone need none). `int8-dynamic`: the same
weights; every token's activations get a scale of their own (SmoothQuant's O2, Xiao et al., 2023).
PyTorch's own dynamic kernel takes one scale for the whole batch, so an answer would depend on its
neighbours; ours divides each row by its largest magnitude first.

Cost: seconds, no data. Fails where activations have outliers (`int8-dynamic`). Prompts are bound by
arithmetic, not by reading weights: `int8` gains there only on processors with bf16 instructions.
"""

from typing import ClassVar

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.quantized import Quantized, pack_student


@settings
class Int8(Quantized):
    """Weights in int8, one scale an output channel."""

    _kind: ClassVar[str] = "int8"

    @property
    def bits_per_weight(self) -> float:
        """Return 8 bits and a scale of 16 for each row, of 160 inputs or more."""
        return 8.1

    def compress(self, job: Job) -> Checkpoint:
        """Round every matrix to the nearest code."""
        from methods.compression.base import StudentBuilder
        from methods.compression.layers import layers_of
        from methods.compression.rounding import round_to_nearest

        making = StudentBuilder(job, self._kind)
        layers = layers_of(making.model, skip=self.ignore, method=self._kind)
        return pack_student(
            job,
            making,
            self,
            layers,
            lambda name, layer: round_to_nearest(layer.weight, bits=8),
            kind=self._kind,
            notes={},
        )


@settings
class Int8Dynamic(Int8):
    """Weights and activations in int8, an activation scale for every token."""

    _kind: ClassVar[str] = "int8-dynamic"
