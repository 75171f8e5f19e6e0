"""Int4: weights in four bits, two to a byte, a scale (and a zero point) for each group of inputs.

`int4` rounds to nearest, the baseline; it is symmetric unless `symmetric=false`. `int4-calibrated`
is GPTQ (Frantar et al., 2023): it rounds column by column, and later columns compensate the error,
by the second moments of the layer's inputs. It works block by block: the inputs of a block come
from the packed blocks before it. All tokens count alike; as published a token counts by its norm,
and in models with attention sinks a few tokens then decide alone (docs/design.md). `fake-int4`
keeps the rounded values as floats, to measure accuracy alone: its row shows no bytes and no speed.
`scales=mse` searches each group's scale, and `refinement_passes` lowers GPTQ's error further, in
the same format (docs/design.md).

Bits per weight: 4 + 16 / group_size, and 4 / group_size for zero points; table and head are int8.
Cost: seconds; for `int4-calibrated` two passes over the calibration text and one factorisation per
layer. Fails on small models with large groups. The control of `int4-calibrated` is `int4`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops
from methods.compression.quantized import Packer, Quantized, pack_student, simulate_student

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.compression.rounding import QuantizedMatrix


@settings
class Int4(Quantized):
    """Weights in int4 by round to nearest, packed two to a byte."""

    works_by_block: ClassVar[bool] = True
    # inputs that share a scale; 128 loses too much on models of this size
    group_size: Literal[32, 64, 128, 256] = 64
    symmetric: bool = True  # false: a zero point for every group
    # absmax: a group's largest magnitude is not clipped; mse: the scale of the least squared error
    scales: Literal["absmax", "mse"] = "absmax"

    @property
    def bits_per_weight(self) -> float | None:
        """Return 4 bits, and those of the scale and the zero point of a group."""
        return 4 + (16 if self.symmetric else 20) / self.group_size

    def quantize(self, layer: "nn.Linear") -> "QuantizedMatrix":
        """Round a layer to the nearest codes."""
        from methods.compression.rounding import round_to_nearest

        return round_to_nearest(
            layer.weight,
            bits=4,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scales=self.scales,
        )

    def compress(self, job: Job) -> Checkpoint:
        """Round every matrix to the nearest codes."""
        from methods.compression.layers import layers_of

        builder = StudentBuilder(job, "int4", blockwise=True)
        layers = layers_of(builder.model, ignore=self.ignore, method="int4")
        return pack_student(
            job,
            builder,
            self,
            layers,
            lambda name, layer: self.quantize(layer),
            kind="int4",
            notes={"group_size": self.group_size, "scales": self.scales},
        )


@settings
class FakeInt4(Int4):
    """Int4's rounded values kept as floats: accuracy only, no bytes and no speed."""

    simulated: ClassVar[bool] = True

    @property
    def bits_per_weight(self) -> float | None:
        """Return None: floats are kept."""
        return None

    def compress(self, job: Job) -> Checkpoint:
        """Round every matrix, and save the rounded values as floats."""
        return simulate_student(
            job,
            self,
            lambda layer: self.quantize(layer).dequantized(),
            name="fake-int4",
            notes={"group_size": self.group_size, "scales": self.scales},
        )


@settings
class Int4Calibrated(Int4, Calibrated):
    """Weights in int4 by GPTQ: later columns compensate every rounding error."""

    controls: ClassVar[tuple[str, ...]] = ("int4",)

    # share of the mean second moment, added to each second moment
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    # alike: each token's input is divided by its norm first; raw: as published
    weighting: Literal["alike", "raw"] = "alike"
    # after GPTQ, over scales and codes: each lowers the error on the calibration text further
    refinement_passes: Annotated[int, Field(ge=0, le=20)] = 0

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it rounds the same groups of the same layers."""
        return {
            name: getattr(self, name)
            for name in ("group_size", "symmetric", "scales", "embeddings", "ignore")
        }

    def compress(self, job: Job) -> Checkpoint:
        """Round block by block; later blocks get the inputs that the rounded blocks give."""
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below, layers_of

        builder = StudentBuilder(job, "int4-calibrated", blockwise=True)
        layers = layers_of(builder.model, ignore=self.ignore, method="int4-calibrated")
        data = self.calibrate(job, builder.opened)
        packer = Packer(builder, layers, kind="int4")

        def visit(block: str, statistics: InputStatistics) -> None:
            for name, layer in layers_below(layers.linear, block):
                rounded = self._rounded(builder, layer, statistics.sums.pop(name))
                packer.add_layer(name, layer, rounded)
                rounded.write_into(layer.weight)

        options = VisitOptions(
            normalize_tokens=self.weighting == "alike",
            progress=job.progress,
            method="int4-calibrated",
            changing=builder.writer.changing,
        )
        visit_blocks(builder.opened, data, layers.linear, kind="gram", visit=visit, options=options)
        notes = {
            "group_size": self.group_size,
            "weighting": self.weighting,
            "scales": self.scales,
            "refinement_passes": self.refinement_passes,
            "calibration": dict(data.description),
        }
        return packer.finish(self, notes, flops=calibration_flops(builder, data, 2))

    def _rounded(
        self, builder: StudentBuilder, layer: "nn.Linear", gram: "Tensor"
    ) -> "QuantizedMatrix":
        """Round a layer by the second moments of its inputs, (I, I)."""
        from methods.compression.refining import refine
        from methods.compression.rounding import round_with_gptq, round_with_searched_gptq
        from methods.masks import kept_weights

        keep_mask = kept_weights(builder.model.config, layer.weight)
        options: dict[str, Any] = {
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "dampening": self.dampening_frac,
            "keep_mask": keep_mask,
        }
        if self.scales == "mse":
            rounded = round_with_searched_gptq(layer.weight, gram, **options)
        else:
            rounded = round_with_gptq(layer.weight, gram, bits=4, **options)
        if not self.refinement_passes:
            return rounded
        return refine(
            rounded, layer.weight, gram, passes=self.refinement_passes, keep_mask=keep_mask
        )
