"""Int4: weights in four bits, two to a byte, a scale (and a zero point) for each group of inputs.

`int4` rounds to nearest, the baseline; it is symmetric unless `symmetric=false`. `int4-calibrated`
is GPTQ (Frantar et al., 2023): it rounds column by column, and later columns compensate the error,
by the second moments of the layer's inputs. It works block by block: the inputs of a block come
from the packed blocks before it. All tokens count alike; as published a token counts by its norm,
and in models with attention sinks a few tokens then decide alone (docs/design.md). `fake-int4`
keeps the rounded values as floats, to measure accuracy alone: its row shows no bytes and no speed.

Bits per weight: 4 + 16 / group_size, and 4 / group_size for zero points; table and head are int8.
Cost: seconds; for `int4-calibrated` two passes over the calibration text and one factorisation per
layer. Fails on small models with large groups. The control of `int4-calibrated` is `int4`.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops
from methods.compression.quantized import Packer, Quantized, pack_student

if TYPE_CHECKING:
    from torch import nn

    from methods.compression.rounding import QuantizedMatrix


@settings
class Int4(Quantized):
    """Weights in int4 by round to nearest, packed two to a byte."""

    works_by_block: ClassVar[bool] = True
    # inputs that share a scale; 128 loses too much on models of this size
    group_size: Literal[32, 64, 128, 256] = 64
    symmetric: bool = True  # false: a zero point for every group

    @property
    def bits_per_weight(self) -> float | None:
        """Return 4 bits, and those of the scale and the zero point of a group."""
        return 4 + (16 if self.symmetric else 20) / self.group_size

    def quantize(self, layer: "nn.Linear") -> "QuantizedMatrix":
        """Round a layer to the nearest codes."""
        from methods.compression.rounding import round_to_nearest

        return round_to_nearest(
            layer.weight, bits=4, group_size=self.group_size, symmetric=self.symmetric
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
            notes={"group_size": self.group_size},
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
        import torch

        from methods.compression.layers import blocks_of, layers_of
        from methods.compression.rounding import round_to_nearest

        # bf16 cannot hold a scale times a code
        builder = StudentBuilder(job, "fake-int4", blockwise=True, saved_dtype="float32")
        layers = layers_of(builder.model, ignore=self.ignore, method="fake-int4")
        with torch.no_grad():
            for block, names in blocks_of(layers.linear, builder.writer):
                with builder.writer.changing(block):
                    for name in names:
                        weight = layers.linear[name].weight
                        weight.copy_(self.quantize(layers.linear[name]).dequantized())
            if self.embeddings == "int8":
                head = [layers.head] if layers.head and not layers.tied else []
                for name, module in (layers.table, *head):
                    if name not in layers.ignored:
                        module.weight.copy_(round_to_nearest(module.weight, bits=8).dequantized())
        notes = {
            "group_size": self.group_size,
            "simulated": True,
            "packed_layers": len(layers.linear),
            "table_and_head": self.embeddings,
            "skipped": list(self.ignore),
            **layers.notes,
        }
        return builder.save(notes=notes)


@settings
class Int4Calibrated(Int4, Calibrated):
    """Weights in int4 by GPTQ: later columns compensate every rounding error."""

    controls: ClassVar[tuple[str, ...]] = ("int4",)

    # share of the mean second moment, added to each second moment
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    # alike: each token's input is divided by its norm first; raw: as published
    weighting: Literal["alike", "raw"] = "alike"

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it rounds the same groups of the same layers."""
        return {
            name: getattr(self, name)
            for name in ("group_size", "symmetric", "embeddings", "ignore")
        }

    def compress(self, job: Job) -> Checkpoint:
        """Round block by block; later blocks get the inputs that the rounded blocks give."""
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below, layers_of
        from methods.compression.rounding import round_with_gptq
        from methods.masks import kept_weights

        builder = StudentBuilder(job, "int4-calibrated", blockwise=True)
        layers = layers_of(builder.model, ignore=self.ignore, method="int4-calibrated")
        data = self.calibrate(job, builder.opened)
        packer = Packer(builder, layers, kind="int4")

        def visit(block: str, statistics: InputStatistics) -> None:
            for name, layer in layers_below(layers.linear, block):
                rounded = round_with_gptq(
                    layer.weight,
                    statistics.sums.pop(name),
                    bits=4,
                    group_size=self.group_size,
                    symmetric=self.symmetric,
                    dampening=self.dampening_frac,
                    keep_mask=kept_weights(builder.model.config, layer.weight),
                )
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
            "calibration": dict(data.description),
        }
        return packer.finish(self, notes, flops=calibration_flops(builder, data, 2))
