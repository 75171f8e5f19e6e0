"""FP8, NVFP4 and MXFP4: weights in small floats, simulated: accuracy only, no bytes and no speed.

`fp8` is E4M3 with an fp32 scale for each output channel. `nvfp4` is E2M1 in blocks of 16 inputs,
with E4M3 scales and one fp32 scale for the matrix; `mxfp4` is E2M1 in blocks of 32 with scales that
are powers of two (OCP Microscaling Formats v1.0). Weights are rounded exactly as the formats store
them and kept as fp32, on every device: activations stay floats, and no kernel of a GPU is used. A
model that another program stored in such a format is a row by `--checkpoint`, with its own bytes.

The control of each is the integers of as many bits: 8 (`int8`), 4.5 (`int4` in groups of 32) and
4.25 (in groups of 64). Table and head are int8's values as there. Cost: seconds, no data. Rounded
to nearest: no error is compensated.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.quantized import Quantized, simulate_student

if TYPE_CHECKING:
    from torch import Tensor


@settings
class _SmallFloats(Quantized):
    """Weights rounded to a format of small floats, and kept as what they stand for."""

    works_by_block: ClassVar[bool] = True
    simulated: ClassVar[bool] = True
    _name: ClassVar[str] = ""
    _stored_bits: ClassVar[float] = 0.0  # of a weight of a block with its scales, by the format

    def values(self, weight_OI: "Tensor") -> "Tensor":
        """Return what the stored weights stand for, (O, I) in fp32."""
        raise NotImplementedError

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it rounds the same layers."""
        return {"embeddings": self.embeddings, "ignore": self.ignore}

    def compress(self, job: Job) -> Checkpoint:
        """Round every matrix, and save the rounded values as floats."""
        # said of the format, measured of nothing: the student's files hold floats
        notes: dict[str, Any] = {"bits_that_the_format_would_store": self._stored_bits}
        return simulate_student(
            job, self, lambda layer: self.values(layer.weight), name=self._name, notes=notes
        )


@settings
class Fp8(_SmallFloats):
    """Weights rounded to FP8 (E4M3, a scale per channel), kept as floats: accuracy only."""

    controls: ClassVar[tuple[str, ...]] = ("int8",)
    _name: ClassVar[str] = "fp8"
    _stored_bits: ClassVar[float] = 8.1  # with the fp32 scale of a row of 320 inputs or more

    def values(self, weight_OI: "Tensor") -> "Tensor":
        """Return what E4M3 with a scale for each output channel stands for."""
        from methods.compression.float_formats import fp8_values

        return fp8_values(weight_OI)


@settings
class Nvfp4(_SmallFloats):
    """Weights rounded to NVFP4 (blocks of 16, E4M3 scales), kept as floats: accuracy only."""

    controls: ClassVar[tuple[str, ...]] = ("fake-int4",)
    _name: ClassVar[str] = "nvfp4"
    _stored_bits: ClassVar[float] = 4.5  # 4, and 8 for the scale of 16

    def values(self, weight_OI: "Tensor") -> "Tensor":
        """Return what E2M1 in blocks of 16 with two levels of scales stands for."""
        from methods.compression.float_formats import nvfp4_values

        return nvfp4_values(weight_OI)

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: as many bits, 4 and 16 for the scale of 32."""
        return {**super().control_settings(), "group_size": 32}


@settings
class Mxfp4(_SmallFloats):
    """Weights rounded to MXFP4 (blocks of 32, powers of two), kept as floats: accuracy only."""

    controls: ClassVar[tuple[str, ...]] = ("fake-int4",)
    _name: ClassVar[str] = "mxfp4"
    _stored_bits: ClassVar[float] = 4.25  # 4, and 8 for the scale of 32

    def values(self, weight_OI: "Tensor") -> "Tensor":
        """Return what E2M1 in blocks of 32 with scales of powers of two stands for."""
        from methods.compression.float_formats import mxfp4_values

        return mxfp4_values(weight_OI)

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: as many bits, 4 and 16 for the scale of 64."""
        return {**super().control_settings(), "group_size": 64}
